"""Efficient probing: learning classes and values; tests/models/test_head.py tests its pooling."""

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import efficient_probing, selection
from curia_jax.evaluate.targets import Classes, Values
from curia_jax.evaluate.tokens import Tokens


def cases(n: int = 96, d: int = 8, seed: int = 0):
    """One token of up to six shows the class; their mean hardly does."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    lists = []
    for label in labels:
        tokens = rng.normal(size=(rng.integers(2, 7), d))
        tokens[rng.integers(len(tokens))] = np.r_[4.0, 4.0 * (2 * label - 1), np.zeros(d - 2)]
        lists.append(tokens.astype(np.float32))
    return Tokens.of(lists), labels


def bank_of(tokens: Tokens, targets) -> selection.Bank:
    return selection.bank(tokens, targets, np.arange(len(tokens)), np.arange(len(tokens)) >= len(tokens) * 3 // 4)


@pytest.fixture(autouse=True)
def few_rates(monkeypatch) -> None:
    monkeypatch.setattr(efficient_probing, "LEARNING_RATES", (3e-3, 1e-2))
    monkeypatch.setattr(efficient_probing, "BATCH", 16)


def test_probing_finds_the_token_that_tells() -> None:
    tokens, labels = cases()
    queries, wanted = cases(n=60, seed=1)
    found = efficient_probing.efficient(bank_of(tokens, Classes(labels, 2)), queries)
    assert (found.scores.argmax(axis=1) == wanted).mean() > 0.9
    np.testing.assert_allclose(found.scores.sum(axis=1), 1, atol=1e-6)
    assert found.chosen["learning_rate"] in efficient_probing.LEARNING_RATES and found.selection_loss < 0.5
    again = efficient_probing.efficient(bank_of(tokens, Classes(labels, 2)), queries[np.arange(7)])
    np.testing.assert_allclose(again.scores, found.scores[:7], atol=1e-5)


def test_probing_learns_values_in_their_unit() -> None:
    tokens, labels = cases()
    queries, wanted = cases(n=60, seed=1)
    found = efficient_probing.efficient(bank_of(tokens, Values(50.0 + 20.0 * labels)), queries)
    assert np.abs(found.scores[:, 0] - (50.0 + 20.0 * wanted)).mean() < 6


def test_features_without_tokens_are_refused() -> None:
    bank = selection.bank(np.zeros((4, 2), np.float32), Values(np.arange(4.0)), np.arange(4), np.arange(4) > 1)
    with pytest.raises(UserError, match="efficient probing takes lists of tokens"):
        efficient_probing.efficient(bank, cases(n=2)[0])
