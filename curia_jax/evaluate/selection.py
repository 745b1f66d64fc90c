"""How a head's settings are chosen: by the loss on held-out cases, then the head is fitted on all of them.

A head takes a `Bank` (features and targets to learn from, with the folds for choosing settings) and the features of the
test cases. It never gets a test target.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int, Shaped
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from curia_jax.evaluate import metrics
from curia_jax.evaluate.labels import selection_on_validation
from curia_jax.evaluate.results import Setting
from curia_jax.evaluate.targets import Classes, Targets, Times, Values
from curia_jax.evaluate.tokens import Tokens

Numbers = Int[np.ndarray, " fit"]
Features = Float[np.ndarray, "queries d"]
Scores = Float[np.ndarray, "queries outputs"]

# Powers of the inverse class frequency that weigh probabilities of more than two classes; see `decision_weights`.
_POWERS = (1.0, 0.75, 1.25, 0.5, 1.5, 0.25, 0.0)
# How strongly a `Scaling` is held at slope 1 and no prior, in cases.
_SCALING_PENALTY = 0.1


@dataclasses.dataclass(frozen=True)
class Bank:
    """The cases that a head learns from.

    Attributes:
      features: one row, or one list of tokens, per case.
      targets: of each case.
      folds: pairs of case numbers (fit, held out) for choosing settings.
      selection: how the folds were made, for the results.
      units: what decisions are about, by number: the series of each row; None where that is the row itself.
    """

    features: Float[np.ndarray, "n d"] | Tokens
    targets: Targets
    folds: tuple[tuple[Int[np.ndarray, " _fit"], Int[np.ndarray, " _held"]], ...]  # of different sizes
    selection: str
    units: Int[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A head's result for the test cases.

    Attributes:
      predict: gives `scores`.
      decision: weights of the classes, chosen on the held-out cases; the class with the largest probability times weight is
        the decision that balances recalls. Ones for values and times.
      chosen: the settings chosen on the held-out cases.
      selection_loss: log loss, squared error or negative log partial likelihood of the chosen settings, mean over the held-out
        cases; NaN without any.
      selection_score: their macro AUROC; NaN for values and times, and without held-out cases.
    """

    predict: Callable[[], Scores]
    decision: Float[np.ndarray, " outputs"]
    chosen: Setting
    selection_loss: float
    selection_score: float

    @functools.cached_property
    def scores(self) -> Scores:
        """Class probabilities, one value or one log risk per test case.

        The head is fitted on the whole bank when they are first asked for: of several readouts, only the best one is.
        """
        return self.predict()


Head = Callable[[Bank, Any], Prediction]  # features or tokens of the test cases


def bank(
    features: Float[np.ndarray, "n d"] | Tokens,
    targets: Targets,
    patients: Shaped[np.ndarray, " n"],
    held_out: Shaped[np.ndarray, " n"],
    *,
    seed: int = 0,
    groups: str = "patients",
    units: Int[np.ndarray, " n"] | None = None,
) -> Bank:
    """A bank whose settings are chosen on the cases marked `held_out`, the validation split.

    Where these lack a class of the other cases, or there are none, settings are chosen by cross-validation over patients
    in 5 folds (fewer with fewer patients, of the rarest class), training and validation cases together. With a single patient of
    a class nothing can be chosen, and there are no folds.

    Args:
      targets: classes are at least two.
      groups: what counts as a patient, in words.
      units: see `Bank`.
    """
    held_out = np.asarray(held_out, bool)
    if isinstance(targets, Values):
        usable, per_class, split = 1 < held_out.sum() < len(targets) - 1, [len(np.unique(patients))], GroupKFold
    else:
        strata = targets.strata
        usable = selection_on_validation(strata[~held_out], strata[held_out])
        needed = [1] if isinstance(targets, Times) else np.unique(strata)
        per_class = [len(np.unique(patients[strata == label])) for label in needed]
        split = StratifiedGroupKFold
    if usable:
        folds = ((np.flatnonzero(~held_out), np.flatnonzero(held_out)),)
        return Bank(features, targets, folds, "validation split", units)
    count = min(5, *per_class)
    if count < 2:
        return Bank(features, targets, (), "default settings (too few patients to choose)", units)
    folds = split(count, shuffle=True, random_state=seed).split(features, targets.strata, patients)
    return Bank(features, targets, tuple(folds), f"{count}-fold over {groups}", units)


