"""Series that look alike: the same exam reconstructed twice, or sent by another road with changed pixels.

The signature of a series is three of its slices, at a quarter, half and three quarters of its length, at 16 x 16 px and
normalised. Series whose middle structure agrees are compared; those that correlate above LIKE are reported, and kept.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int8, UInt16
from PIL import Image
from scipy.fft import dctn

SIDE = 16
PLACES = (0.25, 0.5, 0.75)
# Correlation of signatures: two kernels of one CT are above 0.999; neighbouring patients in one position stay below 0.98.
LIKE = 0.995
MOST_IN_A_BUCKET = 512


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

    Args:
      kinds: only series of one kind (modality and plane) are compared.
    """
    first = list(range(len(signatures)))
    buckets: dict[tuple[object, ...], list[int]] = collections.defaultdict(list)
    for number, (one, kind) in enumerate(zip(signatures, kinds, strict=True)):
        # Signs of the lowest frequencies: those of a slice survive noise and another kernel almost always, and one slice
        # of three is enough.
        low = dctn(one.astype(np.float32), axes=(1, 2), norm="ortho")[:, :5, :5] > 0
        vector = one.astype(np.float32).ravel()
        length = float(np.linalg.norm(vector))
        candidates: set[int] = set()
        for place in range(len(PLACES)):
            bucket = buckets[kind, place, low[place].tobytes()]
            candidates.update(bucket)
            if len(bucket) < MOST_IN_A_BUCKET:
                bucket.append(number)
        for other in sorted(candidates):
            against = signatures[other].astype(np.float32).ravel()
            scale = length * float(np.linalg.norm(against))
            if scale > 0 and float(vector @ against) / scale > LIKE:
                first[number] = first[other]
                break
    return first
