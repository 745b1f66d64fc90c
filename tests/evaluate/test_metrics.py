"""Metrics against scikit-learn, and the bootstrap against a loop."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from curia_jax.evaluate import metrics
from curia_jax.evaluate.metrics import Bootstrap
from curia_jax.evaluate.targets import Times

# Sums of a few hundred float64 terms of order one.
TOLERANCE = 1e-12


def cases(seed: int, n: int = 120, classes: int = 2, patients: int = 17):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    # Rounded, so that there are ties; informative, so that the area is not a half.
    scores = np.round(rng.normal(size=(n, classes)) + np.eye(classes)[targets], 1)
    return targets, scores, rng.integers(0, patients, n)


def once(metric, targets, scores):
    return float(metric(targets, scores, np.ones((1, len(targets))))[0])


@pytest.mark.parametrize("seed", range(5))
def test_binary_auroc_equals_sklearn_with_ties_and_weights(seed):
    targets, scores, _ = cases(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(targets))).astype(float)
    found = metrics.auroc(targets, scores, weights)
    wanted = [roc_auc_score(targets, scores[:, 1] - scores[:, 0], sample_weight=w) for w in weights]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("classes", [3, 5])
def test_macro_auroc_equals_sklearn(classes):
    targets, scores, _ = cases(1, classes=classes)
    wanted = np.mean([roc_auc_score(targets == label, scores[:, label]) for label in range(classes)])
    assert once(metrics.auroc, targets, scores) == pytest.approx(wanted, abs=TOLERANCE)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    wanted = roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    assert once(metrics.auroc, targets, probabilities) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("classes", [2, 4])
def test_accuracies_equal_sklearn_with_weights(classes):
    targets, scores, _ = cases(2, classes=classes)
    weights = np.random.default_rng(0).integers(0, 4, (3, len(targets))).astype(float)
    predicted = scores.argmax(axis=1)
    for metric, oracle in ((metrics.accuracy, accuracy_score), (metrics.balanced_accuracy, balanced_accuracy_score)):
        wanted = [oracle(targets, predicted, sample_weight=w) for w in weights]
        np.testing.assert_allclose(metric(targets, scores, weights), wanted, rtol=0, atol=TOLERANCE)


def test_macro_auroc_ignores_absent_classes():
    targets, scores, _ = cases(3, classes=3)
    kept = targets != 2
    wanted = np.mean([roc_auc_score(targets[kept] == label, scores[kept, label]) for label in (0, 1)])
    assert once(metrics.auroc, targets[kept], scores[kept]) == pytest.approx(wanted, abs=TOLERANCE)


def test_auroc_of_one_class_is_undefined_and_accuracy_defined():
    scores = np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    targets = np.array([1, 1, 1])
    assert np.isnan(once(metrics.auroc, targets, scores))
    assert once(metrics.accuracy, targets, scores) == pytest.approx(2 / 3, abs=TOLERANCE)
    estimate = Bootstrap.over(np.array(["a", "b", "c"]), draws=50).estimate(metrics.auroc, targets, scores)
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()
    assert estimate.degenerate == estimate.draws == 50


@pytest.mark.parametrize("classes", [2, 3])
def test_bootstrap_equals_loop_over_resampled_patients(classes):
    targets, scores, patients = cases(4, n=60, classes=classes, patients=9)
    bootstrap = Bootstrap.over(patients, draws=200, seed=5)
    names = np.unique(patients)
    wanted, degenerate, partial = [], 0, 0
    for counts in bootstrap.counts:
        rows = np.concatenate([np.repeat(np.flatnonzero(patients == p), c) for p, c in zip(names, counts, strict=True)])
        t, s = targets[rows], scores[rows]
        present = np.unique(t)
        if len(present) < 2:
            degenerate += 1
            continue
        partial += len(present) < classes
        if classes == 2:
            wanted.append(roc_auc_score(t, s[:, 1] - s[:, 0]))
        else:
            wanted.append(np.mean([roc_auc_score(t == label, s[:, label]) for label in present]))
    found = bootstrap.estimate(metrics.auroc, targets, scores)
    np.testing.assert_allclose((found.low, found.high), np.percentile(wanted, [2.5, 97.5]), rtol=0, atol=1e-10)
    assert (found.degenerate, found.partial) == (degenerate, partial)
    assert found.value == pytest.approx(once(metrics.auroc, targets, scores), abs=TOLERANCE)


def test_degenerate_and_partial_draws_are_counted():
    # One patient per class: a draw without the first, or without the second, has one class.
    targets = np.array([0, 0, 1, 1])
    scores = np.eye(2)[targets]
    bootstrap = Bootstrap.over(np.array([1, 1, 2, 2]), draws=2000, seed=0)
    found = bootstrap.estimate(metrics.auroc, targets, scores)
    assert found.degenerate == int(np.sum((bootstrap.counts == 0).any(axis=1)))
    assert 0.45 < found.degenerate / 2000 < 0.55
    assert (found.low, found.high) == (1.0, 1.0)
    three = Bootstrap.over(np.array([1, 2, 3]), draws=2000, seed=0)
    found = three.estimate(metrics.auroc, np.array([0, 1, 2]), np.eye(3))
    assert found.degenerate == int(np.sum(three.counts.max(axis=1) == 3))
    assert found.partial == int(np.sum(three.counts.max(axis=1) == 2))


def test_one_patient_gives_value_without_interval():
    targets, scores, _ = cases(6)
    found = Bootstrap.over(np.zeros(len(targets)), draws=10).estimate(metrics.auroc, targets, scores)
    assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all()


def test_interval_depends_on_patients_not_slices():
    # Twenty patients of fifty identical cases carry the information of twenty cases.
    rng = np.random.default_rng(0)
    targets = np.repeat(rng.integers(0, 2, 20), 50)
    scores = np.repeat(rng.normal(size=(20, 2)), 50, axis=0)
    by_patient = Bootstrap.over(np.repeat(np.arange(20), 50)).estimate(metrics.accuracy, targets, scores)
    by_slice = Bootstrap.over(np.arange(1000)).estimate(metrics.accuracy, targets, scores)
    assert by_patient.high - by_patient.low > 4 * (by_slice.high - by_slice.low)


def test_difference_is_paired():
    targets, scores, patients = cases(7, n=300, patients=40)
    bootstrap = Bootstrap.over(patients)
    same = bootstrap.estimate(metrics.auroc, targets, scores, against=scores)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # Slightly worse on the same cases: far tighter than two separate intervals.
    worse = scores + 0.1 * np.random.default_rng(0).normal(size=scores.shape)
    difference = bootstrap.estimate(metrics.auroc, targets, scores, against=worse)
    alone = bootstrap.estimate(metrics.auroc, targets, scores)
    assert difference.value == pytest.approx(alone.value - bootstrap.estimate(metrics.auroc, targets, worse).value)
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    opposite = bootstrap.estimate(metrics.auroc, targets, worse, against=scores)
    assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low))


def test_interval_covers_truth_at_nominal_rate():
    # Accuracy 0.7, 60 patients with one case each: a percentile interval covers it in about 93-95 % of studies.
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(200):
        right = rng.random(60) < 0.7
        scores = np.stack([~right, right], axis=1).astype(float)
        found = Bootstrap.over(np.arange(60), draws=400, seed=study).estimate(
            metrics.accuracy, np.ones(60, int), scores
        )
        covered += found.low <= 0.7 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_seed_determines_interval():
    targets, scores, patients = cases(8)
    first, again, other = (Bootstrap.over(patients, seed=s).estimate(metrics.auroc, targets, scores) for s in (1, 1, 2))
    assert repr(first) == repr(again)  # the p-value of a single metric is NaN
    assert (first.low, first.high) != (other.low, other.high)


def test_chunked_evaluation_equals_whole(monkeypatch):
    targets, scores, patients = cases(9, n=200, classes=3)
    bootstrap = Bootstrap.over(patients, draws=100)
    whole = bootstrap.estimate(metrics.auroc, targets, scores)
    monkeypatch.setattr(metrics, "CHUNK", 1)
    assert repr(bootstrap.estimate(metrics.auroc, targets, scores)) == repr(whole)  # NaN for p


# ---- values, probabilities, times


def weights_of(n: int):
    return np.random.default_rng(0).integers(0, 4, (3, n)).astype(float)


def test_errors_of_values_equal_sklearn_with_weights():
    rng = np.random.default_rng(0)
    values = rng.normal(50, 10, 80)
    scores = (values + rng.normal(size=80))[:, None]
    for metric, oracle in (
        (metrics.rmse, root_mean_squared_error),
        (metrics.mae, mean_absolute_error),
        (metrics.r2, r2_score),
    ):
        wanted = [oracle(values, scores[:, 0], sample_weight=w) for w in weights_of(80)]
        np.testing.assert_allclose(metric(values, scores, weights_of(80)), wanted, rtol=1e-10)


def test_r2_of_one_value_is_undefined():
    assert np.isnan(once(metrics.r2, np.full(3, 0.1), np.ones((3, 1))))


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_equals_sklearn(classes):
    targets, scores, _ = cases(3, classes=classes)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    if classes == 2:
        wanted = [brier_score_loss(targets, p[:, 1], sample_weight=w) for w in weights_of(len(p))]
    else:
        squares = np.square(np.eye(4)[targets] - p).sum(axis=1)
        wanted = [np.average(squares, weights=w) for w in weights_of(len(p))]
    np.testing.assert_allclose(metrics.brier(targets, p, weights_of(len(p))), wanted, rtol=1e-10)


def test_brier_of_class_without_a_score():
    # Probability 0 of what came true.
    assert once(metrics.brier, np.array([2]), np.array([[0.5, 0.5]])) == pytest.approx(0.25 + 0.25 + 1)


def a_follow_up(n: int = 70):
    rng = np.random.default_rng(0)
    risk = np.round(rng.normal(size=n), 1)
    time = np.ceil(5 * rng.exponential(np.exp(-risk))) + 0.0
    return Times(time, rng.random(n) < 0.6), risk[:, None]


def test_concordance_equals_loop_with_ties_and_weights(monkeypatch):
    times, risk = a_follow_up()
    wanted = []
    for weights in weights_of(70):
        known = right = 0.0
        for i in np.flatnonzero(times.event):
            for j in range(70):
                later = times.time[j] > times.time[i] or (times.time[j] == times.time[i] and not times.event[j])
                if later:
                    pair = weights[i] * weights[j]
                    known += pair
                    right += pair * (1.0 if risk[i, 0] > risk[j, 0] else 0.5 if risk[i, 0] == risk[j, 0] else 0.0)
        wanted.append(right / known)
    np.testing.assert_allclose(metrics.concordance(times, risk, weights_of(70)), wanted, rtol=1e-12)
    monkeypatch.setattr(metrics, "CHUNK", 200)
    np.testing.assert_allclose(metrics.concordance(times, risk, weights_of(70)), wanted, rtol=1e-12)


def test_concordance_equals_scikit_survival():
    sksurv = pytest.importorskip("sksurv.metrics", reason="scikit-survival is not installed (GPL, tests only)")
    times, risk = a_follow_up()
    wanted = sksurv.concordance_index_censored(times.event, times.time, risk[:, 0], tied_tol=0)[0]
    assert once(metrics.concordance, times, risk) == pytest.approx(wanted, abs=1e-12)


def test_concordance_is_one_minus_that_of_lifelines_scores():
    lifelines = pytest.importorskip("lifelines.utils", reason="lifelines is not installed")
    times, risk = a_follow_up()
    times = Times(times.time + np.linspace(0, 0.5, 70), times.event)  # without ties, which lifelines counts otherwise
    wanted = lifelines.concordance_index(times.time, -risk[:, 0], times.event)
    assert once(metrics.concordance, times, risk) == pytest.approx(wanted, abs=1e-12)


def test_concordance_without_events_is_undefined():
    times, risk = a_follow_up()
    assert np.isnan(once(metrics.concordance, Times(times.time, np.zeros(70, bool)), risk))


def test_bootstrap_takes_values_and_times():
    times, risk = a_follow_up()
    patients = np.arange(70) // 2
    found = Bootstrap.over(patients, draws=300).estimate(metrics.concordance, times, risk)
    assert 0.6 < found.low < found.value < found.high < 1 and found.doubt is None
    values = np.arange(70.0)
    found = Bootstrap.over(patients, draws=300).estimate(metrics.rmse, values, values[:, None] + 1)
    assert (found.value, found.low, found.high) == (1, 1, 1) and "no width" in str(found.doubt)


def test_restricted_bootstrap_keeps_the_draws():
    targets, scores, patients = cases(5)
    bootstrap = Bootstrap.over(patients, draws=100)
    some = np.arange(len(targets)) % 3 == 0
    values = bootstrap.restricted(some).values(metrics.accuracy, targets[some], scores[some])
    for counts, value in zip(bootstrap.counts[:5], values[1:6], strict=True):
        weights = counts[bootstrap.patient] * some
        assert value == pytest.approx(once_weighted(metrics.accuracy, targets, scores, weights))


def once_weighted(metric, targets, scores, weights):
    return float(metric(targets, scores, weights[None].astype(float))[0])


@pytest.mark.parametrize(
    ("positives", "negatives", "doubt"),
    [
        (2, 2, "4 resampled groups, and 2 of the rarest class are too few"),
        (3, 40, "and 3 of the rarest"),
        (20, 20, None),
    ],
)
def test_interval_from_too_few_patients_is_doubted(positives, negatives, doubt):
    targets = np.repeat([1, 0], [positives, negatives])
    scores = np.eye(2)[targets] + np.random.default_rng(0).normal(size=(len(targets), 2))
    found = Bootstrap.over(np.arange(len(targets))).estimate(metrics.auroc, targets, scores)
    assert (found.doubt is None) if doubt is None else doubt in found.doubt


def test_interval_without_width_is_doubted():
    targets = np.repeat([1, 0], 20)
    found = Bootstrap.over(np.arange(40)).estimate(metrics.auroc, targets, np.eye(2)[targets])
    assert (found.low, found.high) == (1, 1) and "no width" in found.doubt


def test_auroc_over_pairs_equals_auroc_by_sorting(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    targets, scores = (
        rng.integers(0, 4, 90),
        rng.integers(0, 6, (90, 3)).astype(float),
    )  # ties, and a class without a score
    weights = rng.integers(0, 3, (40, 90)).astype(float)
    pairs = metrics.auroc(targets, scores, weights)
    monkeypatch.setattr(metrics, "FEW_PAIRED", 0)
    np.testing.assert_allclose(metrics.auroc(targets, scores, weights), pairs, rtol=1e-12)