def choose_and_predict(
    bank: Bank,
    queries: Features | Tokens,
    settings: Sequence[Setting],
    predict: Callable[[Numbers, Any, Sequence[Setting]], Iterable[Scores]],
    *,
    default: Setting,
    probabilities: bool = True,
    patience: int | None = None,
) -> Prediction:
    """The setting with the smallest loss on the held-out cases of all folds together, fitted on the whole bank.

    The loss is proper (log loss, squared error): a setting that calls every case negative does not win by its order of the
    cases. Ties go to the earlier setting.

    Args:
      predict: (numbers of the cases to fit, features to score, settings) -> scores for each setting.
      default: the setting where the bank has no folds.
      probabilities: whether scores of classes are probabilities; others become so by a `Scaling`.
      patience: the sweep ends after as many settings in a row that are worse than the best before them; None tries all.
    """
    outputs = bank.targets.count if isinstance(bank.targets, Classes) else 1

    def fitted(setting: Setting, scaling: Scaling | None) -> Scores:
        (scores,) = predict(np.arange(len(bank.targets)), queries, [setting])
        return scaling(scores) if scaling else scores

    if not bank.folds:
        weights, scaling = np.ones(outputs), None
        if isinstance(bank.targets, Classes):
            frequencies = bank.targets.frequencies
            weights = 1 / np.where(frequencies > 0, frequencies, 1.0)
            scaling = None if probabilities else Scaling(1.0, 0.0, frequencies)
        return Prediction(lambda: fitted(default, scaling), weights, default, float("nan"), float("nan"))
    held = np.concatenate([held for _, held in bank.folds])
    targets = bank.targets[held]
    best, loss, held_scores, scaling = 0, float("inf"), np.zeros((0, 0)), None
    sweeps = [predict(fit, bank.features[held], settings) for fit, held in bank.folds]
    for number, parts in enumerate(zip(*sweeps, strict=True)):
        scores = np.concatenate(parts)
        found = None if probabilities or not isinstance(targets, Classes) else Scaling.fit(scores, targets)
        scores = found(scores) if found else scores
        mean = targets.loss(scores) / len(targets)
        if mean < loss:
            best, loss, held_scores, scaling = number, mean, scores, found
        elif patience is not None and number - best >= patience:
            break
    chosen = dict(settings[best])
    if scaling:
        chosen |= {"slope": scaling.slope, "prior": scaling.prior}

    def scores_of_best() -> Scores:
        return fitted(settings[best], scaling)

    if not isinstance(targets, Classes):
        return Prediction(scores_of_best, np.ones(outputs), chosen, loss, float("nan"))
    area = float(metrics.auroc(targets.labels, held_scores, np.ones((1, len(targets))))[0])
    decided = (targets, held_scores) if bank.units is None else by_unit(targets, held_scores, bank.units[held])
    return Prediction(scores_of_best, decision_weights(*decided), chosen, loss, area)


def by_unit(
    targets: Classes, scores: Scores, units: Int[np.ndarray, " n"]
) -> tuple[Classes, Float[np.ndarray, "u classes"]]:
    """Mean scores of the rows of each unit; rows of another class are another unit."""
    _, first, unit = np.unique(units * targets.count + targets.labels, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), scores.shape[1]))
    np.add.at(sums, unit, scores)
    return targets[first], sums / np.bincount(unit)[:, None]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Turns scores into probabilities: softmax(slope * scores + prior * log(frequencies)).

    Platt's scaling with one slope for all classes, so that it can be fitted on few cases.
    """

    slope: float
    prior: float
    frequencies: Float[np.ndarray, " classes"]

    @classmethod
    def fit(cls, scores: Float[np.ndarray, "n classes"], targets: Classes) -> "Scaling":
        """Slope and prior with the smallest log loss, held at 1 and 0 by a weak squared penalty."""
        frequencies = targets.frequencies
        log_frequencies: Float[np.ndarray, " classes"] = np.log(np.maximum(frequencies, 1 / (len(targets) + 1)))
        rows = np.arange(len(targets))

        def loss(point: Float[np.ndarray, "2"]) -> tuple[float, Float[np.ndarray, "2"]]:
            logits = point[0] * scores + point[1] * log_frequencies
            normaliser = scipy.special.logsumexp(logits, axis=1)
            surplus = np.exp(logits - np.expand_dims(normaliser, 1))
            surplus[rows, targets.labels] -= 1
            offset = point - (1.0, 0.0)
            value = float((normaliser - logits[rows, targets.labels]).sum() + _SCALING_PENALTY * (offset**2).sum())
            slopes = np.array([(surplus * scores).sum(), (surplus.sum(axis=0) * log_frequencies).sum()])
            return value, slopes + 2 * _SCALING_PENALTY * offset

        found = scipy.optimize.minimize(
            loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)]
        )
        return cls(float(found.x[0]), float(found.x[1]), frequencies)

    def __call__(self, scores: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
        present = self.frequencies > 0
        prior = np.log(self.frequencies, out=np.full(len(present), -np.inf), where=present)
        return scipy.special.softmax(self.slope * scores + np.where(present, self.prior * prior, prior), axis=1)


def decision_weights(targets: Classes, probabilities: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, " classes"]:
    """Weights of the classes with which the largest probability times weight has the best mean recall in these cases.

    Two classes: any threshold of the second, half way between two cases; of equally good ones the closest to the frequency of the
    class, which is the best one for exact probabilities. More: inverse frequencies to one of _POWERS.
    """
    frequencies = targets.frequencies
    present = frequencies > 0
    if present.sum() < 2:
        return np.ones(len(frequencies))
    if len(frequencies) == 2:
        positive, score = targets.labels == 1, probabilities[:, 1]
        order = np.unique(score)
        thresholds = np.concatenate([(order[1:] + order[:-1]) / 2, frequencies[1:]])
        # Of the sorted scores of a class, how many are at or above each threshold, and below it.
        recalls = [
            1 - np.searchsorted(np.sort(score[positive]), thresholds) / positive.sum(),
            np.searchsorted(np.sort(score[~positive]), thresholds) / (~positive).sum(),
        ]
        mean = np.round(np.mean(recalls, axis=0), 12)
        good = thresholds[mean == mean.max()]
        distance = np.abs(scipy.special.logit(good) - scipy.special.logit(frequencies[1]))
        threshold = good[np.argmin(distance)]
        return np.array([threshold, 1 - threshold])
    one = np.ones((1, len(targets)))
    best, chosen = -1.0, np.ones(len(frequencies))
    for power in _POWERS:
        weights = np.where(present, np.where(present, frequencies, 1.0) ** -power, 1.0)
        recall = float(metrics.balanced_accuracy(targets.labels, probabilities * weights, one)[0])
        if recall > best + 1e-12:
            best, chosen = recall, weights
    return chosen
