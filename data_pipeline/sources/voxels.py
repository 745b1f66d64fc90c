"""The stored values of a volume, in memory or in a file, and one look at all of them: range, histogram, regions of one value."""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from nibabel.volumeutils import apply_read_scaling

from curia_common.errors import StorageError
from data_pipeline.sources.base import SCRATCH_FULL, ReadError

# Larger volumes are read piece by piece.
IN_MEMORY_BYTES = 1 << 28
SLAB_BYTES = 1 << 24  # of neighbouring planes as they are stored
BLOCK_BYTES = 1 << 28  # of planes across the order in which they are stored: each needs one look at the whole file
TAIL_BYTES = 1 << 26  # after the values in a compressed file
MAXIMUM_RATIO = 1100  # deflate, which all formats of volumes use, packs 1,032 bytes into one at best
CUT_OFF = "damaged volume: it is cut off"

# A single wrong voxel must not set the scale of all others. 999 of 1,000 voxels lie between the quantiles; where the range is more
# than WIDE times as wide, values that are further away than FAR times their distance are clipped.
QUANTILES = (0.001, 0.999)
WIDE, FAR = 16, 4


# ---- where the values are


class Array:
    """Stored values in memory; the first axis is the fastest, as in NIfTI."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def planes(self, axis: int, first: int, last: int) -> np.ndarray:
        """Planes first to last along an axis."""
        return self.values[(slice(None),) * axis + (slice(first, last),)]

    def planes_at_once(self, axis: int) -> int:
        """How many planes to read at a time."""
        return max(1, SLAB_BYTES * self.shape[axis] // max(1, self.values.nbytes))


class File:
    """Stored values in a file; planes are read on request."""

    def __init__(self, file: BinaryIO, offset: int, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._file, self._offset, self.shape, self.dtype = file, offset, shape, dtype

    def planes(self, axis: int, first: int, last: int) -> np.ndarray:
        rows, columns, count = self.shape
        if axis == 2:
            return self._read(first * rows * columns, (rows, columns, last - first))
        part = np.empty((*self.shape[:axis], last - first, *self.shape[axis + 1 :]), self.dtype, order="F")
        for n in range(count):
            if axis == 1:
                part[:, :, n] = self._read((n * columns + first) * rows, (rows, last - first, 1))[:, :, 0]
            else:
                part[:, :, n] = self._read(n * columns * rows, (rows, columns, 1))[first:last, :, 0]
        return part

    def _read(self, start: int, shape: tuple[int, int, int]) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self._offset + start * self.dtype.itemsize)
        if len(data) < size:
            raise ReadError(CUT_OFF)
        return np.frombuffer(data, self.dtype).reshape(shape, order="F")

    def planes_at_once(self, axis: int) -> int:
        plane = math.prod(self.shape) // self.shape[axis] * self.dtype.itemsize
        return max(1, (SLAB_BYTES if axis == 2 else BLOCK_BYTES) // plane)


class Layout(NamedTuple):
    """How values follow each other in a file: `offset` is that of the first, in bytes of the unpacked content."""

    offset: int
    shape: tuple[int, int, int]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """The shape of three axes; more than three may be there if they are of one plane.

    Raises:
      ReadError: it is that of no volume, or values are not numbers.
    """
    if len(shape) > 3:
        shape = tuple(n for n in shape if n != 1)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3:
        raise ReadError(f"{len(shape)} dimensions; slices come from volumes of 2 or 3")
    if min(shape) < 1:
        raise ReadError("damaged volume: its header states a side of less than one voxel")
    if dtype.kind == "c" or dtype.names:
        raise ReadError("complex or colour values; slices have one number per voxel")
    return shape


def check_size(size: int, path: str) -> None:
    """Raises ReadError where a file cannot hold as many bytes as its header states."""
    if size > MAXIMUM_RATIO * os.path.getsize(path):
        raise ReadError(f"damaged volume: its header states {size:,} bytes, which the file cannot hold")


def is_singular(affine: Float64[np.ndarray, "4 4"]) -> bool:
    """Whether an affine maps voxels to less than a volume, or is not finite."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return not np.isfinite(affine).all() or bool(abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * spacing.prod())


def stored_in(file: BinaryIO, layout: Layout) -> Array | File:
    """The values of an uncompressed file."""
    if layout.size > IN_MEMORY_BYTES:
        return File(file, *layout)
    file.seek(layout.offset)
    data = file.read(layout.size)
    if len(data) < layout.size:
        raise ReadError(CUT_OFF)
    return Array(np.frombuffer(data, layout.dtype).reshape(layout.shape, order="F"))


