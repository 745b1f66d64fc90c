"""Probes: small classifiers on frozen features. Each chooses its settings on held-out cases, then is refitted on all
training and validation cases.

A probe takes a `Bank` (features and labels to learn from, with the folds for choosing settings) and the features of the
test cases. It never gets a test label.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from curia_jax.evaluate import metrics
from curia_jax.evaluate.labels import selection_on_validation
from curia_jax.evaluate.results import Setting

# A feature that varies less than this is constant; dividing by its deviation would amplify rounding errors.
_CONSTANT = 1e-6

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# Relative to the number of cases, so that the sweep means the same for ten cases and for a million. From strong to weak, as
# the next: of equally good settings the first is taken.
RIDGE_PENALTIES = tuple(10.0 ** (half / 2) for half in range(8, -11, -1))
# Half decades from 10^-6 to 10^5, the range of facebookresearch/dinov3's logistic regression.
INVERSE_PENALTIES = tuple(10.0 ** (half / 2) for half in range(-12, 11))


@dataclasses.dataclass(frozen=True)
class Bank:
    """The cases that a probe learns from.

    Attributes:
      features: one row per case.
      labels: class numbers, 0 … classes - 1; a class may be absent.
      classes: number of classes.
      folds: pairs of case numbers (fit, held out) for choosing settings.
      selection: how the folds were made, for the results.
    """

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    classes: int
    folds: tuple[tuple[Int[np.ndarray, " _fit"], Int[np.ndarray, " _held"]], ...]  # of different sizes
    selection: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A probe's result for the test cases.

    Attributes:
      scores: one per test case and class; larger is likelier.
      chosen: the settings chosen on the held-out cases.
      selection_score: macro AUROC of the chosen settings on the held-out cases.
    """

    scores: Float[np.ndarray, "queries classes"]
    chosen: Setting
    selection_score: float


Probe = Callable[[Bank, Float[np.ndarray, "queries d"]], Prediction]
Numbers = Int[np.ndarray, " fit"]
Features = Float[np.ndarray, "queries d"]
Scores = Float[np.ndarray, "queries classes"]


def bank(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    patients: Shaped[np.ndarray, " n"],
    held_out: Shaped[np.ndarray, " n"],
    *,
    classes: int,
    seed: int = 0,
    groups: str = "patients",
) -> Bank:
    """A bank whose settings are chosen on the cases marked `held_out`, the validation split.

    Where these lack a class of the other cases, or there are none, settings are chosen by cross-validation over patients
    in 5 folds (fewer with fewer patients of the rarest class), training and validation cases together.

    Args:
      labels, patients: at least two classes, each of several patients, as `labels.task` has checked.
      groups: what counts as a patient, in words.
    """
    held_out = np.asarray(held_out, bool)
    if selection_on_validation(labels[~held_out], labels[held_out]):
        folds = ((np.flatnonzero(~held_out), np.flatnonzero(held_out)),)
        return Bank(features, labels, classes, folds, "validation split")
    per_class = [len(np.unique(patients[labels == label])) for label in np.unique(labels)]
    count = min(5, *per_class)
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(features, labels, patients)
    return Bank(features, labels, classes, tuple(folds), f"{count}-fold over {groups}")


