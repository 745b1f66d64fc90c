"""Tests of differences, and corrections for many tasks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two AUROCs on the same cases, with its 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def delong(
    positive: Bool[np.ndarray, " n"], first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]
) -> Difference:
    """AUROC of `first` minus that of `second` by DeLong's method, for independent cases: one of each patient.

    DeLong et al. 1988 (doi 10.2307/2531595), by midranks as in Sun and Xu 2014 (doi 10.1109/LSP.2014.2337313).

    Raises:
      ValueError: fewer than two positive or two negative cases.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if min(positives, negatives) < 2:
        raise ValueError(
            f"DeLong's method needs 2 positive and 2 negative cases; there are {positives} and {negatives}"
        )
    areas, of_positive, of_negative = [], [], []
    for scores in (first, second):
        ranks = scipy.stats.rankdata(scores)
        # Share of the negatives below each positive case, and of the positives above each negative one.
        below = (ranks[positive] - scipy.stats.rankdata(scores[positive])) / negatives
        above = 1 - (ranks[~positive] - scipy.stats.rankdata(scores[~positive])) / positives
        areas.append(below.mean())
        of_positive.append(below)
        of_negative.append(above)
    value = float(areas[0] - areas[1])
    variance = (
        np.var(of_positive[0] - of_positive[1], ddof=1) / positives
        + np.var(of_negative[0] - of_negative[1], ddof=1) / negatives
    )
    error = float(np.sqrt(variance))
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0)
    reach = float(scipy.stats.norm.ppf(0.975)) * error
    return Difference(value, value - reach, value + reach, float(2 * scipy.stats.norm.sf(abs(value) / error)))


def bootstrap_p(differences: Float[np.ndarray, " draws"]) -> float:
    """Two-sided p-value of no difference: twice the smaller share of draws on either side of 0, at least 1 / draws.

    Draws in which the difference is undefined are left out; NaN without any.
    """
    defined = differences[np.isfinite(differences)]
    if not len(defined):
        return float("nan")
    tail = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(defined) + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tasks, corrected so that the chance of any false finding among them holds (Holm 1979).

    An undefined p-value (NaN) stays, and does not count as a task.
    """
    adjusted, largest = [float("nan")] * len(p), 0.0
    defined = sorted((value, number) for number, value in enumerate(p) if np.isfinite(value))
    for rank, (value, number) in enumerate(defined):
        largest = max(largest, min(1.0, (len(defined) - rank) * value))
        adjusted[number] = largest
    return adjusted