def unpacked(pieces: Iterator[bytes], layout: Layout, scratch: str | None, stack: contextlib.ExitStack) -> Array | File:
    """The values of a compressed file, read to its end, where its checksum is.

    Args:
      scratch: folder for what does not fit into memory, a file without a name that lasts as long as `stack`.

    Raises:
      ReadError: it is damaged, cut off, or unpacks to more than its header states.
      StorageError: the scratch disk is full.
    """
    offset, size = layout.offset, layout.size
    small = size <= IN_MEMORY_BYTES
    memory = np.empty(size if small else 0, np.uint8)
    file = None if small else stack.enter_context(tempfile.TemporaryFile(dir=scratch))
    at = 0
    for piece in pieces:
        part = piece[max(0, offset - at) : max(0, offset + size - at)]
        if file is None:
            start = max(0, at - offset)
            memory[start : start + len(part)] = np.frombuffer(part, np.uint8)
        elif part:
            try:
                file.write(part)
                file.flush()
            except OSError as error:  # not the input's fault
                raise StorageError(SCRATCH_FULL.format(error=error.strerror)) from error
        at += len(piece)
        if at > offset + size + TAIL_BYTES:
            raise ReadError("damaged volume: it unpacks to more than its header states")
    if at < offset + size:
        raise ReadError(CUT_OFF)
    if file is not None:
        return File(file, 0, layout.shape, layout.dtype)
    return Array(memory.view(layout.dtype).reshape(layout.shape, order="F"))


# ---- what they are


def scaled(stored: np.ndarray, scaling: tuple[float, float]) -> np.ndarray:
    """Real values: integers where stored values and scaling are small ones, else as nibabel rescales, in float32."""
    slope, inter = scaling
    if scaling == (1, 0):
        return stored
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2 and _is_small(slope) and _is_small(inter):
        return stored.astype(np.int32) * int(slope) + int(inter)
    return apply_read_scaling(stored, np.float64(slope), np.float64(inter)).astype(np.float32)


