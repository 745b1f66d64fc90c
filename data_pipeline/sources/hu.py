"""Whether values are Hounsfield units (HU), judged by where air, fat and soft tissue lie.

By definition water is at 0 HU and air at -1000 (DICOM PS3.3 C.11.1.1.2). Fat lies at -120 to -60, muscle and organs at 10 to 80,
blood with contrast agent below 400 (Bushberg et al., The Essential Physics of Medical Imaging, table 10-1). So HU of a body in
air have two peaks at known places, and most ways to lose a rescale move both by the intercept. Thresholds were chosen on
real exams; `python -m benchmarks.units` prints what the rule says of each and how often it is wrong.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Int64, Shaped

# "proved": air and tissue lie where HU have them. "refuted": no rescaled CT looks like this. "open": neither.
Verdict = Literal["proved", "open", "refuted"]

LOWEST, HIGHEST = -100_000, 100_000  # ends for `share`: everything below, everything above
_LOWEST, _HIGHEST, _STEP = -2400, 2400, 10
_BINS = (_HIGHEST - _LOWEST) // _STEP + 3  # with one for all that is lower, and two for all that is higher
# Padding lies outside the circle that a scanner reconstructs. Vendors fill it with values that no tissue has: -3024, -2048, -2000,
# -1500. In the stored values it is one value; lossy compression spreads it.
_PADDING, _LOSSY_PADDING = -1050, -1400
PADDING_SHARE = 0.5  # of all values below -1050, for one value to be padding
# Below this lie noise of air and streaks of metal, at most 1 % of the pixels of real exams.
FAR_BELOW_AIR, FAR_BELOW_SHARE = -1200, 0.1
# No scale of CT goes beyond signed 16 bits. What lies there was negative: padding or air that was stored without its sign.
FAR_ABOVE, FAR_ABOVE_SHARE = 32_767, 0.001
# (from, to, share of the pixels, times as many as in either neighbouring range of the same width). Lung can lie as close as -900.
Peak = tuple[int, int, float, float]
AIR: Peak = (-1050, -950, 0.01, 1.0)
TISSUE: Peak = (-130, 90, 0.02, 1.5)  # fat or soft tissue
# A lost or repeated rescale moves both by its intercept. Bone and contrast agent have no such peaks there.
MOVED_AIR: Peak = (-1050, -950, 0.1, 1.5)
MOVED_TISSUE: Peak = (-130, 90, 0.1, 1.5)
INTERCEPTS = (1024, -1024, 1000, -1000)


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """How many pixels lie where, in HU if the values are HU; profiles of slices add up to that of a series.

    Attributes:
      bins: pixels below -2400, then in steps of 10 up to 2400, then up to 32,767, then above.
      low, high: lowest and highest value that is not padding; inf and -inf where everything is padding.
      padding: pixels left out.
    """

    bins: Int64[np.ndarray, "bins"]
    low: float
    high: float
    padding: int

    def __add__(self, other: "Profile") -> "Profile":
        return Profile(
            self.bins + other.bins, min(self.low, other.low), max(self.high, other.high), self.padding + other.padding
        )

    @functools.cached_property
    def _up_to(self) -> list[int]:
        """Pixels in the first n bins, for n from 0."""
        return [0, *np.cumsum(self.bins).tolist()]

    def share(self, low: int, high: int) -> float:
        """Pixels from `low` to below `high`, multiples of 10, as a share of all that are not padding."""
        first = 0 if low < _LOWEST else min((low - _LOWEST) // _STEP + 1, _BINS)
        last = _BINS if high > _HIGHEST else max((high - _LOWEST) // _STEP + 1, 0)
        total = self._up_to[-1]
        return (self._up_to[last] - self._up_to[first]) / total if total else 0.0


EMPTY = Profile(np.zeros(_BINS, np.int64), float("inf"), float("-inf"), 0)


def profile(
    values: Shaped[np.ndarray, " values"], counts: Shaped[np.ndarray, " values"], *, lossy: bool = False
) -> Profile:
    """The profile of real values.

    Args:
      values, counts: distinct values in any order, rescaled as the header says, and how many pixels have each.
      lossy: they were compressed with loss, which spreads padding over neighbouring values.
    """
    below = np.flatnonzero(values < _PADDING)
    keep = np.ones(len(values), bool)
    if lossy:
        keep = values >= _LOSSY_PADDING
    elif len(below):
        first = below[np.argmax(counts[below])]
        keep[first] = counts[first] < PADDING_SHARE * counts[below].sum()
    kept, pixels = values[keep], counts[keep]
    if not len(kept):
        return dataclasses.replace(EMPTY, padding=int(counts.sum()))
    places = np.clip(np.floor((kept - _LOWEST) / _STEP) + 1, 0, _BINS - 2).astype(np.int64)
    places[kept > FAR_ABOVE] = _BINS - 1
    bins = np.bincount(places, weights=pixels, minlength=_BINS).astype(np.int64)
    return Profile(bins, float(kept.min()), float(kept.max()), int(counts.sum() - pixels.sum()))


def judge(one: Profile) -> Verdict:
    """Whether a series, a volume or several slices with one rescale are in HU."""
    if one.low >= 0 or one.high < -500:  # neither air nor fat, or nothing denser than lung
        return "refuted"
    if contradicts(one):
        return "refuted"
    return "proved" if _has(one, AIR, TISSUE) else "open"


def contradicts(one: Profile) -> bool:
    """Whether even a single slice cannot be HU: much lies far below air, or air and tissue lie where a lost or repeated rescale
    moves them."""
    if one.share(LOWEST, FAR_BELOW_AIR) > FAR_BELOW_SHARE:
        return True
    return not _has(one, AIR, TISSUE) and any(_has(one, MOVED_AIR, MOVED_TISSUE, move) for move in INTERCEPTS)


def lacks_sign(one: Profile) -> bool:
    """Whether values of a slice were negative before they lost their sign."""
    return bool(one.bins[-1] > FAR_ABOVE_SHARE * one.bins.sum())


def is_ct(values: Shaped[np.ndarray, " values"], counts: Shaped[np.ndarray, " values"]) -> bool:
    """Whether a volume that names no modality is a CT in HU: proved, or it looks like part of a body without air around.

    Such a part still holds single pixels of air, and more bone than anything lighter than fat, or lung. Phase images and field
    maps are symmetric about 0.

    Args:
      values, counts: as in `profile`.
    """
    one = profile(values, counts)
    verdict = judge(one)
    if verdict != "open":
        return verdict == "proved"
    return (
        -1200 <= one.low <= -900 and one.high > 300 and one.share(-200, 200) > 0.2
        and (one.share(150, HIGHEST) > 2 * one.share(LOWEST, -150) or one.share(-950, -500) > 0.1)
    )  # fmt: skip


def _has(one: Profile, air: Peak, tissue: Peak, move: int = 0) -> bool:
    move = round(move / _STEP) * _STEP
    for low, high, share, times in (air, tissue):
        beside = max(one.share(low - (high - low) + move, low + move), one.share(high + move, 2 * high - low + move))
        found = one.share(low + move, high + move)
        if found < share or found <= times * beside:
            return False
    return True
