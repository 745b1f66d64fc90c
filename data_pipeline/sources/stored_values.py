"""Stored values: their bits, padding and digests, and how they become 16-bit pixels without loss."""

import hashlib
import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped, UInt16

from data_pipeline.format import records
from data_pipeline.sources.base import ReadError

AIR_HU = -1024
HIGHEST_HU = 3071  # of 12 bits; metal saturates there
CLOSE = 0.1  # of the range of an MR: padding so little below it is as good as background
LEVELS = 1 << 16
_COUNTED_TOGETHER = 1 << 15
_WIDEST_COUNTED = 1 << 20  # more levels than this are sorted instead of counted, which takes memory for each


class Padding(NamedTuple):
    """Stored values that are not part of the image, from `low` to `high` (DICOM PS3.3 C.7.5.1.1.2)."""

    low: int
    high: int


# How stored values become the bytes of a digest; frames come first, each in C order, little-endian.
DigestKind = Literal["smallest", "int64"]
DIGESTS: dict[DigestKind, str] = {
    "smallest": "SHA-256 of the stored values in the smallest of uint16, int16, int32 and int64, in this order, that holds all of the file",
    "int64": "SHA-256 of the stored values as int64",  # datasets begun with version 0.2.0 or before
}
_WIDTHS = (2, 4, 8)


class Digest:
    """The digest of a file's stored values, a frame at a time; hex() gives its first 16 digits.

    The smallest type is known only after the last frame, so that wide values are hashed in each width that may turn out to be
    it. Values that were decoded as 16 bits cost one hash: as long as they fit, uint16 and int16 have the same bytes.
    """

    def __init__(self, kind: DigestKind = "smallest") -> None:
        self._kind: DigestKind = kind
        self._hashes = {width: hashlib.sha256() for width in _WIDTHS}
        self._fed: int | None = None  # the greatest width that has all frames
        self._low, self._high = 0, 0

    def add(self, frame: Shaped[np.ndarray, "..."], *, also_alone: bool = False) -> str:
        """Adds a frame of whole numbers; returns the digest of this frame alone, or "" unless `also_alone`."""
        low, high = int(frame.min()), int(frame.max())
        self._low, self._high = min(low, self._low), max(high, self._high)
        if self._kind == "int64":
            needed = widest = 8
        else:
            needed, widest = _width(self._low, self._high), max(2, frame.dtype.itemsize)
        self._fed = widest if self._fed is None else min(widest, self._fed)
        for width in _WIDTHS:
            if needed <= width <= self._fed:
                self._hashes[width].update(_bytes(frame, width))
        if not also_alone:
            return ""
        width = 8 if self._kind == "int64" else _width(low, high)
        return hashlib.sha256(_bytes(frame, width)).hexdigest()[:16]

    def hex(self) -> str:
        """The digest of all frames.

        Raises:
          ReadError: a frame was decoded to fewer bits than others need.
        """
        width = 8 if self._kind == "int64" else _width(self._low, self._high)
        if self._fed is not None and width > self._fed:
            raise ReadError(f"its frames have values of {8 * self._fed} and of {8 * width} bits")
        return self._hashes[width].hexdigest()[:16]


def _width(low: int, high: int) -> int:
    """Bytes of the smallest type that holds these values and 0."""
    if high < 1 << 15 and low >= -1 << 15 or high < 1 << 16 and low >= 0:
        return 2
    return 4 if high < 1 << 31 and low >= -1 << 31 else 8


def _bytes(frame: Shaped[np.ndarray, "..."], width: int) -> memoryview:
    if frame.dtype.kind == "f":
        frame = frame.astype(np.int64)
    # What fits into 16 bits has the same bytes in both signs.
    name = "<u2" if width == 2 and frame.dtype.kind == "u" else f"<i{width}"
    return np.ascontiguousarray(frame, dtype=name).data


def stored_sha256(stored: Shaped[np.ndarray, "..."], kind: DigestKind = "smallest") -> str:
    """Digest of one frame, or of several with the frames first."""
    digest = Digest(kind)
    for frame in stored if stored.ndim == 3 else [stored]:
        digest.add(frame)
    return digest.hex()


