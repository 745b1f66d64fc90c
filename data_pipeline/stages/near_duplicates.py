"""Series that look alike: the same exam reconstructed twice, or sent by another road with changed pixels.

The signature of a series is three of its slices, at a quarter, half and three quarters of its length, at 16 x 16 px and
normalised. Series whose middle structure agrees are compared; those that correlate above LIKE are reported, and kept.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int8, Int64, UInt16
from PIL import Image
from scipy.fft import dctn

SIDE = 16
PLACES = (0.25, 0.5, 0.75)
# Correlation of signatures: two kernels of one CT are above 0.999; neighbouring patients in one position stay below 0.98.
LIKE = 0.995
BLOCK = 2048  # series compared with as many at a time


def places(count: int) -> list[int]:
    """Which slices of a series of `count` its signature is made of."""
    return [min(int(place * count), count - 1) for place in PLACES]


def _thumbnail(pixels: UInt16[np.ndarray, "rows columns"]) -> Float[np.ndarray, "16 16"]:
    """A slice at 16 x 16 px, antialiased."""
    small = Image.fromarray(pixels.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def signature(chosen: Sequence[UInt16[np.ndarray, "_ _"]]) -> Int8[np.ndarray, "3 16 16"]:
    """Of the slices of a series that `places` names: small, with mean 0 and deviation 32 together."""
    small = np.stack([_thumbnail(pixels) for pixels in chosen])
    deviation = float(small.std())
    normal = (small - small.mean()) / (deviation if deviation > 0 else 1.0)
    return np.clip(np.rint(normal * 32), -127, 127).astype(np.int8)


def groups(signatures: Int8[np.ndarray, "series 3 16 16"], kinds: Sequence[str]) -> list[int]:
    """For each series the number of the first one that it looks like; its own where there is none before it.

    All that share a middle structure are compared: 20,000 series that share one take four CPU seconds, and ten times as many
    a hundred times as long.

    Args:
      kinds: only series of one kind (modality and plane) are compared.
    """
    buckets: dict[tuple[object, ...], list[int]] = collections.defaultdict(list)
    for start in range(0, len(signatures), BLOCK):
        # Signs of the lowest frequencies: those of a slice survive noise and another kernel almost always, and one slice
        # of three is enough.
        low = dctn(signatures[start : start + BLOCK].astype(np.float32), axes=(2, 3), norm="ortho")[..., :5, :5] > 0
        for number, signs in enumerate(low, start):
            for place in range(len(PLACES)):
                buckets[kinds[number], place, signs[place].tobytes()].append(number)
    like = np.arange(len(signatures))
    for members in buckets.values():
        if len(members) > 1:
            numbers = np.asarray(members)
            like[numbers] = np.minimum(
                like[numbers], numbers[_first_like(signatures[numbers].reshape(len(numbers), -1))]
            )
    first = list(range(len(signatures)))
    for number, other in enumerate(like.tolist()):
        first[number] = first[other]
    return first


def _first_like(vectors: Int8[np.ndarray, "series values"]) -> Int64[np.ndarray, "series"]:
    """For each row the first one before it that correlates above LIKE, else itself."""
    found = np.arange(len(vectors))
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        for begin in range(0, start + len(rows), BLOCK):
            # Sums of 768 products of 7-bit numbers are exact in 32-bit floats, in whatever order they are added.
            products = rows @ vectors[begin : begin + BLOCK].astype(np.float32).T
            alike = products > LIKE * np.outer(lengths[start : start + BLOCK], lengths[begin : begin + BLOCK])
            place = begin + alike.argmax(axis=1)
            own = found[start : start + BLOCK]
            own[:] = np.where(alike.any(axis=1), np.minimum(own, place), own)
    return found
