"""Several shard folders as one source of slices, each with its share of the examples."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, UInt16

from curia_common import mixtures
from curia_jax import order
from data_pipeline.format import shards
from data_pipeline.format.records import SliceFacts
from data_pipeline.format.shards import SliceSource


class Mixture:
    """The slices of several folders, one folder after the other, and the order in which they become examples.

    It reads as a SliceSource does. Example g comes from the folder that order.interleaving gives it; which slice that is follows
    from how many earlier examples came from that folder, so that every folder has epochs of its own, each a new shuffle.

    Args:
      sources: a split of each folder; at least two.
      shares: of the examples, adding up to 1.

    Attributes:
      largest: greatest height and width of a slice, px.
      additions: the newest addition of any folder.
      fingerprint: hex digest of the folders' fingerprints and their shares, in their order.
    """

    def __init__(self, sources: Sequence[SliceSource], shares: Sequence[Fraction]) -> None:
        self.sources, self.shares = tuple(sources), tuple(shares)
        heights, widths = zip(*(source.largest for source in sources), strict=True)
        self.largest = (max(heights), max(widths))
        self.additions = max(source.additions for source in sources)
        identity = [[source.fingerprint, str(share)] for source, share in zip(sources, shares, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._first = np.concatenate([[0], np.cumsum([len(source) for source in sources])])
        self._folders = order.interleaving(shares)
        counted = self._folders[:, None] == np.arange(len(sources))
        self._in_period = counted.sum(axis=0)
        # Examples of the same folder before each one of the period.
        self._before = (np.cumsum(counted, axis=0) - counted)[np.arange(len(counted)), self._folders]

    def __len__(self) -> int:
        return int(self._first[-1])

    def slice_numbers(self, first: int, count: int, *, seed: int) -> Int64[np.ndarray, " count"]:
        """Slice numbers of the examples first … first + count - 1."""
        period, place = np.divmod(np.arange(first, first + count), len(self._folders))
        folders = self._folders[place]
        within = period * self._in_period[folders] + self._before[place]
        numbers = np.empty(count, np.int64)
        for folder, source in enumerate(self.sources):
            here = folders == folder
            if not here.any():
                continue
            own = int(np.random.SeedSequence((seed, folder)).generate_state(1, np.uint64)[0])
            start = int(within[here][0])  # neighbours of one folder follow one another in it
            found = order.slice_numbers(start, int(here.sum()), slices=len(source), seed=own)
            numbers[here] = self._first[folder] + found
        return numbers

    def folder_range(self, number: int) -> tuple[int, int]:
        """Number of the first slice of the folder of slice `number`, and how many slices that folder has."""
        folder = self._find(number)[0]
        return int(self._first[folder]), len(self.sources[folder])

    def _find(self, number: int) -> tuple[int, int]:
        """Folder of a slice, and its number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"slice {number} of {len(self)}")
        folder = int(np.searchsorted(self._first, number, side="right")) - 1
        return folder, int(number - self._first[folder])

    def encoded(self, number: int) -> tuple[bytes, SliceFacts]:
        """As SliceSource.encoded."""
        folder, within = self._find(number)
        return self.sources[folder].encoded(within)

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[SliceFacts]]:
        """As SliceSource.read_into."""
        return shards.decode_into(self, numbers, images)

    def place(self, number: int) -> str:
        """Shard and record of slice `number`, for messages."""
        folder, within = self._find(number)
        return self.sources[folder].place(within)

    def check_access(self) -> None:
        """As SliceSource.check_access, of every folder."""
        for source in self.sources:
            source.check_access()

    def check_shards(self, first: int = 0) -> Iterator[str | None]:
        """As SliceSource.check_shards, folder after folder."""
        for source in self.sources:
            yield from source.check_shards(first)


def open_slices(text: str, split: str, *, additions: int | None = None) -> SliceSource | Mixture:
    """The slices of `config.data.shards`: of one folder, or a mixture.

    Args:
      additions: of each folder; as SliceSource has it.

    Raises:
      UserError, DataError: as curia_common.mixtures and SliceSource raise them.
    """
    parts = mixtures.parse(text)
    if len(parts) == 1:
        return SliceSource(parts[0].folder, split, additions=additions)
    shares = mixtures.shares(parts)
    return Mixture([SliceSource(part.folder, split, additions=additions) for part in parts], shares)
