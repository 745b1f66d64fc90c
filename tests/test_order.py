"""Which slice, and which folder of a mixture, is example number g."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curia_jax import order


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 10**12), st.integers(1, 200))
def test_slice_of_an_example_follows_from_its_number_and_seed(slices: int, seed: int, first: int, count: int) -> None:
    first -= first % slices  # an epoch's first example
    whole = order.slice_numbers(first, slices + 1, slices=slices, seed=seed)
    assert sorted(whole[:slices]) == list(range(slices))
    start = count % slices
    part = order.slice_numbers(first + start, count, slices=slices, seed=seed)
    np.testing.assert_array_equal(part[: len(whole) - start], whole[start : start + count])


@pytest.mark.parametrize("slices", [12, 40])
def test_order_is_evenly_random(slices: int) -> None:
    """Every slice is equally often in every position and next to every other slice: chi-squared over 1,000 epochs.

    Expected is 1 per degree of freedom, with a deviation of sqrt(2 / freedom); 5 of those are allowed.
    """
    epochs = 1000
    orders = order.slice_numbers(0, epochs * slices, slices=slices, seed=1).reshape(epochs, slices)
    places, followers = np.zeros((slices, slices)), np.zeros((slices, slices))
    for one in orders:
        places[np.arange(slices), one] += 1
        followers[one[:-1], one[1:]] += 1
    found = np.square(places - epochs / slices).sum() / (epochs / slices) / (slices - 1) ** 2
    assert abs(found - 1) < 5 * (2 / (slices - 1) ** 2) ** 0.5
    pairs, expected = followers[~np.eye(slices, dtype=bool)], epochs / slices
    assert abs(np.square(pairs - expected).mean() / expected - 1) < 5 * (2 / len(pairs)) ** 0.5


def test_order_of_a_seed_is_the_same_in_every_version() -> None:
    """A run that an earlier version began resumes in its order."""
    assert order.slice_numbers(3, 8, slices=10, seed=7).tolist() == [1, 6, 5, 8, 9, 3, 7, 3]
    assert order.slice_numbers(10**12, 4, slices=200_000_000, seed=0).tolist() == [
        28426351,
        54027611,
        12906578,
        111449351,
    ]


# ---- folders of a mixture


def counts(folders: np.ndarray, number: int) -> np.ndarray:
    """How many of the first n examples come from each folder, for n from 0."""
    return np.concatenate([np.zeros((1, number), int), np.cumsum(folders[:, None] == np.arange(number), axis=0)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_folders_have_their_shares_of_the_first_examples(weights: list[int]) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    folders = order.interleaving(shares)
    found = counts(np.concatenate([folders, folders]), len(weights))
    exact = np.arange(len(found))[:, None] * np.array(weights) / sum(weights)
    assert np.abs(found - exact).max() <= 1 - 1 / (2 * len(weights) - 2) + 1e-9
    assert (found[len(folders)] == [share * len(folders) for share in shares]).all()


@pytest.mark.parametrize("weights", [(7, 3), (1, 1), (1, 19), (618, 382)])
def test_two_folders_have_their_shares_of_any_window(weights: tuple[int, int]) -> None:
    folders = order.interleaving([Fraction(weight, sum(weights)) for weight in weights])
    found = counts(np.concatenate([folders, folders]), 2)[:, 0]
    for length in range(1, min(len(folders), 60)):
        windows = found[length:] - found[:-length]
        assert np.abs(windows - length * weights[0] / sum(weights)).max() <= 1


def test_order_of_folders_is_the_same_in_every_version() -> None:
    assert order.interleaving([Fraction(7, 10), Fraction(3, 10)]).tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    shares = [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]
    assert order.interleaving(shares).tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
