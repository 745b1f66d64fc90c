"""Stored values: their digests, and how they become 16-bit pixels without loss."""

import hashlib

import numpy as np
from jaxtyping import Shaped, UInt16

from data_pipeline.format import records
from data_pipeline.sources.base import ReadError

AIR_HU = -1024
LEVELS = 1 << 16


class Digest:
    """SHA-256 over stored values as little-endian int64, frame after frame, each in C order; hex() gives its first 16 digits."""

    def __init__(self) -> None:
        self._all = hashlib.sha256()

    def add(self, frame: Shaped[np.ndarray, "..."], *, also_alone: bool = False) -> str:
        """Adds a frame; returns the digest of this frame alone, or "" unless `also_alone`."""
        wide = np.ascontiguousarray(frame, dtype="<i8").data  # a frame at a time: int64 takes four times the memory
        self._all.update(wide)
        return hashlib.sha256(wide).hexdigest()[:16] if also_alone else ""

    def hex(self) -> str:
        return self._all.hexdigest()[:16]


def stored_sha256(stored: Shaped[np.ndarray, "..."]) -> str:
    """Digest of one frame, or of several with the frames first."""
    digest = Digest()
    for frame in stored if stored.ndim == 3 else [stored]:
        digest.add(frame)
    return digest.hex()


def to_uint16(
    values: Shaped[np.ndarray, "rows columns"], slope: float, intercept: float, *, hu: bool, low: int | None = None
) -> tuple[UInt16[np.ndarray, "rows columns"], float, float, int]:
    """Stored whole numbers to 16 bit without loss.

    Whole HU become HU + 1024; what lies below -1024 (padding) is raised to it. All else keeps its own steps, and the lowest value
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
        shift = -min(int(whole.min()) if low is None else low, 0)
        intercept = float(intercept - slope * shift)
    top = int(whole.max()) + shift
    if top >= LEVELS:
        raise ReadError(f"values span {top + 1:,} steps; a slice holds {LEVELS:,}")
    pixels = whole.view(np.uint16) if whole.dtype in (np.int16, np.uint16) else whole.astype(np.uint16)
    return pixels + np.uint16(shift % LEVELS), float(slope), intercept, clipped
