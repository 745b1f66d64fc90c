"""Probes against scikit-learn and against loops."""

import inspect

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.preprocessing import StandardScaler

from curia_common.errors import UserError
from curia_jax.evaluate import probes, selection
from curia_jax.evaluate.targets import Classes, Times, Values
from curia_jax.evaluate.tokens import Tokens

PROBES = [probes.knn, probes.ridge, probes.logistic]


def blobs(seed: int, n: int, d: int = 12, classes: int = 3, spread: float = 1.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.permutation(np.arange(n) % classes)
    return (centres[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels


def bank_of(x, y, held, classes: int) -> selection.Bank:
    return selection.bank(x, Classes(y, classes), np.arange(len(y)), held)


def a_bank(n: int = 90, classes: int = 3, d: int = 12, held: int = 30) -> selection.Bank:
    x, y = blobs(0, n, d=d, classes=classes)
    return bank_of(x, y, np.arange(n) >= n - held, classes)


def standardised(bank: selection.Bank, queries):
    scaler = StandardScaler().fit(bank.features.astype(np.float64))
    return scaler.transform(bank.features.astype(np.float64)), scaler.transform(queries.astype(np.float64))


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
    x, q = standardised(bank, queries)
    oracle = RidgeClassifier(alpha=found.chosen["penalty_per_case"] * len(x)).fit(x, bank.targets.labels)
    frequencies = np.bincount(bank.targets.labels[60:]) / 30  # of the held-out cases, which the scaling was fitted on
    wanted = softmax(
        found.chosen["slope"] * oracle.decision_function(q) + found.chosen["prior"] * np.log(frequencies), axis=1
    )
    # float64; the Gram matrix squares the condition number (here at most 1e5).
    np.testing.assert_allclose(found.scores, wanted, atol=1e-8)


def test_ridge_of_values_equals_sklearn():
    x, y = blobs(0, 90)
    values = 40.0 + 10.0 * y + x[:, 0]
    bank = selection.bank(x, Values(values), np.arange(90), np.arange(90) >= 60)
    queries, _ = blobs(1, 40)
    found = probes.ridge(bank, queries)
    scaled, q = standardised(bank, queries)
    oracle = Ridge(alpha=found.chosen["penalty_per_case"] * 90).fit(scaled, values)
    np.testing.assert_allclose(found.scores[:, 0], oracle.predict(q), atol=1e-8)
    # The penalty is the one with the smallest squared error on the last 30 cases.
    scaler = StandardScaler().fit(x[:60].astype(np.float64))
    fit, held = scaler.transform(x[:60].astype(np.float64)), scaler.transform(x[60:].astype(np.float64))
    errors = [
        np.mean((Ridge(alpha=60 * penalty).fit(fit, values[:60]).predict(held) - values[60:]) ** 2)
        for penalty in probes.RIDGE_PENALTIES
    ]
    assert found.chosen["penalty_per_case"] == probes.RIDGE_PENALTIES[int(np.argmin(errors))]
    assert found.selection_loss == pytest.approx(min(errors), rel=1e-6)


# Newton's method is exact. L-BFGS stops at a gradient of 1e-6 of the mean loss.
@pytest.mark.parametrize(("most", "atol"), [(probes.NEWTON_COEFFICIENTS, 1e-6), (0, 2e-3)])
@pytest.mark.parametrize("d", [12, 200])
def test_logistic_equals_sklearn_by_either_solver(d, most, atol, monkeypatch):
    monkeypatch.setattr(probes, "NEWTON_COEFFICIENTS", most)
    bank = a_bank(d=d)
    queries, _ = blobs(1, 40, d=d)
    found = probes.logistic(bank, queries)
    x, q = standardised(bank, queries)
    oracle = LogisticRegression(C=found.chosen["C"], solver="newton-cg", max_iter=5000, tol=1e-12)
    np.testing.assert_allclose(found.scores, oracle.fit(x, bank.targets.labels).predict_proba(q), atol=atol)


def test_logistic_of_two_classes_equals_sklearn():
    x, y = blobs(0, 90)
    bank, queries = bank_of(x, y % 2, np.arange(90) >= 60, 2), blobs(1, 40)[0]
    found = probes.logistic(bank, queries)
    scaled, q = standardised(bank, queries)
    oracle = LogisticRegression(C=found.chosen["C"], solver="newton-cg", max_iter=5000, tol=1e-12).fit(scaled, y % 2)
    np.testing.assert_allclose(found.scores, oracle.predict_proba(q), atol=1e-6)


@pytest.mark.parametrize("most", [probes.NEWTON_COEFFICIENTS, 0])
def test_logistic_penalty_has_the_smallest_log_loss_of_the_sweep(most, monkeypatch):
    monkeypatch.setattr(probes, "NEWTON_COEFFICIENTS", most)
    bank = a_bank()
    found = probes.logistic(bank, blobs(1, 5)[0])
    scaler = StandardScaler().fit(bank.features[:60].astype(np.float64))
    fit, held = (scaler.transform(part.astype(np.float64)) for part in (bank.features[:60], bank.features[60:]))
    y = bank.targets.labels
    losses = {
        c: log_loss(y[60:], LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(fit, y[:60]).predict_proba(held))
        for c in probes.INVERSE_PENALTIES
    }
    assert found.chosen["C"] == min(losses, key=losses.__getitem__)
    assert found.selection_loss == pytest.approx(min(losses.values()), rel=1e-3)


def test_knn_equals_loop():
    bank = a_bank()
    queries, _ = blobs(1, 25)
    found = probes.knn(bank, queries)
    x, q = standardised(bank, queries)
    x, q = x / np.linalg.norm(x, axis=1, keepdims=True), q / np.linalg.norm(q, axis=1, keepdims=True)
    k, labels = found.chosen["k"], bank.targets.labels
    for case, scores in zip(q, found.scores, strict=True):
        similarity = x @ case
        nearest = np.argsort(-similarity)[:k]
        weight = np.exp(similarity[nearest] / 0.07)
        votes = np.array([weight[labels[nearest] == label].sum() / weight.sum() for label in range(3)])
        # One more neighbour of a third of each class; float32 similarities over a temperature of 0.07.
        np.testing.assert_allclose(scores, (k * votes + 1 / 3) / (k + 1), atol=2e-5)


def test_knn_of_values_is_the_weighted_mean_of_neighbours(monkeypatch):
    monkeypatch.setattr(probes, "NEIGHBOURS", (10,))
    x, y = blobs(0, 90)
    as_classes, as_values = (
        selection.Bank(x, targets, ((np.arange(60), np.arange(60, 90)),), "")
        for targets in (Classes(y, 3), Values(40.0 + 10.0 * y))
    )
    queries, _ = blobs(1, 20)
    votes = probes.knn(as_classes, queries).scores
    np.testing.assert_allclose(probes.knn(as_values, queries).scores[:, 0], votes @ [40.0, 50.0, 60.0], rtol=1e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_rare_positives_are_found_at_the_chosen_threshold(probe):
    """12 % positives, well separated: neither all negative, nor worse than logistic regression."""

    def cases(seed: int, n: int = 400):
        rng = np.random.default_rng(seed)
        y = (np.arange(n) % 25 < 3).astype(np.int64)
        return (rng.normal(size=(n, 30)) + 0.45 * y[:, None]).astype(np.float32), y

    x, y = cases(0)
    found = probe(bank_of(x, y, np.arange(400) >= 250, 2), cases(1)[0])
    decided = (found.scores * found.decision).argmax(axis=1)
    plain = LogisticRegression(max_iter=1000).fit(x, y).predict(cases(1)[0])
    recall = balanced_accuracy_score(cases(1)[1], decided)
    assert recall > 0.8 and recall >= balanced_accuracy_score(cases(1)[1], plain) - 0.01
    # Probabilities, so that the share of positives is that of the training cases.
    np.testing.assert_allclose(found.scores.sum(axis=1), 1, atol=1e-6)
    assert found.scores[:, 1].mean() == pytest.approx(0.12, abs=0.04)


@pytest.mark.parametrize("probe", PROBES)
def test_settings_are_chosen_on_held_out_cases(probe):
    """Noise in the validation labels lowers the score of the chosen settings."""
    x, y = blobs(0, 90)
    held = np.arange(90) >= 60
    noisy = y.copy()
    noisy[held] = np.random.default_rng(0).permutation(noisy[held])
    queries, _ = blobs(1, 10)
    clean = probe(bank_of(x, y, held, 3), queries)
    noise = probe(bank_of(x, noisy, held, 3), queries)
    assert clean.selection_score > 0.85 > 0.7 > noise.selection_score


@pytest.mark.parametrize("probe", PROBES)
def test_constant_features_are_ignored(probe):
    x, y = blobs(0, 90)
    queries, _ = blobs(1, 30)
    held = np.arange(90) >= 60
    plain = probe(bank_of(x, y, held, 3), queries)
    constant = np.full((90, 1), 7.1, np.float32)
    padded = bank_of(np.concatenate([x, constant], axis=1), y, held, 3)
    with_constant = probe(padded, np.concatenate([queries, np.full((30, 1), 7.1, np.float32)], axis=1))
    assert np.isfinite(with_constant.scores).all()
    np.testing.assert_allclose(with_constant.scores, plain.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_constant_features_alone_score_every_case_alike(probe):
    y = np.arange(40) % 2
    bank = bank_of(np.ones((40, 3), np.float32), y, np.arange(40) >= 20, 2)
    scores = probe(bank, np.ones((5, 3), np.float32)).scores
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, np.broadcast_to(scores[:1], scores.shape), atol=1e-9)


@pytest.mark.parametrize("probe", PROBES)
def test_class_without_training_cases_scores_lowest(probe):
    x, y = blobs(0, 90, classes=2)
    bank = bank_of(x, y, np.arange(90) >= 60, 3)
    scores = probe(bank, blobs(1, 20, classes=2)[0]).scores
    assert scores.shape == (20, 3) and (scores.argmax(axis=1) != 2).all()


def test_floor_predicts_frequencies_or_the_mean():
    np.testing.assert_array_equal(probes.floor(Classes(np.array([0, 1, 1, 1]), 3), 2), [[0.25, 0.75, 0]] * 2)
    np.testing.assert_array_equal(probes.floor(Values(np.array([1.0, 2.0, 6.0])), 2), [[3.0]] * 2)


def test_wrong_targets_and_tokens_are_refused_with_the_head_to_use():
    folds = ((np.arange(6), np.arange(6, 9)),)
    x = np.random.default_rng(0).normal(size=(9, 2))
    times = selection.Bank(x, Times(np.arange(1.0, 10.0), np.ones(9, bool)), folds, "")
    with pytest.raises(UserError, match="use cox"):
        probes.ridge(times, x)
    with pytest.raises(UserError, match="use ridge for values"):
        probes.logistic(selection.Bank(x, Values(np.arange(9.0)), folds, ""), x)
    with pytest.raises(UserError, match="cox learns times"):
        probes.cox(selection.Bank(x, Values(np.arange(9.0)), folds, ""), x)
    tokens = Tokens.of([x[:1]] * 9)
    with pytest.raises(UserError, match="not lists of tokens"):
        probes.ridge(selection.Bank(tokens, Values(np.arange(9.0)), folds, ""), x)


@pytest.mark.parametrize("probe", PROBES)
def test_one_patient_of_a_class_gives_default_settings(probe):
    x, y = blobs(0, 12, classes=2, spread=0.5)
    bank = selection.bank(x, Classes(y, 2), np.where(y == 1, 0, np.arange(12)), np.zeros(12, bool))
    assert bank.folds == () and bank.selection == "default settings (too few patients to choose)"
    queries, targets = blobs(1, 60, classes=2, spread=0.5)
    found = probe(bank, queries)
    assert np.isnan(found.selection_loss)
    assert ((found.scores * found.decision).argmax(axis=1) == targets).mean() > 0.9