def extract_bits(
    words: Integer[np.ndarray, "rows columns"], stored: int, high: int, *, signed: bool, overlays: Collection[int] = ()
) -> Integer[np.ndarray, "rows columns"]:
    """The stored values in words of uncompressed pixel data (DICOM PS3.5 8.1.1).

    Args:
      words: as they lie in the file, of 8, 16 or 32 bits.
      stored, high: Bits Stored and High Bit.
      signed: values are two's complement.
      overlays: numbers of bits that hold overlays.

    Raises:
      ReadError: other bits than the stored ones are set, so that it is unknown which of them are the value.
    """
    allocated = words.dtype.itemsize * 8
    if stored == allocated and high == allocated - 1:
        return words
    shift = high + 1 - stored
    if stored < 1 or shift < 0 or high >= allocated:
        raise ReadError(
            f"BitsStored {stored} and HighBit {high} do not fit {allocated} allocated bits: what the pixels mean is unknown; correct the header"
        )
    bottom, top = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    if shift == 0 and int(words.min()) >= bottom and int(words.max()) <= top:
        return words
    bits = words.view(words.dtype.str.replace("i", "u")).astype(np.uint32)
    mask = (1 << stored) - 1
    values = (bits >> shift & mask).astype(np.int64)
    if signed:
        values -= (values >> stored - 1) << stored
    unused = (1 << allocated) - 1 & ~(mask << shift) & ~sum(1 << bit for bit in overlays)
    rest = bits & unused
    # Above a negative value the unused bits may repeat the sign.
    if shift == 0 and signed:
        rest = rest[(values >= 0) | (rest != unused)]
    if rest.any():
        raise ReadError(
            f"pixels use bits outside the {stored} of BitsStored, where the header places no overlay; correct BitsStored and HighBit"
        )
    return values.astype(words.dtype)


class Levels(NamedTuple):
    """The distinct values of an image, ascending, and how many pixels have each."""

    values: Shaped[np.ndarray, " levels"]
    counts: Int[np.ndarray, " levels"]


def levels(values: Shaped[np.ndarray, "..."]) -> Levels:
    """Counts the values of an image."""
    if values.dtype.kind == "f" or not values.size:
        return Levels(*np.unique(values, return_counts=True))
    low, high = int(values.min()), int(values.max())
    if high - low >= _WIDEST_COUNTED:
        return Levels(*np.unique(values, return_counts=True))
    # Differences wrap around to what they are without a sign.
    flat, unsigned = values.ravel(), f"u{values.dtype.itemsize}"
    counts = np.zeros(high - low + 1, np.intp)
    piece = max(_COUNTED_TOGETHER, len(counts))
    for start in range(0, flat.size, piece):
        above_low = (flat[start : start + piece] - flat.dtype.type(low)).view(unsigned).astype(np.intp, copy=False)
        counts += np.bincount(above_low, minlength=len(counts))
    found = np.flatnonzero(counts)
    return Levels(found + low, counts[found])


def replace_padding(
    values: Integer[np.ndarray, "rows columns"], known: Levels, padding: Padding, slope: float, intercept: float, *, hu: bool
) -> tuple[Integer[np.ndarray, "rows columns"], int]:  # fmt: skip
    """Puts air, or in other units the lowest value of the image, where a slice is padded.

    A padding value that the image may have too is believed only in regions that touch the border, where padding lies.

    Args:
      known: levels(values).
      slope, intercept: real value = value * slope + intercept.

    Returns:
      The values, and how many pixels are padding.
    """
    ends = padding.low * slope + intercept, padding.high * slope + intercept
    is_padding = _within(known, padding)
    count = int(known.counts[is_padding].sum())
    # to_uint16 raises what lies below air.
    if not count or is_padding.all() or (hu and max(ends) <= AIR_HU):
        return values, count
    image = known.values[~is_padding]
    lowest, highest = int(image[0]), int(image[-1])
    if not hu and 0 <= lowest - padding.high and lowest - padding.low <= (highest - lowest) * CLOSE:
        return values, count
    air = math.floor((AIR_HU - intercept) / slope) if hu else lowest
    inside = (values >= padding.low) & (values <= padding.high)
    if min(ends) <= HIGHEST_HU if hu else lowest <= padding.high and padding.low <= highest:
        from scipy import ndimage  # slow to import, and rarely needed

        regions = np.zeros(inside.shape, np.int32)
        ndimage.label(inside, output=regions)
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        inside = np.isin(regions, border[border > 0])
        if not inside.any():
            return values, 0
    return np.where(inside, np.int64(air), values), int(np.count_nonzero(inside))


