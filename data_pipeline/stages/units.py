"""In which units the slices of a series are, and how that is known: the pixels prove it, the header declares it, or it is guessed.

`sources.hu` judges values; here its judgement is applied to each rescale of a series and to each slice, because one file of a
series can have lost its rescale, and another have it applied already.
"""

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.sources import hu
from data_pipeline.sources.base import Slice

Evidence = Literal["proved", "declared", "guessed"]

NO_HU = "values are not HU"
UNLIKE_SERIES = "values are not HU, unlike those of the other slices"
UNKNOWN_UNITS = (
    "nothing says that values are HU: the header gives no rescale to HU, and air and tissue are not where HU have them"
)
WITHOUT_SIGN = f"values above {hu.FAR_ABOVE:,} HU, which were negative: padding that the header does not declare, or a sign that it does not state"
HU_IN_MR = "values are HU though the modality is MR"
REFUSED = frozenset({NO_HU, UNLIKE_SERIES, UNKNOWN_UNITS, WITHOUT_SIGN, HU_IN_MR})
SEVERAL_SCALES = "slices with several rescale slopes"  # a problem, not a reason: their values are right

# A slice of a body in air shows air. Where half of the slices have at least this share below -200 HU, one that has no value
# below 0 is not in HU.
AIR_SHARE = 0.02
# Of the pixels of an MR series for air, and for tissue, to lie where CT has them.
HU_IN_MR_SHARE = 0.1


class SliceValues(NamedTuple):
    """What is known of the values of a slice.

    Attributes:
      profile: where they lie, real values.
      rescale: slope and intercept of the source; None where the header does not say that they lead to HU.
    """

    profile: hu.Profile
    rescale: tuple[float, float] | None


class Judgement(NamedTuple):
    """`reasons` says for each slice why it is left out; None where it is kept."""

    evidence: Evidence
    reasons: list[str | None]


def slice_values(item: Slice, histogram: Int[np.ndarray, " levels"], *, lossy: bool) -> SliceValues:
    """What is known of a slice whose stored values have this histogram.

    Padding, and what was raised to -1024 HU, count with their values before.
    """
    stored = np.flatnonzero(histogram)
    values, counts = stored * item.slope + item.intercept, histogram[stored].copy()
    if item.below or item.padded:
        counts[0] = max(0, counts[0] - item.padded - sum(count for _, count in item.below))
        below = np.array(item.below, np.float64).reshape(-1, 2)
        values, counts = np.append(below[:, 0], values), np.append(below[:, 1].astype(np.int64), counts)
        values, counts = values[counts > 0], counts[counts > 0]
    return SliceValues(hu.profile(values, counts, lossy=lossy), item.rescale)


def judge_ct(slices: Sequence[SliceValues], *, inferred: bool) -> Judgement:
    """Whether the slices of a series are in HU.

    Args:
      inferred: neither the source nor the user says that it is CT; the range of its values did.
    """
    groups: dict[tuple[float, float] | None, hu.Profile] = collections.defaultdict(lambda: hu.EMPTY)
    for one in slices:
        groups[one.rescale] += one.profile
    verdicts = {rescale: hu.judge(profile) for rescale, profile in groups.items()}
    proved = [one.profile for one in slices if verdicts[one.rescale] == "proved"]
    if inferred:  # from these very values, by the same rule
        return Judgement("proved" if proved else "guessed", [None] * len(slices))
    without_sign = [WITHOUT_SIGN if hu.lacks_sign(one.profile) else None for one in slices]
    if proved:
        air = float(np.median([one.share(hu.LOWEST, -200) for one in proved]))
        contradicted = {rescale for rescale, profile in groups.items() if _contradicts(profile, air)}
        unproved = {rescale for rescale, verdict in verdicts.items() if rescale is None and verdict != "proved"}
        reasons = [
            lost or (
                UNLIKE_SERIES if one.rescale in contradicted or _contradicts(one.profile, air)
                else UNKNOWN_UNITS if one.rescale in unproved else None
            )
            for one, lost in zip(slices, without_sign, strict=True)
        ]  # fmt: skip
        return Judgement("proved", reasons)
    by_group = {
        rescale: NO_HU if verdict == "refuted" else UNKNOWN_UNITS if rescale is None else None
        for rescale, verdict in verdicts.items()
    }
    reasons = [
        lost or by_group[one.rescale] or (NO_HU if hu.contradicts(one.profile) else None)
        for one, lost in zip(slices, without_sign, strict=True)
    ]
    return Judgement("declared", reasons)


def judge_mr(slices: Sequence[SliceValues], *, inferred: bool) -> Judgement:
    """Whether the slices of a series are MR: its values must not be HU."""
    if inferred:
        return Judgement("guessed", [None] * len(slices))
    total = sum((one.profile for one in slices), hu.EMPTY)
    air, tissue = total.share(-1050, -950), total.share(-150, 150)
    is_hu = min(air, tissue) > HU_IN_MR_SHARE and hu.judge(total) != "refuted"
    return Judgement("declared", [HU_IN_MR if is_hu else None] * len(slices))


def _contradicts(profile: hu.Profile, air: float) -> bool:
    return hu.contradicts(profile) or (profile.low >= 0 and air >= AIR_SHARE)
