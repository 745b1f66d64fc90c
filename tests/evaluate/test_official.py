"""The official heads against PyTorch: the same layers, optimiser, schedule, clipping and order of cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.evaluate import official
from curia_jax.evaluate.official import Schedule
from curia_jax.evaluate.targets import Classes, Values
from curia_jax.evaluate.tokens import Tokens

# float32 sums of a few dozen terms, over a few dozen steps.
TOLERANCE = 2e-6


def cases(n: int = 45, d: int = 6, classes: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = rng.normal(size=(n, d)) + 2 * rng.normal(size=(classes, d))[labels]
    return features.astype(np.float32), labels


def token_cases(n: int = 21, d: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    lists = [
        (rng.normal(size=(rng.integers(1, 6), d)) + label * np.tile([1.0, -1.0], d // 2)).astype(np.float32)
        for label in labels
    ]
    return Tokens.of(lists), labels


def test_learning_rate_rises_after_the_planned_steps() -> None:
    # 3200 cases of 64 in 50 epochs: 2500 steps; one case more makes 51 an epoch.
    exact, rising = (Schedule(50, 0.4).learning_rates(n) for n in (3200, 3201))
    assert len(exact) == 2500 and exact[0] == pytest.approx(0.1) and exact[-1] < 1e-7
    assert len(rising) == 2550 and rising[2500] == 0 and rising[-1] > rising[2520] > 0
    # Fewer cases than two batches: back at the base rate.
    short = Schedule(10, 0.4).learning_rates(100)
    assert len(short) == 20 and short[10] == 0 and short[-1] > 0.9 * short[0]


def test_every_case_is_seen_once_an_epoch_and_the_last_batch_is_a_mean() -> None:
    rows, weights = Schedule(3, 0.1, batch_size=4).batches(10)
    assert rows.shape == weights.shape == (9, 4)
    for epoch in range(3):
        taken = rows[3 * epoch : 3 * epoch + 3][weights[3 * epoch : 3 * epoch + 3] > 0]
        assert sorted(taken) == list(range(10))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights[2].tolist() == [0.5, 0.5, 0, 0]
    assert rows[:3].tolist() != rows[3:6].tolist()


def test_linear_head_learns_classes_and_values() -> None:
    features, labels = cases(n=120)
    queries, wanted = features[:40], labels[:40]
    found = official.linear(features, Classes(labels, 3), queries, Schedule(20, 0.4, batch_size=16), seed=0)
    assert (found.argmax(axis=1) == wanted).mean() > 0.9
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    values = features @ np.arange(1.0, 7.0)
    found = official.linear(features, Values(values), queries, Schedule(200, 0.1, batch_size=16), seed=0)
    assert np.abs(found[:, 0] - values[:40]).mean() < 0.3 * np.abs(values - values.mean()).mean()


def test_attentive_head_learns_from_lists_of_tokens() -> None:
    tokens, labels = token_cases(n=60)
    found = official.attentive(tokens, Classes(labels, 2), tokens, Schedule(15, 0.2, batch_size=16), seed=0)
    assert (found.argmax(axis=1) == labels).mean() > 0.8


def test_seed_decides_the_head() -> None:
    features, labels = cases()
    first, again, other = (
        official.linear(features, Classes(labels, 3), features, Schedule(1, 0.1), seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-5


# ---- against PyTorch


@pytest.mark.torch
def test_permutation_equals_that_of_torch() -> None:
    import torch

    for n, seed in ((1, 42), (7, 42), (1000, 43)):
        wanted = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(official.permutation(n, seed), wanted.numpy())


@pytest.mark.torch
@pytest.mark.parametrize("n", [45, 64, 100])
def test_learning_rates_equal_those_of_torch(n: int) -> None:
    import torch

    schedule = Schedule(7, 0.02, batch_size=32)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02 * 32 / 256, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(1, n // 32) * 7, eta_min=0)
    wanted = []
    for _ in range(math.ceil(n / 32) * 7):
        wanted.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        cosine.step()
    np.testing.assert_allclose(schedule.learning_rates(n), wanted, rtol=1e-9, atol=1e-12)


def torch_training(module, inputs, wanted, loss, schedule: Schedule, n: int) -> None:
    """The loop of the official trainer: shuffled batches, clipping, SGD, a cosine step by step."""
    import torch

    rate = schedule.base_learning_rate * schedule.batch_size / 256
    optimiser = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    planned = max(1, n // schedule.batch_size) * schedule.epochs
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=planned, eta_min=0)
    for epoch in range(schedule.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(42 + epoch))
        for rows in order.split(schedule.batch_size):
            optimiser.zero_grad()
            loss(module(inputs[rows]), wanted[rows]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            cosine.step()


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["classes", "values"])
def test_trained_linear_head_equals_torch(kind: str) -> None:
    import torch

    features, labels = cases()
    schedule = Schedule(6, 0.8, batch_size=16)
    # Values far from 0, so that gradients are clipped.
    targets = Classes(labels, 3) if kind == "classes" else Values(40.0 + features[:, 0].astype(np.float64))
    wanted = torch.tensor(labels) if kind == "classes" else torch.tensor(targets.values, dtype=torch.float32)
    params = official.linear_init(jax.random.key(0), 6, 3 if kind == "classes" else 1)
    layer = torch.nn.Linear(6, params["weight"].shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.array(params["weight"])).T)
        layer.bias.zero_()
    loss = torch.nn.CrossEntropyLoss() if kind == "classes" else lambda y, t: torch.nn.MSELoss()(y.squeeze(-1), t)
    torch_training(layer, torch.tensor(features), wanted, loss, schedule, len(features))
    found = official.train_linear(params, features, targets, schedule)
    np.testing.assert_allclose(found["weight"].T, layer.weight.detach().numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found["bias"], layer.bias.detach().numpy(), atol=TOLERANCE)


def torch_attentive(params):
    """The official head, written from its definition, with these weights."""
    import torch

    width, outputs = params["linear"]["weight"].shape

    class Block(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(width, 1, batch_first=True)
            self.norm = torch.nn.LayerNorm(width)
            names = {"in_weight": "in_proj_weight", "in_bias": "in_proj_bias"}
            targets = {name: getattr(self.attention, to) for name, to in names.items()}
            targets |= {"out_weight": self.attention.out_proj.weight, "out_bias": self.attention.out_proj.bias}
            targets |= {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
            with torch.no_grad():
                for name, to in targets.items():
                    value = torch.tensor(np.array(weights[name]))
                    to.copy_(value.T if value.ndim == 2 else value)

        def forward(self, query, tokens, hidden):
            return self.norm(query + self.attention(query, tokens, tokens, attn_mask=hidden)[0])

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = Block(params["self"]), Block(params["cross"])
            self.query = torch.nn.Parameter(torch.tensor(np.array(params["query"])))
            self.linear = torch.nn.Linear(width, outputs)
            with torch.no_grad():
                self.linear.weight.copy_(torch.tensor(np.array(params["linear"]["weight"])).T)
                self.linear.bias.copy_(torch.tensor(np.array(params["linear"]["bias"])))

        def forward(self, tokens):
            real = (tokens != 0).any(dim=-1)
            both = (real[:, None] & real[:, :, None]) | (~real[:, None] & ~real[:, :, None])
            tokens = self.own(tokens, tokens, ~both)
            real = (tokens != 0).any(dim=-1)
            pooled = self.cross(self.query.expand(len(tokens), -1, -1), tokens, ~real[:, None])
            return self.linear(pooled.mean(dim=1))

    return Head()


@pytest.mark.torch
@pytest.mark.parametrize("trained", [False, True])
def test_attentive_forward_equals_torch(trained: bool) -> None:
    """With biases the padding is no longer zero after self-attention, and is seen."""
    import torch

    tokens, _ = token_cases()
    params = official.attentive_init(jax.random.key(0), 6, 2)
    if trained:
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    padded, _ = tokens.padded(np.arange(len(tokens)), tokens.longest)
    with torch.no_grad():
        wanted = torch_attentive(params)(torch.tensor(padded)).numpy()
    found = official.attentive_forward(params, padded)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    longer, _ = tokens.padded(np.arange(len(tokens)), tokens.longest + 3)
    same = jnp.allclose(official.attentive_forward(params, longer), found, atol=1e-5)
    assert bool(same) is not trained


@pytest.mark.torch
def test_trained_attentive_head_equals_torch() -> None:
    import torch

    tokens, labels = token_cases()
    schedule = Schedule(4, 0.8, batch_size=8)
    params = official.attentive_init(jax.random.key(0), 6, 2)
    head = torch_attentive(params)
    padded, _ = tokens.padded(np.arange(len(tokens)), tokens.longest)
    torch_training(head, torch.tensor(padded), torch.tensor(labels), torch.nn.CrossEntropyLoss(), schedule, len(labels))
    found = official.train_attentive(params, tokens, Classes(labels, 2), schedule)
    np.testing.assert_allclose(found["query"], head.query.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found["linear"]["weight"].T, head.linear.weight.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found["self"]["in_bias"], head.own.attention.in_proj_bias.detach().numpy(), atol=1e-5)


def test_slice_embedding_alternates_sines_and_cosines() -> None:
    found = official.slice_embedding(3, 8)
    for position in range(3):
        for pair in range(4):
            angle = position / 10000 ** (2 * pair / 8)
            wanted = (math.sin(angle), math.cos(angle))
            np.testing.assert_allclose(found[position, 2 * pair : 2 * pair + 2], wanted, atol=1e-6)
