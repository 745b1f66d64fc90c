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
