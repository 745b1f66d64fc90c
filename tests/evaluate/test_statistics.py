"""DeLong and Holm against definitions."""

import itertools

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from curia_jax.evaluate import statistics


def two_models(seed: int = 0, n: int = 60):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    common = rng.normal(size=n) + positive
    return positive, np.round(common + rng.normal(size=n), 1), np.round(common + 0.5 * rng.normal(size=n), 1)


def test_delong_equals_its_definition() -> None:
    """Structural components by pairs, and the covariance of both models."""
    positive, first, second = two_models()
    of_positive, of_negative = [], []
    for scores in (first, second):
        pairs = np.array([[float(a > b) + 0.5 * (a == b) for b in scores[~positive]] for a in scores[positive]])
        of_positive.append(pairs.mean(axis=1))
        of_negative.append(pairs.mean(axis=0))
    covariance = np.cov(of_positive) / positive.sum() + np.cov(of_negative) / (~positive).sum()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = statistics.delong(positive, first, second)
    value = roc_auc_score(positive, first) - roc_auc_score(positive, second)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(value) / error), rel=1e-9)


def test_delong_of_equal_scores_finds_no_difference() -> None:
    positive, first, _ = two_models()
    found = statistics.delong(positive, first, first)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_delong_rejects_a_true_null_at_the_nominal_rate() -> None:
    rejected = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        positive = np.arange(80) % 2 == 0
        common = rng.normal(size=80) + positive
        rejected += statistics.delong(positive, *(common + rng.normal(size=(2, 80)))).p < 0.05
    # 15 expected; 4 and 29 are more than three standard deviations away.
    assert 4 < rejected < 29


def test_delong_needs_two_cases_of_each_class() -> None:
    with pytest.raises(ValueError, match="there are 1 and 2"):
        statistics.delong(np.array([True, False, False]), np.arange(3.0), np.arange(3.0))


def test_holm_equals_its_step_down_definition() -> None:
    p = [0.01, 0.04, 0.03, float("nan"), 0.005]
    found = statistics.holm(p)
    np.testing.assert_allclose([v for v in found if v == v], [0.03, 0.06, 0.06, 0.02])
    assert np.isnan(found[3])
    # Rejecting adjusted values is rejecting step by step, in any order of the tasks.
    for order in itertools.permutations([0.01, 0.04, 0.03, 0.005]):
        rejected = set()
        for rank, value in enumerate(sorted(order)):
            if value > 0.05 / (4 - rank):
                break
            rejected.add(value)
        assert {v for v, a in zip(order, statistics.holm(order), strict=True) if a <= 0.05} == rejected


def test_bootstrap_p_is_small_only_away_from_zero() -> None:
    rng = np.random.default_rng(0)
    assert statistics.bootstrap_p(rng.normal(0.0, 1, 2000)) > 0.9
    # The tail of a normal distribution beyond two deviations.
    assert statistics.bootstrap_p(rng.normal(2.0, 1, 20_000)) == pytest.approx(0.0455, abs=0.005)
    assert statistics.bootstrap_p(np.full(1999, 0.3)) == pytest.approx(2 / 2000)
    assert statistics.bootstrap_p(np.zeros(10)) == 1
    assert np.isnan(statistics.bootstrap_p(np.full(3, np.nan)))