def knn(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """k nearest neighbours by cosine similarity, weighted by softmax(similarity / 0.07), as in facebookresearch/dinov3.

    Chosen on the held-out cases: k of NEIGHBOURS (up to the size of the bank), and whether features are standardised before
    they are scaled to length 1.
    """
    smallest = min(len(fit) for fit, _ in bank.folds)
    neighbours = [k for k in NEIGHBOURS if k <= smallest] or [smallest]
    settings: list[Setting] = [
        {"k": k, "standardised": standardised} for standardised in (True, False) for k in neighbours
    ]

    def predict(fit: Numbers, held: Features, settings: list[Setting]) -> list[Scores]:
        prepared = {
            flag: _standardise(bank.features[fit], held) if flag else (bank.features[fit], held)
            for flag in {setting["standardised"] for setting in settings}
        }
        votes = {flag: _vote(x, bank.labels[fit], q, neighbours, bank.classes) for flag, (x, q) in prepared.items()}
        return [votes[bool(setting["standardised"])][int(setting["k"])] for setting in settings]

    return _choose_and_predict(bank, queries, settings, predict)


def _vote(
    x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], queries: Features, neighbours: list[int], classes: int
) -> dict[int, Scores]:
    """Scores of the queries for every number of neighbours."""
    bank, queries = jnp.asarray(_unit(x)), _unit(queries)
    one_hot = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    # At most 64 MB of similarities at a time.
    rows = max(1, 16_000_000 // len(x))
    parts = [_vote_rows(bank, one_hot, queries[i : i + rows], tuple(neighbours)) for i in range(0, len(queries), rows)]
    return {k: np.concatenate([np.asarray(part[j]) for part in parts]) for j, k in enumerate(neighbours)}


@functools.partial(jax.jit, static_argnums=3)
def _vote_rows(
    x: Float[Array, "n d"],
    one_hot: Float[Array, "n classes"],
    queries: Float[Array, "q d"],
    neighbours: tuple[int, ...],
) -> list[Float[Array, "q classes"]]:
    similarity = jnp.matmul(queries, x.T, precision="highest")
    nearest, index = jax.lax.top_k(similarity, max(neighbours))
    votes = jax.nn.softmax(nearest / TEMPERATURE, axis=1)[:, :, None] * one_hot[index]
    sums = jnp.cumsum(votes, axis=1)
    return [sums[:, k - 1] / jnp.sum(sums[:, k - 1], axis=1, keepdims=True) for k in neighbours]


def ridge(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """Least squares on standardised features with targets -1 and +1 and a squared penalty, none on the intercept.

    Chosen on the held-out cases: the penalty, of RIDGE_PENALTIES. One eigendecomposition, of the smaller of the two
    Gram matrices, serves the whole sweep (google-research/big_vision `fewshot_lsr.py`; there the intercept is a
    penalised column of 100). Float64, on the default device.
    """

    def predict(fit: Numbers, held: Features, settings: list[Setting]) -> list[Scores]:
        x, q = _standardise(bank.features[fit], held)
        penalties = len(fit) * np.array([setting["penalty_per_case"] for setting in settings])
        with jax.enable_x64(True):
            targets = 2.0 * jax.nn.one_hot(bank.labels[fit], bank.classes, dtype=jnp.float64) - 1.0
            return list(np.asarray(_ridge_scores(jnp.asarray(x), targets, jnp.asarray(q), jnp.asarray(penalties))))

    settings: list[Setting] = [{"penalty_per_case": penalty} for penalty in RIDGE_PENALTIES]
    return _choose_and_predict(bank, queries, settings, predict)


@jax.jit
def _ridge_scores(
    x: Float[Array, "n d"],
    targets: Float[Array, "n classes"],
    queries: Float[Array, "q d"],
    penalties: Float[Array, " sweep"],
) -> Float[Array, "sweep q classes"]:
    mean = jnp.mean(targets, axis=0)
    targets = targets - mean
    if x.shape[0] >= x.shape[1]:
        # queries (x'x + p)^-1 x' targets
        values, vectors = jnp.linalg.eigh(x.T @ x)
        left, right = queries @ vectors, vectors.T @ (x.T @ targets)
    else:
        # queries x' (x x' + p)^-1 targets, which is equal
        values, vectors = jnp.linalg.eigh(x @ x.T)
        left, right = (queries @ x.T) @ vectors, vectors.T @ targets
    return jax.lax.map(lambda penalty: (left / (values + penalty)) @ right + mean, penalties)


def logistic(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """Multinomial logistic regression (scikit-learn, L-BFGS, float64) on standardised features.

    Chosen on the held-out cases: C, the inverse penalty, of INVERSE_PENALTIES.
    """

    def predict(fit: Numbers, held: Features, settings: list[Setting]) -> list[Scores]:
        labels = bank.labels[fit]
        x, q = _rotate(*_standardise(bank.features[fit], held))
        present = np.unique(labels)
        if len(present) == 1:
            return [np.tile(np.eye(bank.classes)[present[0]], (len(held), 1))] * len(settings)
        # From strong to weak penalty, each fit starting from the last.
        model = LogisticRegression(max_iter=1000, tol=1e-6, warm_start=True)
        scores = []
        for setting in settings:
            model.set_params(C=setting["C"])
            # Hundreds of small matmuls per fit: synchronising threads costs more than they save, on a busy machine fifty
            # times as much.
            with warnings.catch_warnings(), threadpool_limits(1, "blas"):
                # With hardly any penalty on separable cases there is no optimum to converge to; such a fit is used all the
                # same if it ranks the held-out cases best.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x, labels)
            scores.append(np.zeros((len(q), bank.classes)))
            scores[-1][:, model.classes_] = model.predict_proba(q)
        return scores

    return _choose_and_predict(bank, queries, [{"C": c} for c in INVERSE_PENALTIES], predict)


def _choose_and_predict(
    bank: Bank,
    queries: Features,
    settings: list[Setting],
    predict: Callable[[Numbers, Features, list[Setting]], list[Scores]],
) -> Prediction:
    """The setting with the best macro AUROC on the held-out cases of all folds together, fitted on the whole bank.

    Ties go to the higher accuracy, then to the earlier setting.

    Args:
      predict: (numbers of the cases to fit, features to score, settings) -> scores for each setting.
    """
    held = np.concatenate([held for _, held in bank.folds])
    parts = [predict(fit, bank.features[held], settings) for fit, held in bank.folds]
    one = np.ones((1, len(held)))
    ranked = []
    for number in range(len(settings)):
        scores = np.concatenate([part[number] for part in parts])
        area, right = (float(metric(bank.labels[held], scores, one)[0]) for metric in (metrics.auroc, metrics.accuracy))
        ranked.append((area, right, -number))
    area, _, number = max(ranked)
    chosen = settings[-number]
    return Prediction(predict(np.arange(len(bank.labels)), queries, [chosen])[0], chosen, area)


def _standardise(x: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0 and deviation 1 of every feature over `x`, float64; the same for the queries."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > _CONSTANT * np.maximum(1.0, np.abs(mean))
    scale = np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
    return (x - mean) * scale, (queries - mean) * scale


def _rotate(x: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"]) -> tuple[np.ndarray, np.ndarray]:
    """With more features than cases, the coordinates in the space that the cases span.

    A squared penalty is invariant to rotations and leaves no weight outside that space: the fit is equal and cheaper.
    """
    if x.shape[1] <= x.shape[0]:
        return x, queries
    _, _, basis = np.linalg.svd(x, full_matrices=False)
    return x @ basis.T, queries @ basis.T


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def majority(labels: Int[np.ndarray, " n"], classes: int, queries: int) -> Float[np.ndarray, "queries classes"]:
    """The baseline without an image: every case gets the class frequencies of the training cases as scores."""
    return np.tile(np.bincount(labels, minlength=classes) / len(labels), (queries, 1))
