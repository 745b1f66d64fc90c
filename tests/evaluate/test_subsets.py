"""Few labels: by patient, with the shares of the classes, the same everywhere."""

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import subsets
from curia_jax.evaluate.targets import Classes, Times, Values


def a_study(patients: int = 200, per_patient: int = 3):
    """A tenth of the patients is of class 1."""
    names = np.array([f"p{i}" for i in range(patients)]).repeat(per_patient)
    labels = (np.arange(patients) % 10 == 0).astype(np.int64).repeat(per_patient)
    return Classes(labels, 2), names


@pytest.mark.parametrize("share", (0.01, 0.05, 0.10, 0.25, 0.50, 1.0))
def test_fraction_keeps_patients_whole_and_classes_in_their_shares(share: float) -> None:
    targets, patients = a_study()
    rows = subsets.fraction(targets, patients, share, seed=0)
    chosen = set(patients[rows])
    np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(patients, list(chosen))))
    positive = len(set(patients[rows][targets.labels[rows] == 1]))
    assert (positive, len(chosen) - positive) == (np.ceil(20 * share), np.ceil(round(180 * share, 9)))


def test_fraction_of_everything_is_everything() -> None:
    targets, patients = a_study()
    np.testing.assert_array_equal(subsets.fraction(targets, patients, 1.0, seed=3), np.arange(600))


def test_larger_fraction_contains_the_smaller_one() -> None:
    targets, patients = a_study()
    small, large = (set(subsets.fraction(targets, patients, share, seed=1)) for share in (0.1, 0.25))
    assert small < large


def test_seeds_choose_different_patients() -> None:
    targets, patients = a_study()
    chosen = [frozenset(patients[subsets.fraction(targets, patients, 0.1, seed)]) for seed in range(3)]
    assert len(set(chosen)) == 3


def test_subset_does_not_depend_on_the_order_of_the_cases() -> None:
    targets, patients = a_study()
    turned = np.random.default_rng(0).permutation(600)
    for choose in (
        lambda t, p: subsets.fraction(t, p, 0.1, seed=1),
        lambda t, p: subsets.shots(t, p, 5, seed=1),
    ):
        assert set(patients[choose(targets, patients)]) == set(
            patients[turned][choose(targets[turned], patients[turned])]
        )


def test_patient_of_two_classes_belongs_to_the_rarer_one() -> None:
    # Every patient has class 0, a few class 1 as well: a small subset has both.
    labels = np.array([0, 0, 0, 1] + [0, 0] * 50)
    patients = np.array([0, 0, 1, 1] + list(np.arange(100) // 2 + 2))
    rows = subsets.fraction(Classes(labels, 2), patients, 0.01, seed=0)
    assert set(labels[rows]) == {0, 1} and len(np.unique(patients[rows])) == 2


def test_values_and_times_are_spread_over_the_subset() -> None:
    values = np.arange(100.0)
    rows = subsets.fraction(Values(values), np.arange(100), 0.1, seed=0)
    assert len(rows) == 10 and sorted(values[rows] // 20) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    event = np.arange(100) % 4 == 0
    rows = subsets.fraction(Times(values + 1, event), np.arange(100), 0.2, seed=0)
    assert (len(rows), event[rows].sum()) == (20, 5)


def test_shots_are_of_different_patients() -> None:
    targets, patients = a_study()
    rows = subsets.shots(targets, patients, 5, seed=0)
    assert len(rows) == 10 and np.bincount(targets.labels[rows]).tolist() == [5, 5]
    assert len(set(patients[rows])) == 10
    assert set(rows) < set(subsets.shots(targets, patients, 6, seed=0))


def test_too_few_patients_for_shots_are_named() -> None:
    targets, patients = a_study(patients=30)
    with pytest.raises(UserError, match="10 shots of every class: class 1 has 3 patients"):
        subsets.shots(targets, patients, 10, seed=0)
