"""The arithmetic by itself: values against definitions, derivatives against automatic ones, and what the compiler makes of it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import ops

# ---- GELU, MLP, LayerNorm


@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "tanh"])
def test_gelu_and_its_slope_equal_their_definition(approximate: bool) -> None:
    x = np.linspace(-9, 9, 2001).astype(np.float32)
    y = x.astype(np.float64)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    phi = 0.5 * (1 + (np.tanh(inner) if approximate else np.vectorize(math.erf)(y / math.sqrt(2))))
    slope = np.gradient(y * phi, y, edge_order=2)  # differences over 0.009 are off by up to 2e-5
    # 1 + erf and 1 + tanh are rounded in steps of 2^-24; x times that.
    np.testing.assert_allclose(jax.jit(ops.gelu, static_argnums=1)(x, approximate), y * phi, rtol=3e-7, atol=9 * 2**-23)
    np.testing.assert_allclose(jax.jit(ops.gelu_slope, static_argnums=1)(x, approximate), slope, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), [(24, 96, 8), (24, 8, 96)], ids=["wide", "narrow"])
@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "tanh"])
def test_mlp_gradients_equal_automatic_ones(approximate: bool, inputs: int, hidden: int, outputs: int) -> None:
    """For weights with either side the narrower: on a CPU their gradient is computed from that side."""
    shapes = [(3, 5, inputs), (inputs, hidden), (hidden,), (hidden, outputs), (outputs,)]
    values = [np.random.RandomState(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]

    def formula(x: Any, k1: Any, b1: Any, k2: Any, b2: Any, approximate: bool) -> Any:
        return jax.nn.gelu(x @ k1 + b1, approximate=approximate) @ k2 + b2

    def gradients(function: Any) -> Any:
        def loss(*values: Any) -> jax.Array:
            return jnp.mean(jnp.sin(function(*values, approximate)))

        return jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*values)

    for found, wanted in zip(gradients(ops.mlp), gradients(formula), strict=True):
        # Sums of up to 96 products in another order, a rounding each.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=96 * 2**-24 * np.abs(wanted).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on a CPU")
def test_mlp_gradient_on_cpu_computes_no_gelu_transposed() -> None:
    """Transposed, XLA computes it one value at a time: once a quarter of the demo's training step."""
    batch, tokens, inputs, hidden, outputs = 4, 17, 128, 512, 128
    shapes = [(batch, tokens, inputs), (inputs, hidden), (hidden,), (hidden, outputs), (outputs,)]
    gradient = jax.grad(lambda *values: jnp.sum(jnp.sin(ops.mlp(*values, False))), argnums=(1, 3))
    program = jax.jit(gradient).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text()
    assert f"f32[{batch * tokens},{hidden}]" in program and f"f32[{hidden},{batch * tokens}]" not in program


def test_layer_norm_keeps_a_small_variance_on_a_large_mean() -> None:
    """E[x^2] - E[x]^2 would lose it: at mean 1000 the squares are rounded to steps of 0.06."""
    x = np.float32(1000) + np.random.RandomState(0).standard_normal((3, 64)).astype(np.float32)
    exact = x.astype(np.float64)
    wanted = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ops.layer_norm(jnp.asarray(x), jnp.ones(64), jnp.zeros(64), 1e-6), wanted, atol=2e-4)


def test_arithmetic_for_nvidia_equals_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GELU and the gradients of LayerNorm; cuDNN's attention needs the GPU itself."""
    random = np.random.RandomState(0)
    x, g = (jnp.asarray(random.standard_normal((4, 7, 32)), jnp.bfloat16) for _ in range(2))
    scale, bias = (jnp.asarray(random.standard_normal(32), jnp.float32) for _ in range(2))

    def results() -> list[Any]:
        gradients = jax.vjp(lambda *inputs: ops.layer_norm(*inputs, 1e-6), x, scale, bias)[1](g)
        return [*gradients, ops.gelu(x, approximate=True)]

    wanted = results()
    monkeypatch.setattr(ops, "on_nvidia", lambda: True)
    for found, expected in zip(results()[:3], wanted[:3], strict=True):
        np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))
    # In bfloat16 throughout, where cuBLAS does not compute it: some ten roundings of 2^-9.
    gelu, exact = (np.asarray(one[3], np.float32) for one in (results(), wanted))
    np.testing.assert_allclose(gelu, exact, atol=10 * 2**-9 * np.abs(exact).max())


# ---- tokens


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_selection_moves_tokens_and_puts_them_back_bit_by_bit(dtype: Any) -> None:
    random = np.random.RandomState(1)
    tokens = jnp.asarray(random.standard_normal((3, 12, 5)), dtype)
    rank = ops.ranks(jnp.asarray(random.uniform(size=(3, 12)), jnp.float32))
    chosen = ops.selection(rank, 4, dtype)
    moved = ops.select(chosen, tokens)
    wanted = np.take_along_axis(np.asarray(tokens), np.argsort(rank, axis=1)[:, :4, None], axis=1)
    np.testing.assert_array_equal(np.asarray(moved), wanted)
    np.testing.assert_array_equal(
        np.asarray(ops.select(chosen, tokens[0])[0]), np.asarray(tokens[0])[np.argsort(rank[0])[:4]]
    )
    back = ops.put_back(chosen, moved)
    np.testing.assert_array_equal(np.asarray(back), np.where(np.asarray(rank)[..., None] < 4, np.asarray(tokens), 0))


@pytest.mark.parametrize(("batch", "tokens", "images"), [(64, 50, 4), (64, 257, 1), (3, 50, 1), (6, 16, 1)])
def test_images_are_packed_where_that_fills_tiles(batch: int, tokens: int, images: int) -> None:
    """50 tokens leave 6 rows of 56 empty, 4 x 50 none; 257 are too many to join, 3 images do not divide, 16 fill tiles."""
    packed, found = ops.pack_images(jnp.zeros((batch, tokens, 2)))
    assert (packed.shape, found) == ((batch // images, images * tokens, 2), images)
