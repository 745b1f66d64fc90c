"""What heads learn: rows, strata and the loss that chooses settings."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, mean_squared_error

from curia_jax.evaluate.targets import Classes, Times, Values

R = np.random.default_rng(0)


def test_loss_of_classes_is_the_log_loss() -> None:
    targets = Classes(R.integers(0, 3, 40), 3)
    scores = R.dirichlet([1, 1, 1], 40)
    assert targets.loss(scores) == pytest.approx(40 * log_loss(targets.labels, scores, labels=range(3)), rel=1e-12)


def test_certain_and_wrong_probability_costs_a_finite_loss() -> None:
    # The smallest probability that counts is that of scikit-learn: eps.
    assert Classes(np.array([0]), 2).loss(np.array([[0.0, 1.0]])) == pytest.approx(-np.log(np.finfo(float).eps))


def test_loss_of_values_is_the_sum_of_squared_errors() -> None:
    targets, scores = Values(R.normal(60, 15, 30)), R.normal(60, 15, (30, 1))
    assert targets.loss(scores) == pytest.approx(30 * mean_squared_error(targets.values, scores[:, 0]), rel=1e-12)


def test_loss_of_times_is_the_partial_likelihood_over_cases_at_risk() -> None:
    targets = Times(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, True]))
    risks = np.array([0.3, -0.2, 0.5, 0.1])
    hazards = np.exp(risks)
    wanted = sum(risks[n] - np.log(hazards[n:].sum()) for n in (0, 2, 3))  # the second is censored
    assert targets.loss(risks[:, None]) == pytest.approx(-wanted, rel=1e-12)


@pytest.mark.parametrize(
    "targets",
    [
        Classes(np.array([0, 1, 2, 1]), 4),
        Values(np.arange(4.0)),
        Times(np.arange(1.0, 5.0), np.array([True, False] * 2)),
    ],
)
@pytest.mark.parametrize("rows", [np.array([3, 1]), np.array([False, True, False, True])])
def test_rows_are_taken_by_number_or_mask(targets: Classes | Values | Times, rows: np.ndarray) -> None:
    taken = targets[rows]
    numbers = np.arange(4)[rows]
    assert len(taken) == 2 and type(taken) is type(targets)
    for name, values in vars(targets).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(vars(taken)[name], values[numbers])
        else:
            assert vars(taken)[name] == values


def test_strata_are_classes_fifths_or_events() -> None:
    assert Classes(np.array([1, 0, 1]), 2).strata.tolist() == [1, 0, 1]
    assert np.bincount(Values(R.permutation(100.0 + np.arange(50))).strata).tolist() == [10] * 5
    assert Times(np.ones(3), np.array([True, False, True])).strata.tolist() == [1, 0, 1]


def test_frequencies_count_classes_without_a_case() -> None:
    assert Classes(np.array([0, 2, 2, 2]), 4).frequencies.tolist() == [0.25, 0, 0.75, 0]