def _is_small(number: float) -> bool:
    """Whole, and small enough for 16-bit values times it to fit into 32 bits."""
    return float(number).is_integer() and abs(number) < 1 << 14


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What one look at a volume tells; of finite values, and all but the first three from a sample of its planes.

    Attributes:
      low, high: lowest and highest.
      integers: all are whole numbers that fit 32 bits or their own type.
      values, counts: whole numbers in order and how many voxels round to each, up to 16 bits away from 0.
      bulk: between which 998 of 1,000 voxels lie, to 1 %.
      distinct: how many whole numbers there are; 0 unless `integers`.
      background: share of the commonest whole number.
      equal: of neighbours in rows and columns that are not both of the commonest number, how many are equal.
    """

    low: int | float
    high: int | float
    integers: bool
    values: Int64[np.ndarray, " values"]
    counts: Int64[np.ndarray, " values"]
    bulk: tuple[float, float]
    distinct: int = 0
    background: float = 0.0
    equal: float = 0.0

    def limits(self, lowest: int | float = -math.inf) -> tuple[int | float, int | float]:
        """The range to keep, from `lowest` on: all values, or, where few outliers make it WIDE, those near all others."""
        low, high = max(self.low, lowest), max(self.high, lowest)
        bottom, top = (max(one, lowest) for one in self.bulk)
        width = top - bottom
        if not width or high - low <= WIDE * width:
            return low, high
        low, high = max(low, bottom - FAR * width), min(high, top + FAR * width)
        return (math.floor(low), math.ceil(high)) if self.integers else (low, high)


def survey(stored: Array | File, scaling: tuple[float, float]) -> Survey:
    """Looks at all values, a slab at a time.

    Raises:
      ReadError: none of the values is finite.
    """
    low, high, whole = math.inf, -math.inf, True
    rounded, exponents = np.zeros(1 << 17, np.int64), np.zeros(1 << 16, np.int64)
    folded, regions = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)  # by the last 16 bits of whole numbers
    pairs = 0
    for values in _slabs(stored, scaling):
        finite, seen = values, None
        if values.dtype.kind == "f" and not (is_finite := np.isfinite(values)).all():
            finite, seen = values[is_finite], _sample(is_finite)
            if not finite.size:
                continue
            values = np.where(is_finite, values, finite[0])
        bottom, top = finite.min().item(), finite.max().item()
        low, high = min(low, bottom), max(high, top)
        some = _sample(values)
        if values.dtype.kind == "f":
            whole = whole and all(bool(np.array_equal(one, np.rint(one))) for one in (some, values))
            whole = whole and max(abs(bottom), abs(top)) < 2**31
        counted = some if seen is None else some[seen]
        near = (
            counted
            if counted.dtype.itemsize <= 2
            else np.rint(np.clip(counted.astype(np.float64), -(1 << 16), (1 << 16) - 1))
        )
        rounded += np.bincount(near.ravel().astype(np.intp) + (1 << 16), minlength=1 << 17)
        if some.dtype.itemsize > 2:
            exponents += np.bincount(_to_key(counted.ravel()), minlength=1 << 16)
        if whole:
            last = some.astype(np.int64 if some.dtype.kind == "f" else np.uint16).astype(np.uint16)
            folded += np.bincount(last.ravel(), minlength=1 << 16)
            for one, other in ((last[1:], last[:-1]), (last[:, 1:], last[:, :-1])):
                regions += np.bincount(one[one == other], minlength=1 << 16)
                pairs += one.size
    if low > high:
        raise ReadError("none of its values is a finite number")
    found = np.flatnonzero(rounded)
    values, counts = found.astype(np.int64) - (1 << 16), rounded[found]
    keys = np.flatnonzero(exponents)
    bulk = (float(low), float(high))
    if found.size:
        first, last = _bulk(_from_key(keys), exponents[keys]) if keys.size else _bulk(values, counts)
        bulk = (max(bulk[0], first), min(bulk[1], last))
    if not whole:
        return Survey(float(np.float32(low)), float(np.float32(high)), False, values, counts, bulk)
    commonest = int(folded.argmax())
    different = pairs - int(regions[commonest])
    return Survey(
        low, high, True, values, counts, bulk, int(np.count_nonzero(folded)), float(folded[commonest] / folded.sum()),
        float((regions.sum() - regions[commonest]) / max(1, different)),
    )  # fmt: skip


def steps_of_one(stored: Array | File, scaling: tuple[float, float], found: Survey) -> float:
    """Of unequal neighbours in rows and columns, how many have values between which the volume has no other: few at the borders of
    regions, nearly all in an image of few grey levels.

    Args:
      found: of these values, which are whole numbers.
    """
    present = np.zeros(1 << 16, np.int64)
    ones, unequal = 0, 0
    for values in _slabs(stored, scaling):
        present += np.bincount(_folded(_sample(values), found.low).ravel(), minlength=1 << 16)
    ranks = np.cumsum(present > 0).astype(np.int32)
    for values in _slabs(stored, scaling):
        rank = ranks[_folded(_sample(values), found.low)]
        for axis in (0, 1):
            jumps = np.abs(np.diff(rank, axis=axis))
            ones, unequal = ones + int((jumps == 1).sum()), unequal + int(np.count_nonzero(jumps))
    return ones / max(1, unequal)


def _folded(values: np.ndarray, low: int | float) -> np.ndarray:
    """The last 16 bits of how far whole numbers lie above the lowest; 0 for NaN and infinity."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=low, posinf=low, neginf=low)
    return (values.astype(np.int64) - int(low)).astype(np.uint16)


def _slabs(stored: Array | File, scaling: tuple[float, float]) -> Iterator[np.ndarray]:
    for start in range(0, stored.shape[2], step := stored.planes_at_once(2)):
        yield scaled(stored.planes(2, start, min(start + step, stored.shape[2])), scaling)


def _sample(values: np.ndarray) -> np.ndarray:
    """Every eighth plane of a slab, more of thin ones: its statistics are those of the whole."""
    return values[:, :, :: min(8, max(1, values.shape[2] // 4))]


def _to_key(values: Shaped[np.ndarray, " values"]) -> np.ndarray:
    """The upper 16 bits of float32, in the order of the values: sign, exponent and 7 bits of mantissa."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(16)


def _from_key(keys: Shaped[np.ndarray, " values"]) -> np.ndarray:
    high = keys.astype(np.uint32) << np.uint32(16)
    bits = np.where(high >> 31, high & np.uint32((1 << 31) - 1), ~high)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _bulk(values: Shaped[np.ndarray, " values"], counts: Int64[np.ndarray, " values"]) -> tuple[float, float]:
    """Quantiles; where one value fills all between them, those of the rest and that value."""
    low, high = _quantiles(values, counts)
    if low == high and len(counts) > 1:
        rest = counts.copy()
        rest[counts.argmax()] = 0
        one, other = _quantiles(values, rest)
        low, high = min(low, one), max(high, other)
    return low, high


def _quantiles(values: Shaped[np.ndarray, " values"], counts: Int64[np.ndarray, " values"]) -> tuple[float, float]:
    first, last = np.searchsorted(np.cumsum(counts), np.array(QUANTILES) * counts.sum())
    return float(values[first]), float(values[min(last, len(values) - 1)])
