"""Lists of tokens of different lengths."""

import numpy as np
import pytest

from curia_common.errors import DataError
from curia_jax.evaluate.tokens import Tokens


def test_tokens_are_padded_and_masked() -> None:
    cases = [np.full((n, 2), n, np.float32) for n in (3, 1, 2)]
    tokens = Tokens.of(cases)
    assert (len(tokens), tokens.longest) == (3, 3)
    values, mask = tokens.padded(np.array([2, 0]), 4)
    np.testing.assert_array_equal(values[:, :, 0], [[2, 2, 0, 0], [3, 3, 3, 0]])
    np.testing.assert_array_equal(mask, [[True, True, False, False], [True, True, True, False]])
    some = tokens[np.array([1, 2])]
    assert (len(some), some.longest) == (2, 2)
    np.testing.assert_array_equal(some.padded(np.array([0]), 1)[0], [[[1, 1]]])
    np.testing.assert_array_equal(tokens[np.array([False, True, False])].lengths, [1])


def test_case_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="case 1 of 2 has no token"):
        Tokens.of([np.ones((2, 3), np.float32), np.ones((0, 3), np.float32)])


def test_slices_of_a_case_are_one_list_of_the_tokens_inside() -> None:
    values = np.arange(3 * 2 * 1, dtype=np.float32).reshape(3, 2, 1)
    inside = np.array([[True, False], [True, True], [False, True]])
    tokens = Tokens.of_slices(values, inside, np.array(["a", "a", "b"]))
    assert tokens.lengths.tolist() == [3, 1]
    np.testing.assert_array_equal(tokens.padded(np.array([0, 1]), 3)[0][:, :, 0], [[0, 2, 3], [5, 0, 0]])
    everything = Tokens.of_slices(values, np.ones((3, 2), bool), np.arange(3))
    assert np.shares_memory(everything.arrays[0], values)


def test_lists_of_two_splits_follow_each_other_without_a_copy() -> None:
    first, second = (Tokens.of([np.full((n, 2), n, np.float32) for n in lengths]) for lengths in ((3, 1), (2,)))
    both = first.followed_by(second)
    assert len(both) == 3 and both.longest == 3
    np.testing.assert_array_equal(both.padded(np.array([2, 1]), 2)[0][:, :, 0], [[2, 2], [1, 0]])
    assert both[np.array([2])].lengths.tolist() == [2] and np.shares_memory(both.arrays[1], second.arrays[0])
    np.testing.assert_array_equal(
        second.followed_by(both)[np.array([3])].padded(np.array([0]), 2)[0], np.full((1, 2, 2), 2)
    )
