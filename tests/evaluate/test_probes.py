"""Probes against scikit-learn and against loops."""

import inspect

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from curia_jax.evaluate import probes

PROBES = [probes.knn, probes.ridge, probes.logistic]


def blobs(seed: int, n: int, d: int = 12, classes: int = 3, spread: float = 1.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.permutation(np.arange(n) % classes)
    return (centres[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels


def a_bank(n: int = 90, classes: int = 3, d: int = 12, held: int = 30) -> probes.Bank:
    x, y = blobs(0, n, d=d, classes=classes)
    return probes.bank(x, y, np.arange(n), np.arange(n) >= n - held, classes=classes)


@pytest.mark.parametrize("probe", PROBES)
def test_probe_learns_signal_and_not_noise(probe):
    bank = a_bank()
    queries, targets = blobs(1, 120)
    assert np.mean(probe(bank, queries).scores.argmax(axis=1) == targets) > 0.7
    noise = np.random.default_rng(2).normal(size=queries.shape).astype(np.float32)
    assert np.mean(probe(bank, noise).scores.argmax(axis=1) == targets) < 0.55


@pytest.mark.parametrize("probe", PROBES)
def test_probe_is_deterministic(probe):
    queries, _ = blobs(1, 40)
    first, again = probe(a_bank(), queries), probe(a_bank(), queries)
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.chosen, first.selection_score) == (again.chosen, again.selection_score)


@pytest.mark.parametrize("probe", PROBES)
def test_probe_takes_no_test_labels(probe):
    assert list(inspect.signature(probe).parameters) == ["bank", "queries"]


@pytest.mark.parametrize("probe", PROBES)
def test_settings_do_not_depend_on_test_cases(probe):
    bank = a_bank()
    one, two = probe(bank, blobs(1, 30)[0]), probe(bank, 100 * blobs(2, 50)[0])
    assert (one.chosen, one.selection_score) == (two.chosen, two.selection_score)


@pytest.mark.parametrize("probe", PROBES)
def test_prediction_does_not_depend_on_other_cases(probe):
    bank = a_bank()
    queries, _ = blobs(1, 30)
    # float32 similarities in other blocks.
    np.testing.assert_allclose(probe(bank, queries).scores[:7], probe(bank, queries[:7]).scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("d", [12, 200])
def test_ridge_equals_sklearn_with_either_gram_matrix(d):
    bank = a_bank(d=d)
    queries, _ = blobs(1, 40, d=d)
    found = probes.ridge(bank, queries)
    scaler = StandardScaler().fit(bank.features.astype(np.float64))
    oracle = RidgeClassifier(alpha=found.chosen["penalty_per_case"] * len(bank.labels))
    oracle.fit(scaler.transform(bank.features.astype(np.float64)), bank.labels)
    # float64; the Gram matrix squares the condition number (here at most 1e5).
    np.testing.assert_allclose(
        found.scores, oracle.decision_function(scaler.transform(queries.astype(np.float64))), atol=1e-8
    )


@pytest.mark.parametrize("d", [12, 200])
def test_logistic_equals_sklearn_for_few_and_many_features(d):
    bank = a_bank(d=d)
    queries, _ = blobs(1, 40, d=d)
    found = probes.logistic(bank, queries)
    scaler = StandardScaler().fit(bank.features.astype(np.float64))
    oracle = LogisticRegression(C=found.chosen["C"], max_iter=5000, tol=1e-10)
    oracle.fit(scaler.transform(bank.features.astype(np.float64)), bank.labels)
    # Both stop at a gradient of 1e-6 times the number of cases.
    np.testing.assert_allclose(
        found.scores, oracle.predict_proba(scaler.transform(queries.astype(np.float64))), atol=2e-3
    )


def test_knn_equals_loop():
    bank = a_bank()
    queries, _ = blobs(1, 25)
    found = probes.knn(bank, queries)
    x, q = bank.features.astype(np.float64), queries.astype(np.float64)
    if found.chosen["standardised"]:
        x, q = (x - x.mean(0)) / x.std(0), (q - x.mean(0)) / x.std(0)
    x, q = x / np.linalg.norm(x, axis=1, keepdims=True), q / np.linalg.norm(q, axis=1, keepdims=True)
    for case, scores in zip(q, found.scores, strict=True):
        similarity = x @ case
        nearest = np.argsort(-similarity)[: found.chosen["k"]]
        weight = np.exp(similarity[nearest] / 0.07)
        wanted = [weight[bank.labels[nearest] == label].sum() / weight.sum() for label in range(3)]
        # Float32 similarities over a temperature of 0.07.
        np.testing.assert_allclose(scores, wanted, atol=2e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_settings_are_chosen_on_held_out_cases(probe):
    """Noise in the validation labels lowers the score of the chosen settings."""
    x, y = blobs(0, 90)
    held = np.arange(90) >= 60
    noisy = y.copy()
    noisy[held] = np.random.default_rng(0).permutation(noisy[held])
    queries, _ = blobs(1, 10)
    clean = probe(probes.bank(x, y, np.arange(90), held, classes=3), queries)
    noise = probe(probes.bank(x, noisy, np.arange(90), held, classes=3), queries)
    assert clean.selection_score > 0.85 > 0.7 > noise.selection_score


@pytest.mark.parametrize("probe", PROBES)
def test_constant_features_are_ignored(probe):
    x, y = blobs(0, 90)
    queries, _ = blobs(1, 30)
    held = np.arange(90) >= 60
    plain = probe(probes.bank(x, y, np.arange(90), held, classes=3), queries)
    constant = np.full((90, 1), 7.1, np.float32)
    padded = probes.bank(np.concatenate([x, constant], axis=1), y, np.arange(90), held, classes=3)
    with_constant = probe(padded, np.concatenate([queries, np.full((30, 1), 7.1, np.float32)], axis=1))
    assert np.isfinite(with_constant.scores).all()
    if probe is not probes.knn or with_constant.chosen["standardised"]:
        np.testing.assert_allclose(with_constant.scores, plain.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_constant_features_alone_score_every_case_alike(probe):
    y = np.arange(40) % 2
    bank = probes.bank(np.ones((40, 3), np.float32), y, np.arange(40), np.arange(40) >= 20, classes=2)
    scores = probe(bank, np.ones((5, 3), np.float32)).scores
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, np.broadcast_to(scores[:1], scores.shape), atol=1e-9)


def test_folds_without_validation_keep_patients_together():
    x, y = blobs(0, 120)
    patients = np.arange(120) // 4
    bank = probes.bank(x, y, patients, np.zeros(120, bool), classes=3)
    assert bank.selection == "5-fold over patients"
    for fit, held in bank.folds:
        assert not set(patients[fit]) & set(patients[held])
    assert sorted(np.concatenate([held for _, held in bank.folds])) == list(range(120))


def test_validation_that_lacks_a_class_is_not_used_alone():
    x, y = blobs(0, 90)
    bank = probes.bank(x, y, np.arange(90), (np.arange(90) >= 60) & (y != 2), classes=3)
    assert bank.selection == "5-fold over patients"


@pytest.mark.parametrize("probe", PROBES)
def test_class_without_training_cases_scores_lowest(probe):
    x, y = blobs(0, 90, classes=2)
    bank = probes.bank(x, y, np.arange(90), np.arange(90) >= 60, classes=3)
    scores = probe(bank, blobs(1, 20, classes=2)[0]).scores
    assert scores.shape == (20, 3) and (scores.argmax(axis=1) != 2).all()


def test_majority_scores_every_case_alike():
    np.testing.assert_array_equal(probes.majority(np.array([0, 1, 1, 1]), 3, 2), [[0.25, 0.75, 0]] * 2)
