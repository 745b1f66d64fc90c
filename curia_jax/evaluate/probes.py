"""Probes: small models on frozen features, by the contract of `selection`."""

import functools
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from curia_common.errors import UserError
from curia_jax.evaluate import survival
from curia_jax.evaluate.results import Setting
from curia_jax.evaluate.selection import Bank, Features, Numbers, Prediction, Scores, choose_and_predict
from curia_jax.evaluate.targets import Classes, Targets, Times, Values
from curia_jax.evaluate.tokens import Tokens

# A feature that varies less than this is constant; dividing by its deviation would amplify rounding errors.
_CONSTANT = 1e-6

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# Relative to the number of cases, so that the sweep means the same for ten cases and for a million. From strong to weak, as
# the next: of equally good settings the first is taken.
RIDGE_PENALTIES = tuple(10.0 ** (half / 2) for half in range(8, -11, -1))
# Half decades from 10^-6 to 10^5, the range of facebookresearch/dinov3's logistic regression.
COX_PENALTIES = tuple(10.0 ** (half / 2) for half in range(4, -9, -1))
_PATIENCE = 3
# Up to so many coefficients logistic regression is fitted by Newton's method, exactly and fastest; the factorisation of the
# Hessian is cubic in them. Above, L-BFGS ends where no gradient of the mean loss is larger than _TOLERANCE, and in the sweep
# than _SWEEP_TOLERANCE, which moves the loss on the held-out cases by less than the next penalty does, at a third of the cost.
NEWTON_COEFFICIENTS = 1000
_EXACT, _TOLERANCE, _SWEEP_TOLERANCE = 1e-9, 1e-6, 1e-4
INVERSE_PENALTIES = tuple(10.0 ** (half / 2) for half in range(-12, 11))