def below_air(
    known: Levels, slope: float, intercept: float, padding: Padding | None = None
) -> tuple[tuple[float, int], ...]:
    """HU below -1024, which `to_uint16` raises, and how many pixels have each; declared padding left out."""
    below = known.values * slope + intercept < AIR_HU
    if padding is not None:
        below &= ~_within(known, padding)
    return tuple(
        (value * slope + intercept, count)
        for value, count in zip(known.values[below].tolist(), known.counts[below].tolist(), strict=True)
    )


def _within(known: Levels, padding: Padding) -> Bool[np.ndarray, " levels"]:
    return (known.values >= padding.low) & (known.values <= padding.high)


def to_uint16(
    values: Shaped[np.ndarray, "rows columns"], slope: float, intercept: float, *, hu: bool, low: int | None = None
) -> tuple[UInt16[np.ndarray, "rows columns"], float, float, int]:
    """Stored whole numbers to 16 bit without loss.

    Whole HU become HU + 1024. HU below -1024 (padding) are raised to it. All else keeps its own steps, and the lowest value
    becomes 0 if it is negative. The returned slope is above 0.

    Args:
      values: whole numbers; real value = values * slope + intercept.
      low: lowest value of the series; of this slice unless given.

    Returns:
      Pixels, slope and intercept of the pixels, and records.CLIPPED where padding was raised, else 0.

    Raises:
      ReadError: the values span more than 16 bits.
    """
    exact = float(slope).is_integer() and float(intercept).is_integer()
    # 32 bits hold 16-bit values times any slope and intercept in use, at a tenth of the time of 64.
    small = values.dtype.itemsize <= 2 and exact and abs(slope) < 1 << 14 and abs(intercept) < 1 << 28
    if slope == 1 and small:
        whole = values  # 16 bits do, because what is added wraps around
    else:
        whole = values.astype(np.int32 if small else np.int64)
    if slope < 0:
        whole, slope, low = -whole, -slope, None
    clipped = 0
    if hu and exact:
        whole = whole if slope == 1 else whole * int(slope)
        shift = int(intercept) - AIR_HU
        bottom = int(whole.min()) + shift
        if bottom < 0:
            clipped = records.CLIPPED
            whole = whole if -shift <= np.iinfo(whole.dtype).max else whole.astype(np.int32)
            whole = np.maximum(whole, np.full_like(whole, -shift))  # five times faster than with a number
        slope, intercept = 1.0, float(AIR_HU)
    else:
        if hu and (bottom := math.ceil((AIR_HU - intercept) / slope)) <= int(whole.max()):
            # `bottom` is the lowest step that is not below -1024; all slices of a series start at it, if that fits.
            if int(whole.min()) < bottom:
                clipped, whole = records.CLIPPED, np.maximum(whole.astype(np.int64), bottom)
            if low is None or low < bottom:
                low = bottom if int(whole.max()) - bottom < LEVELS else int(whole.min())
        shift = -min(int(whole.min()) if low is None else low, 0)
        intercept = float(intercept - slope * shift)
    top = int(whole.max()) + shift
    if top >= LEVELS:
        raise ReadError(f"values span {top + 1:,} steps; a slice holds {LEVELS:,}")
    pixels = whole.view(np.uint16) if whole.dtype in (np.int16, np.uint16) else whole.astype(np.uint16)
    return pixels + np.uint16(shift % LEVELS), float(slope), intercept, clipped
