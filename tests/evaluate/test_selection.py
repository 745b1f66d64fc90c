"""Folds, scaling to probabilities and thresholds."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss

from curia_jax.evaluate import selection
from curia_jax.evaluate.targets import Classes, Values


def classes(n: int, count: int = 3) -> Classes:
    return Classes(np.random.default_rng(0).permutation(np.arange(n) % count), count)


def features(n: int):
    return np.zeros((n, 2), np.float32)


def test_folds_without_validation_keep_patients_together():
    patients = np.arange(120) // 4
    for targets in (classes(120), Values(np.arange(120.0))):
        bank = selection.bank(features(120), targets, patients, np.zeros(120, bool))
        assert bank.selection == "5-fold over patients"
        for fit, held in bank.folds:
            assert not set(patients[fit]) & set(patients[held])
        assert sorted(np.concatenate([held for _, held in bank.folds])) == list(range(120))


def test_validation_that_lacks_a_class_is_not_used_alone():
    targets = classes(90)
    held = (np.arange(90) >= 60) & (targets.labels != 2)
    assert selection.bank(features(90), targets, np.arange(90), held).selection == "5-fold over patients"


def test_values_are_selected_on_validation_where_there_is_one():
    bank = selection.bank(features(9), Values(np.arange(9.0)), np.arange(9), np.arange(9) >= 6)
    ((fit, held),) = bank.folds
    assert bank.selection == "validation split" and fit.tolist() == [0, 1, 2, 3, 4, 5] and held.tolist() == [6, 7, 8]


def constant(scores):
    """A predictor whose settings name the scores of the held-out and of the test cases."""
    return lambda fit, held, settings: [scores[setting["k"]][: len(held)] for setting in settings]


def test_setting_with_best_log_loss_wins_over_better_ranking():
    # Both rank all pairs; the second calls every case negative.
    y = np.array([0, 0, 0, 1, 1])
    good = np.array([0.1, 0.1, 0.6, 0.9, 0.9])
    flat = np.array([0.10, 0.11, 0.12, 0.13, 0.14])
    scores = [np.stack([1 - p, p], axis=1) for p in (flat, good)]
    bank = selection.Bank(features(5), Classes(y, 2), ((np.arange(5), np.arange(5)),), "")
    found = selection.choose_and_predict(bank, features(5), [{"k": 0}, {"k": 1}], constant(scores), default={})
    assert found.chosen == {"k": 1} and found.selection_score == 1.0
    assert found.selection_loss == pytest.approx(log_loss(y, good))
    assert found.decision[0] / found.decision.sum() == pytest.approx(0.75)  # half way between 0.6 and 0.9


def test_decisions_about_series_are_chosen_on_their_mean_scores():
    # Of the four slices of each series one shows the lesion; a threshold for slices would call every series negative.
    y = np.repeat([0, 1, 0, 1], 4)
    p = np.array([0.1, 0.1, 0.2, 0.1, 0.1, 0.9, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.8])
    units = np.repeat([3, 1, 2, 0], 4)
    cases = Classes(y, 2), ((np.arange(16), np.arange(16)),), ""
    slices, series = (
        selection.choose_and_predict(
            selection.Bank(features(16), *cases, who), features(16), [{"k": 0}],
            constant([np.stack([1 - p, p], axis=1)]), default={},
        )
        for who in (None, units)
    )  # fmt: skip
    assert series.decision[0] == pytest.approx((0.125 + 0.3) / 2)  # between the means 0.125 and 0.3
    assert slices.decision[0] == pytest.approx(0.5)  # between 0.2 and 0.8


def test_sweep_ends_after_settings_that_only_get_worse():
    y = np.array([0, 1, 0, 1])
    tried = []

    def predict(fit, held, settings):
        for setting in settings:
            tried.append(setting["p"])
            p = np.where(y == 1, setting["p"], 1 - setting["p"])
            yield np.stack([1 - p, p], axis=1)

    bank = selection.Bank(features(4), Classes(y, 2), ((np.arange(4), np.arange(4)),), "")
    settings = [{"p": p} for p in (0.6, 0.7, 0.65, 0.8, 0.5, 0.4, 0.9)]
    found = selection.choose_and_predict(bank, features(4), settings, predict, default={}, patience=2)
    assert found.chosen == {"p": 0.8} and tried == [0.6, 0.7, 0.65, 0.8, 0.5, 0.4]
    # The head is fitted on all cases when scores are asked for, and once.
    np.testing.assert_allclose(found.scores[:, 1], [0.2, 0.8, 0.2, 0.8])
    assert found.scores is found.scores and tried[6:] == [0.8]


def test_scaling_recovers_known_probabilities():
    rng = np.random.default_rng(0)
    truth = Classes(np.zeros(20_000, np.int64), 2)
    scores = rng.normal(size=20_000)
    probability = 1 / (1 + np.exp(-(3.0 * scores - 2.0)))
    truth = Classes((rng.random(20_000) < probability).astype(np.int64), 2)
    scaling = selection.Scaling.fit(np.stack([-scores, scores], axis=1), truth)
    share = truth.frequencies[1]
    # Two standard errors of the fitted slope and intercept at this n are 0.07 and 0.05.
    assert 2 * scaling.slope == pytest.approx(3.0, abs=0.1)
    assert scaling.prior * np.log(share / (1 - share)) == pytest.approx(-2.0, abs=0.08)
    np.testing.assert_allclose(scaling(np.stack([-scores, scores], axis=1))[:, 1], probability, atol=0.02)


def test_scaling_of_separable_cases_stays_finite():
    y = np.array([0, 0, 1, 1])
    scaling = selection.Scaling.fit(np.eye(2)[y] * 2 - 1, Classes(y, 2))
    assert 1 < scaling.slope < 10
    absent = selection.Scaling.fit(np.eye(3)[y] * 2 - 1, Classes(y, 3))(np.zeros((2, 3)))
    np.testing.assert_allclose(absent, [[0.5, 0.5, 0.0]] * 2)


def test_threshold_is_the_best_of_all_and_nearest_to_the_frequency():
    rng = np.random.default_rng(3)
    y = (rng.random(60) < 0.2).astype(np.int64)
    p = np.clip(rng.normal(0.2 + 0.25 * y, 0.12), 0.01, 0.99)
    weights = selection.decision_weights(Classes(y, 2), np.stack([1 - p, p], axis=1))
    found = balanced_accuracy_score(y, (np.stack([1 - p, p], axis=1) * weights).argmax(axis=1))
    every = [balanced_accuracy_score(y, p > t) for t in np.sort(p) - 1e-9]
    assert found == pytest.approx(max(every))
    # Nothing to choose by: the frequency of the class.
    flat = selection.decision_weights(Classes(y, 2), np.full((60, 2), 0.5))
    assert flat[0] / flat.sum() == pytest.approx(y.mean())


def test_weights_of_several_classes_balance_recalls():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=600, p=[0.8, 0.15, 0.05])
    logits = np.eye(3)[labels] * 2 + rng.normal(size=(600, 3)) + np.log([0.8, 0.15, 0.05])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    weights = selection.decision_weights(Classes(labels, 3), p)
    plain, weighted = (balanced_accuracy_score(labels, q.argmax(axis=1)) for q in (p, p * weights))
    assert weighted > plain + 0.1


def test_absent_class_has_weight_and_one_class_needs_no_decision():
    assert np.isfinite(selection.decision_weights(Classes(np.array([0, 1, 1, 0]), 3), np.full((4, 3), 1 / 3))).all()
    one = selection.decision_weights(Classes(np.array([1, 1]), 2), np.full((2, 2), 0.5))
    np.testing.assert_array_equal(one, [1.0, 1.0])