def knn(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """k nearest neighbours by cosine similarity of standardised features, weighted by softmax(similarity / 0.07).

    The weights are those of facebookresearch/dinov3. One more neighbour has the class frequencies, or the mean value, of the
    cases, so that no probability is 0. Chosen on the held-out cases: k of NEIGHBOURS, up to the number of cases; where nothing
    can be chosen, their square root.
    """
    smallest = min((len(fit) for fit, _ in bank.folds), default=len(bank.targets))
    neighbours = [k for k in NEIGHBOURS if k <= smallest] or [smallest]

    features = _features(bank)

    def predict(fit: Numbers, held: Features, settings: Sequence[Setting]) -> list[Scores]:
        targets = _columns(bank, fit)
        ks = tuple(int(setting["k"]) for setting in settings)
        votes = _vote(*_standardise(features[fit], held), targets, ks)
        return [(k * vote + targets.mean(axis=0)) / (k + 1) for k, vote in zip(ks, votes, strict=True)]

    return choose_and_predict(
        bank, queries, [{"k": k} for k in neighbours], predict, default={"k": max(1, round(len(bank.targets) ** 0.5))}
    )


def _columns(bank: Bank, fit: Numbers) -> Float[np.ndarray, "fit outputs"]:
    """Classes one-hot, or the values."""
    targets = bank.targets[fit]
    if isinstance(targets, Times):
        raise UserError("kNN and ridge do not learn times to an event; use cox")
    return np.eye(targets.count)[targets.labels] if isinstance(targets, Classes) else targets.values[:, None]


def _vote(
    x: Float[np.ndarray, "n d"], queries: Features, targets: Float[np.ndarray, "n outputs"], neighbours: tuple[int, ...]
) -> list[Scores]:
    """Weighted means of the neighbours' targets, for each number of neighbours."""
    bank, queries = jnp.asarray(_unit(x)), _unit(queries)
    columns = jnp.asarray(targets, jnp.float32)
    # At most 64 MB of similarities at a time.
    rows = max(1, 16_000_000 // len(x))
    parts = [_vote_rows(bank, columns, queries[i : i + rows], neighbours) for i in range(0, len(queries), rows)]
    return [np.concatenate([np.asarray(part[j], np.float64) for part in parts]) for j in range(len(neighbours))]


@functools.partial(jax.jit, static_argnums=3)
def _vote_rows(
    x: Float[Array, "n d"],
    targets: Float[Array, "n outputs"],
    queries: Float[Array, "q d"],
    neighbours: tuple[int, ...],
) -> list[Float[Array, "q outputs"]]:
    similarity = jnp.matmul(queries, x.T, precision="highest")
    nearest, index = jax.lax.top_k(similarity, max(neighbours))
    weights = jax.nn.softmax(nearest / TEMPERATURE, axis=1)
    sums = jnp.cumsum(weights[:, :, None] * targets[index], axis=1)
    totals = jnp.cumsum(weights, axis=1)
    return [sums[:, k - 1] / totals[:, k - 1, None] for k in neighbours]


def ridge(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """Least squares on standardised features with a squared penalty, none on the intercept.

    Targets are -1 and +1 for classes, whose scores become probabilities by a `Scaling`, or the values. Chosen on the held-out
    cases: the penalty, of RIDGE_PENALTIES. One eigendecomposition, of the smaller of the two Gram matrices, serves the whole
    sweep (google-research/big_vision `fewshot_lsr.py`; there the intercept is a penalised column of 100). Float64, on the
    default device.
    """

    features = _features(bank)

    def predict(fit: Numbers, held: Features, settings: Sequence[Setting]) -> list[Scores]:
        x, q = _standardise(features[fit], held)
        penalties = len(fit) * np.array([setting["penalty_per_case"] for setting in settings])
        targets = _columns(bank, fit)
        targets = 2.0 * targets - 1.0 if isinstance(bank.targets, Classes) else targets
        with jax.enable_x64(True):
            return list(np.asarray(_ridge_scores(*map(jnp.asarray, (x, targets, q, penalties)))))

    settings: list[Setting] = [{"penalty_per_case": penalty} for penalty in RIDGE_PENALTIES]
    default: Setting = {"penalty_per_case": 1.0}
    return choose_and_predict(bank, queries, settings, predict, default=default, probabilities=False)


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
    """Multinomial logistic regression (scikit-learn, Newton's method or L-BFGS, float64) on standardised features.

    Chosen on the held-out cases: C, the inverse penalty, of INVERSE_PENALTIES from strong to weak, until _PATIENCE in a row are
    worse.
    """
    targets = bank.targets
    if not isinstance(targets, Classes):
        raise UserError("logistic regression learns classes; use ridge for values, and cox for times to an event")

    features = _features(bank)

    def predict(fit: Numbers, held: Features, settings: Sequence[Setting]) -> Iterator[Scores]:
        labels = targets.labels[fit]
        x, q = _rotate(*_standardise(features[fit], held))
        present = np.unique(labels)
        # From strong to weak penalty, each fit starting from the last.
        coefficients = x.shape[1] * (len(present) if len(present) > 2 else 1)
        if coefficients <= NEWTON_COEFFICIENTS:
            solver, tolerance = "newton-cholesky", _EXACT
        else:
            solver, tolerance = "lbfgs", _TOLERANCE if len(settings) == 1 else _SWEEP_TOLERANCE
        model = LogisticRegression(solver=solver, max_iter=1000, tol=tolerance, warm_start=True)
        for setting in settings:
            scores = np.zeros((len(q), targets.count))
            scores[:, present] = 1.0
            # Hundreds of small matmuls per fit: synchronising threads costs more than they save, on a busy machine fifty
            # times as much.
            with warnings.catch_warnings(), threadpool_limits(1, "blas"):
                # With hardly any penalty on separable cases there is no optimum to converge to; such a fit is used all the
                # same if its loss on the held-out cases is the smallest.
                warnings.simplefilter("ignore", ConvergenceWarning)
                warnings.simplefilter("ignore", LinAlgWarning)  # then scikit-learn continues with L-BFGS
                if len(present) > 1:
                    scores[:, present] = model.set_params(C=setting["C"]).fit(x, labels).predict_proba(q)
            yield scores

    settings: list[Setting] = [{"C": c} for c in INVERSE_PENALTIES]
    return choose_and_predict(bank, queries, settings, predict, default={"C": 1.0}, patience=_PATIENCE)


def cox(bank: Bank, queries: Float[np.ndarray, "queries d"]) -> Prediction:
    """Cox regression on standardised features with a squared penalty; ties by Efron's method. Scores are log risks.

    Chosen on the held-out cases: the penalty, of COX_PENALTIES from strong to weak, until _PATIENCE in a row are worse.
    """
    targets = bank.targets
    if not isinstance(targets, Times):
        raise UserError("cox learns times to an event; use ridge for values, and logistic for classes")

    features = _features(bank)

    def predict(fit: Numbers, held: Features, settings: Sequence[Setting]) -> Iterator[Scores]:
        x, q = _rotate(*_standardise(features[fit], held))
        coefficients = np.zeros(x.shape[1])
        for setting in settings:
            penalty = len(fit) * setting["penalty_per_case"]
            coefficients = survival.fit_cox(x, targets.time[fit], targets.event[fit], penalty, coefficients)
            yield (q @ coefficients)[:, None]

    settings: list[Setting] = [{"penalty_per_case": penalty} for penalty in COX_PENALTIES]
    return choose_and_predict(bank, queries, settings, predict, default={"penalty_per_case": 1.0}, patience=_PATIENCE)


def _features(bank: Bank) -> Float[np.ndarray, "n d"]:
    if isinstance(bank.features, Tokens):
        raise UserError("this head takes one row of features per case, not lists of tokens; pool them first")
    return bank.features


def _standardise(
    x: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"]
) -> tuple[Float[np.ndarray, "n kept"], Float[np.ndarray, "q kept"]]:
    """Mean 0 and deviation 1 of every feature over `x`, float64; the same for the queries. Constant features are left out."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > _CONSTANT * np.maximum(1.0, np.abs(mean))
    if not varies.any():
        return np.zeros((len(x), 1)), np.zeros((len(queries), 1))
    mean, deviation = mean[varies], deviation[varies]
    return (x[:, varies] - mean) / deviation, (queries[:, varies] - mean) / deviation


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


def floor(targets: Targets, queries: int) -> Scores:
    """The baseline without an image: every case gets the class frequencies, the mean value, or the same risk."""
    if isinstance(targets, Classes):
        constant = targets.frequencies
    else:
        constant = np.array([targets.values.mean() if isinstance(targets, Values) else 0.0])
    return np.tile(constant, (queries, 1))
