"""Lists of tokens of different lengths: patches of a slice, of a mask, or of several slices."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from curia_common.errors import DataError


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One list of tokens per case.

    Attributes:
      arrays: the tokens of all lists, which may be memory-mapped.
      array: number of the array that holds each list.
      starts: number of the first token of each list in its array.
      lengths: tokens of each list, at least one.
    """

    arrays: tuple[Float[np.ndarray, "_total d"], ...]
    array: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, cases: Sequence[Float[np.ndarray, "_ d"]]) -> "Tokens":
        """Joins the lists of cases.

        Raises:
          DataError: a case has no token.
        """
        lengths = np.array([len(case) for case in cases], np.int64)
        return cls.end_to_end(np.concatenate(cases), lengths)

    @classmethod
    def end_to_end(cls, flat: Float[np.ndarray, "total d"], lengths: Int[np.ndarray, " n"]) -> "Tokens":
        """Lists that follow each other in one array.

        Raises:
          DataError: a case has no token.
        """
        if empty := np.flatnonzero(lengths == 0).tolist():
            raise DataError(f"case {empty[0]} of {len(lengths)} has no token; leave it out, or pool its whole image")
        return cls((flat,), np.zeros(len(lengths), np.int64), np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def of_slices(
        cls, values: Float[np.ndarray, "slices tokens d"], inside: Bool[np.ndarray, "slices tokens"],
        case: Shaped[np.ndarray, " slices"],
    ) -> "Tokens":  # fmt: skip
        """The tokens inside of the slices of each case.

        Where all are inside, nothing is copied.

        Args:
          case: of each slice, any type; slices of a case follow each other.
        """
        first = np.flatnonzero(np.r_[True, case[1:] != case[:-1]])
        lengths = np.add.reduceat(inside.sum(axis=1), first)
        flat = values.reshape(-1, values.shape[-1]) if inside.all() else values[inside]
        return cls.end_to_end(flat, lengths)

    def followed_by(self, other: "Tokens") -> "Tokens":
        """The lists of both; nothing is copied."""
        return Tokens(
            (*self.arrays, *other.arrays), np.concatenate([self.array, other.array + len(self.arrays)]),
            np.concatenate([self.starts, other.starts]), np.concatenate([self.lengths, other.lengths]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> "Tokens":
        return Tokens(self.arrays, self.array[rows], self.starts[rows], self.lengths[rows])

    @property
    def width(self) -> int:
        return self.arrays[0].shape[1]

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def padded(
        self, rows: Int[np.ndarray, " b"], length: int
    ) -> tuple[Float[np.ndarray, "b length d"], Bool[np.ndarray, "b length"]]:
        """Float32 tokens of some cases, with zeros up to `length`, and which of them are tokens."""
        values = np.zeros((len(rows), length, self.width), np.float32)
        for into, array, start, count in zip(
            values, self.array[rows], self.starts[rows], self.lengths[rows], strict=True
        ):
            into[:count] = self.arrays[array][start : start + count]
        return values, np.arange(length) < self.lengths[rows][:, None]
