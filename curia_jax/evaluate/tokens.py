"""Lists of tokens of different lengths: patches of a slice, of a mask, or of several slices."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from curia_common.errors import DataError


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One list of tokens per case, end to end in one array, which may be memory-mapped.

    Attributes:
      flat: tokens of all cases, in the order of the cases.
      starts: number of the first token of each case.
      lengths: tokens of each case, at least one.
    """

    flat: Float[np.ndarray, "total d"]
    starts: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, cases: Sequence[Float[np.ndarray, "_ d"]]) -> "Tokens":
        """Joins the lists of cases.

        Raises:
          DataError: a case has no token.
        """
        lengths = np.array([len(case) for case in cases], np.int64)
        if empty := np.flatnonzero(lengths == 0).tolist():
            raise DataError(f"case {empty[0]} of {len(cases)} has no token; leave it out, or pool its whole image")
        return cls(np.concatenate(cases), np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> "Tokens":
        return Tokens(self.flat, self.starts[rows], self.lengths[rows])

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def padded(
        self, rows: Int[np.ndarray, " b"], length: int
    ) -> tuple[Float[np.ndarray, "b length d"], Bool[np.ndarray, "b length"]]:
        """Float32 tokens of some cases, with zeros up to `length`, and which of them are tokens."""
        values = np.zeros((len(rows), length, self.flat.shape[1]), np.float32)
        for into, start, count in zip(values, self.starts[rows], self.lengths[rows], strict=True):
            into[:count] = self.flat[start : start + count]
        return values, np.arange(length) < self.lengths[rows][:, None]
