"""Near-duplicate series: the same exam reconstructed twice, or received by another route with changed pixels.

The signature of a series is three of its slices, at a quarter, half and three quarters of its length, at 16 x 16 px and
normalised. Series that agree in the low frequencies of one of the three are compared; those that correlate above LIKE are
reported, and kept.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int8, Int64, UInt16
from PIL import Image
from scipy.fft import dctn

SIDE = 16
PLACES = (0.25, 0.5, 0.75)
# Correlation of signatures: two reconstruction kernels of one CT are above 0.999; different patients stay below 0.98.
LIKE = 0.995
BLOCK = 2048  # series per side of one comparison


def places(count: int) -> list[int]:
    """Indices of the slices of which a series of `count` slices has its signature."""
    return [min(int(place * count), count - 1) for place in PLACES]


def _thumbnail(pixels: UInt16[np.ndarray, "rows columns"]) -> Float[np.ndarray, "16 16"]:
    """A slice at 16 x 16 px, antialiased."""
    small = Image.fromarray(pixels.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def signature(chosen: Sequence[UInt16[np.ndarray, "_ _"]]) -> Int8[np.ndarray, "3 16 16"]:
    """Signature of the slices that `places` names: thumbnails with joint mean 0 and standard deviation 32."""
    small = np.stack([_thumbnail(pixels) for pixels in chosen])
    deviation = float(small.std())
    normal = (small - small.mean()) / (deviation if deviation > 0 else 1.0)
    return np.clip(np.rint(normal * 32), -127, 127).astype(np.int8)


def groups(signatures: Int8[np.ndarray, "series 3 16 16"], kinds: Sequence[str]) -> list[int]:
    """For each series the index of the first one that it resembles; its own where there is none before it.

    The time is quadratic in the number of series that share a structure: 20,000 take four CPU seconds.

    Args:
      kinds: only series of one kind (modality and plane) are compared.
    """
    buckets: dict[tuple[str, int, bytes], list[int]] = collections.defaultdict(list)
    for start in range(0, len(signatures), BLOCK):
        # Signs of the lowest frequencies survive noise and another reconstruction kernel almost always, and one of the
        # three slices is enough.
        block = signatures[start : start + BLOCK].astype(np.float32)
        low = np.asarray(dctn(block, axes=(2, 3), norm="ortho"))[..., :5, :5] > 0
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
    """For each row the index of the first one before it that correlates above LIKE, else its own."""
    found = np.arange(len(vectors))
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        for begin in range(0, start + len(rows), BLOCK):
            # Dot products of 768 7-bit numbers are exact in float32, whatever the order of summation.
            products = rows @ vectors[begin : begin + BLOCK].astype(np.float32).T
            alike = products > LIKE * np.outer(lengths[start : start + BLOCK], lengths[begin : begin + BLOCK])
            place = begin + alike.argmax(axis=1)
            own = found[start : start + BLOCK]
            own[:] = np.where(alike.any(axis=1), np.minimum(own, place), own)
    return found
