"""Metrics of classes, values and times to an event, and their intervals from a bootstrap over patients.

Every metric takes resampling weights, so that one vectorised call gives its value in all bootstrap draws: all cases of a
patient who is drawn twice count twice. Axes: d draws, n cases, c classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from curia_jax.evaluate import statistics
from curia_jax.evaluate.targets import Times

Weights = Float[np.ndarray, "d n"]
Scores = Float[np.ndarray, "n c"]
Targets = Int[np.ndarray, " n"]
Numbers = Float[np.ndarray, " n"]
# Of class numbers, of values, or of times to an event.
Metric = Callable[[Any, Scores, Weights], Float[np.ndarray, " d"]]

# Numbers in an array of weights at a time; 4 million float64 are 32 MB.
CHUNK = 4_000_000
FEW_PAIRED = 128  # cases of the rarer class, up to which an AUROC is counted over all pairs
# An interval from fewer patients, in all or of a class, or with a larger share of undefined draws, is doubted.
FEW, FEW_OF_CLASS, FEW_DRAWS = 10, 5, 0.05


def accuracy(targets: Targets, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Share of cases whose largest score is that of the target. NaN in draws without a case."""
    correct = (np.argmax(scores, axis=1) == targets).astype(np.float64)
    return _ratio(weights @ correct, weights.sum(axis=1))


