"""The Pallas kernels against array operations: forward, gradients, segments; in the interpreter, which needs no TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import attention, ops

# batch, tokens, width, heads, segments: one head of 128; heads narrower than a tile; segments; more queries than
# a chunk has.
CASES = [(2, 13, 128, 1, 1), (2, 17, 48, 3, 1), (2, 40, 32, 2, 4), (1, 2 * attention.ROWS + 5, 16, 2, 1)]


def inputs(batch: int, tokens: int, width: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.RandomState(tokens)
    qkv, bias, g = (random.standard_normal(s) for s in ((batch, tokens, 3 * width), 3 * width, (batch, tokens, width)))
    return jnp.asarray(qkv, dtype), jnp.asarray(bias, jnp.float32), jnp.asarray(g, dtype)


def both(case: tuple[int, ...], dtype: Any = jnp.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    """(by Pallas, by array operations in float32) of the result and the gradients of [q | k | v] and bias."""
    batch, tokens, width, heads, segments = case
    qkv, bias, g = inputs(batch, tokens, width, dtype)
    settings = {"heads": heads, "segments": segments}
    result = attention.pallas_forward(qkv, bias, **settings, interpret=True)
    gradient, of_bias = attention.pallas_backward(g, qkv, bias, **settings, interpret=True)
    exact = (x.astype(jnp.float32) for x in (qkv, bias, g))
    qkv, bias, g = exact
    wanted, back = jax.vjp(functools.partial(attention.xla_attention, **settings), qkv, bias)
    pairs = zip((result, gradient, of_bias.sum(axis=(0, 1))), (wanted, *back(g)), strict=True)
    return [(np.asarray(a, np.float32), np.asarray(b)) for a, b in pairs]


@pytest.mark.parametrize("case", CASES)
def test_pallas_kernels_equal_array_operations(case: tuple[int, ...]) -> None:
    for found, wanted in both(case):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_pallas_kernels_in_bfloat16_lose_only_their_roundings(case: tuple[int, ...]) -> None:
    """A rounding changes a value by at most 2^-9 of it. There are six on the way to a gradient (the projection with its
    bias, the probabilities, the logits' gradient and the result among them); in a sum of many values they add up in quadrature."""
    for found, wanted in both(case, jnp.bfloat16):
        error = np.sqrt(np.mean(np.square(found - wanted)) / np.mean(np.square(wanted)))
        assert error < 6 * 2**-9


def test_segments_do_not_attend_to_one_another() -> None:
    qkv, bias, _ = inputs(1, 40, 32)
    run = functools.partial(attention.pallas_forward, heads=2, segments=4, interpret=True)
    changed = qkv.at[:, 30:].add(1.0)
    np.testing.assert_array_equal(run(qkv, bias)[:, :30], run(changed, bias)[:, :30])
    assert np.abs(run(qkv, bias)[:, 30:] - run(changed, bias)[:, 30:]).min() > 0


@pytest.mark.skipif(not ops.on_nvidia(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "tokens", "segments"), [(2, 50, 1), (2, 197, 1), (1, 200, 4), (1, 1025, 1)])
def test_cudnn_attention_equals_array_operations(batch: int, tokens: int, segments: int) -> None:
    """Two roundings more than the Pallas kernels' six: the gradient of the logits is formed from a rounded result and rounded
    before it is summed."""
    qkv, bias, g = inputs(batch, tokens, 256, jnp.bfloat16)
    run = functools.partial(attention.cudnn_attention, heads=2, segments=segments)
    exact = functools.partial(attention.xla_attention, heads=2, segments=segments)
    result, back = jax.vjp(run, qkv, bias)
    wanted, back_exact = jax.vjp(exact, qkv.astype(jnp.float32), bias)
    with jax.default_matmul_precision("highest"):
        pairs = zip((result, *back(g)), (wanted, *back_exact(g.astype(jnp.float32))), strict=True)
    for found, wanted in pairs:
        error = jnp.sqrt(jnp.mean(jnp.square(found - wanted)) / jnp.mean(jnp.square(wanted)))
        assert error < 8 * 2**-9