def balanced_accuracy(targets: Targets, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Mean recall over the classes present."""
    correct = (np.argmax(scores, axis=1) == targets).astype(np.float64)
    recalls = [
        _ratio(weights[:, of_class] @ correct[of_class], weights[:, of_class].sum(axis=1))
        for of_class in (targets == label for label in np.unique(targets))
    ]
    return _mean_of_finite(np.stack(recalls, axis=1))


def auroc(targets: Targets, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Area under the ROC curve: the probability that a positive case scores above a negative one, ties counting half.

    Two classes: the difference of the two scores ranks the cases. More: macro mean of one class against the rest, over the
    classes for which there are both. NaN in draws with a single class.

    Targets may exceed the columns of `scores`: classes without a score. They are part of the rest.
    """
    classes = scores.shape[1]
    if classes == 2 and targets.max() < 2:
        return _binary_auroc(targets == 1, scores[:, 1] - scores[:, 0], weights)
    return _mean_of_finite(
        np.stack([_binary_auroc(targets == label, scores[:, label], weights) for label in range(classes)], axis=1)
    )


def _binary_auroc(
    positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " d"]:
    if min(positive.sum(), (~positive).sum()) <= FEW_PAIRED:
        # A product of matrices over all pairs is faster than sorted sums, which go through all draws several times.
        difference = score[positive, None] - score[~positive]
        ranked = (difference > 0) + 0.5 * (difference == 0)
        of_positive, of_negative = weights[:, positive], weights[:, ~positive]
        right = np.einsum("dn,dn->d", of_positive @ ranked, of_negative)
        return _ratio(right, of_positive.sum(axis=1) * of_negative.sum(axis=1))
    order = np.argsort(score, kind="stable")
    positive, weights = positive[order], weights[:, order]
    _, first, group = np.unique(score[order], return_index=True, return_inverse=True)
    negatives = np.add.reduceat(np.where(positive, 0.0, weights), first, axis=1)
    # Negatives below a case, and half of those that tie with it.
    below = (np.cumsum(negatives, axis=1) - 0.5 * negatives)[:, group[positive]]
    pairs = weights[:, positive].sum(axis=1) * negatives.sum(axis=1)
    return _ratio((weights[:, positive] * below).sum(axis=1), pairs)


def brier(targets: Targets, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Mean squared error of probabilities: of the second of two classes, or summed over more (Brier 1950).

    Targets may exceed the columns of `scores`: classes without a score, whose probability is 0.
    """
    classes = max(scores.shape[1], int(targets.max()) + 1)
    errors = np.eye(classes)[targets][:, : scores.shape[1]] - scores
    total = np.square(errors).sum(axis=1) + (targets >= scores.shape[1])
    return _ratio(weights @ (total / 2 if classes == 2 else total), weights.sum(axis=1))


def rmse(targets: Numbers, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Root of the mean squared error of the one column of `scores`."""
    return np.sqrt(_ratio(weights @ np.square(scores[:, 0] - targets), weights.sum(axis=1)))


def mae(targets: Numbers, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Mean absolute error of the one column of `scores`."""
    return _ratio(weights @ np.abs(scores[:, 0] - targets), weights.sum(axis=1))


def r2(targets: Numbers, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """1 minus the squared error over that of the mean of the same cases. NaN in draws of one value."""
    total = weights.sum(axis=1)
    mean = _ratio(weights @ targets, total)
    spread = weights @ np.square(targets) - total * np.square(mean)
    # The difference of two sums is not exactly 0 where all values are equal.
    spread = np.where(spread > 1e-12 * (weights @ np.square(targets)), spread, 0.0)
    return 1.0 - _ratio(weights @ np.square(scores[:, 0] - targets), spread)


def concordance(targets: Times, scores: Scores, weights: Weights) -> Float[np.ndarray, " d"]:
    """Harrell's C: of the pairs whose order of events is known, those in which the earlier event has the higher risk.

    A pair is known where the earlier time is an event, or both times are equal and one is an event. Equal risks count half. The
    one column of `scores` is a risk: higher is sooner.
    """
    time, event, risk = targets.time, targets.event, scores[:, 0]
    known, right = np.zeros(len(weights)), np.zeros(len(weights))
    # For each event, the cases that come later; at most 32 MB of pairs at a time.
    rows = max(1, CHUNK // len(time))
    events = np.flatnonzero(event)
    for start in range(0, len(events), rows):
        some = events[start : start + rows, None]
        later = (time > time[some]) | ((time == time[some]) & ~event)
        higher = later * (0.5 * (risk[some] >= risk) + 0.5 * (risk[some] > risk))
        of_event = weights[:, some[:, 0]]
        known += (of_event * (weights @ later.T.astype(np.float64))).sum(axis=1)
        right += (of_event * (weights @ higher.T)).sum(axis=1)
    return _ratio(right, known)


def _ratio(numerator: Float[np.ndarray, " d"], denominator: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _mean_of_finite(values: Float[np.ndarray, "d c"]) -> Float[np.ndarray, " d"]:
    finite = np.isfinite(values)
    return _ratio(np.where(finite, values, 0.0).sum(axis=1), finite.sum(axis=1).astype(np.float64))


METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "brier": brier,
}
VALUE_METRICS: dict[str, Metric] = {"rmse": rmse, "mae": mae, "r2": r2}
TIME_METRICS: dict[str, Metric] = {"c_index": concordance}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric, or a difference of two, with its 95 % interval.

    Attributes:
      value: on all cases; NaN where the metric is undefined (AUROC with one class).
      low, high: 2.5 and 97.5 percentile over the draws in which the metric is defined; NaN with fewer than two
        patients, whose resampling changes nothing.
      draws: number of bootstrap draws.
      degenerate: draws in which the metric is undefined; they are left out of the percentiles.
      partial: draws that miss a class but still define the metric, over the remaining classes.
      doubt: why the interval means little, in words; None if nothing speaks against it.
      p: of a difference, the two-sided p-value of none; NaN otherwise.
    """

    value: float
    low: float
    high: float
    draws: int
    degenerate: int
    partial: int
    doubt: str | None = None
    p: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Resampled patients, the same for every model and metric, so that differences are paired.

    Attributes:
      counts: how often each patient was drawn.
      patient: index of the patient of each case.
    """

    counts: Int[np.ndarray, "d patients"]
    patient: Int[np.ndarray, " n"]

    @classmethod
    def over(cls, patients: Shaped[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0) -> "Bootstrap":
        """Draws as many patients as there are, with replacement, `draws` times.

        Args:
          patients: patient of each case, any type that sorts.
        """
        names, patient = np.unique(patients, return_inverse=True)
        rng = np.random.default_rng(seed)
        return cls(rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws), patient)

    def restricted(self, cases: Bool[np.ndarray, " n"]) -> "Bootstrap":
        """The same draws for some of the cases, such as those of one scanner."""
        return Bootstrap(self.counts, self.patient[cases])

    def estimate(
        self,
        metric: Metric,
        targets: Targets | Numbers | Times,
        scores: Scores,
        against: Scores | None = None,
    ) -> Estimate:
        """The metric of `scores`, or its difference `scores` minus `against`, with a percentile interval.

        Args:
          targets: of each case, as the metric takes them.
          scores: of each case, as the metric takes them.
          against: scores of another model for the same cases.
        """
        values = self.values(metric, targets, scores)
        return self.interval(targets, values, None if against is None else self.values(metric, targets, against))

    def interval(
        self,
        targets: Targets | Numbers | Times,
        values: Float[np.ndarray, " draws_and_one"],
        against: Float[np.ndarray, " draws_and_one"] | None = None,
    ) -> Estimate:
        """As `estimate`, of what `values` gave for one model or for two."""
        if against is not None:
            values = values - against
        value, resampled = float(values[0]), values[1:]
        defined = np.isfinite(resampled)
        low = high = float("nan")
        patients = len(np.unique(self.patient))
        if patients > 1 and defined.any():
            low, high = (float(v) for v in np.percentile(resampled[defined], [2.5, 97.5]))
        lost = np.zeros(len(resampled), bool)
        fewest = patients
        if isinstance(targets, Times):
            fewest = len(np.unique(self.patient[targets.event]))
        elif np.issubdtype(targets.dtype, np.integer):
            of_class = [np.unique(self.patient[targets == label]) for label in np.unique(targets)]
            lost = np.any([self.counts[:, some].sum(axis=1) == 0 for some in of_class], axis=0)
            fewest = min(map(len, of_class))
        degenerate = int(np.sum(~defined))
        found = Estimate(value, low, high, len(resampled), degenerate, int(np.sum(lost & defined)))
        differs = against is not None
        p = statistics.bootstrap_p(resampled) if differs else found.p
        return dataclasses.replace(found, doubt=_doubt(found, patients, fewest, differs=differs), p=p)

    def values(
        self, metric: Metric, targets: Targets | Numbers | Times, scores: Scores
    ) -> Float[np.ndarray, " draws_and_one"]:
        """The metric on all cases, then in every draw."""
        counts = np.concatenate([np.ones_like(self.counts[:1]), self.counts])
        rows = max(1, CHUNK // len(targets))
        return np.concatenate(
            [
                metric(targets, scores, counts[start : start + rows][:, self.patient].astype(np.float64))
                for start in range(0, len(counts), rows)
            ]
        )


def _doubt(estimate: Estimate, patients: int, fewest: int, *, differs: bool) -> str | None:
    """Why the interval is unreliable; None if it is not."""
    if not np.isfinite(estimate.low):
        return None
    if patients < FEW or fewest < FEW_OF_CLASS:
        of_class = f", and {fewest} of the rarest class" if fewest < patients else ""
        return f"{patients} resampled groups{of_class} are too few for an interval"
    if estimate.low == estimate.high and not differs:
        return "every draw gives the same value, so that the interval has no width"
    if estimate.degenerate > FEW_DRAWS * estimate.draws:
        return f"the metric is undefined in {estimate.degenerate} of {estimate.draws} draws"
    return None
