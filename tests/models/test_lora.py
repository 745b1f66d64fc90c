"""Adapters: they change nothing when new, and a merged kernel computes what the adapter adds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import sharding
from curia_jax.models import lora, vit

MODEL = vit.config(
    "custom",
    image_size=16,
    patch_size=8,
    width=16,
    depth=2,
    heads=2,
    mlp_width=24,
    dtype="float32",
    layer_norm_eps=1e-6,
)
ALL = lora.LoRAConfig(3, 6.0, tuple(lora.TARGETS))


@pytest.fixture(scope="module")
def encoder() -> Any:
    return vit.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(encoder: Any) -> Any:
    """Trained ones: `b` is no longer zero."""
    new = lora.init(ALL, encoder, jax.random.key(1))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.1 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape), new
    )


def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)), jnp.float32)


def tokens(encoder: Any, config: lora.LoRAConfig, adapters: Any) -> np.ndarray:
    return np.asarray(lora.attach(vit.bind(MODEL, encoder), config, adapters)(images()))


def test_merged_encoder_computes_what_the_adapters_do(encoder: Any, adapters: Any) -> None:
    unmerged = tokens(encoder, ALL, adapters)
    merged = np.asarray(vit.bind(MODEL, lora.merged(encoder, ALL, adapters))(images()))
    np.testing.assert_allclose(merged, unmerged, atol=2e-6)
    assert np.abs(unmerged - np.asarray(vit.bind(MODEL, encoder)(images()))).max() > 0.1


@pytest.mark.parametrize("name", lora.TARGETS)
def test_merged_kernel_is_kernel_plus_scaled_product(name: str, encoder: Any, adapters: Any) -> None:
    only = lora.LoRAConfig(3, 6.0, (name,))
    part = lora.TARGETS[name]
    one = {"blocks": {part: {name: adapters["blocks"][part][name]}}}
    before, after = sharding.paths(encoder), sharding.paths(lora.merged(encoder, only, one))
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        f"blocks/{part}/{name}/kernel"
    }
    a, b = (np.asarray(one["blocks"][part][name][side], np.float64) for side in "ab")
    wanted = np.asarray(before[f"blocks/{part}/{name}/kernel"]) + 6 / 3 * np.einsum("dir,dro->dio", a, b)
    np.testing.assert_allclose(after[f"blocks/{part}/{name}/kernel"], wanted, atol=1e-6)


def test_new_adapters_change_nothing(encoder: Any) -> None:
    new = lora.init(ALL, encoder, jax.random.key(1))
    np.testing.assert_allclose(tokens(encoder, ALL, new), vit.bind(MODEL, encoder)(images()), atol=1e-6)
    a = new["blocks"]["mlp"]["fc2"]["a"]
    assert a.shape == (2, 24, 3) and 0.9 * 24**-0.5 < np.abs(a).max() <= 24**-0.5


def test_rank_zero_has_no_adapters(encoder: Any) -> None:
    none = lora.LoRAConfig(0, 6.0, ("qkv",))
    assert lora.init(none, encoder, jax.random.key(1)) == {}
    np.testing.assert_array_equal(tokens(encoder, none, {}), vit.bind(MODEL, encoder)(images()))
    assert sharding.paths(lora.merged(encoder, none, {})).keys() == sharding.paths(encoder).keys()


def test_gradients_reach_the_adapters_as_through_the_merged_kernels(encoder: Any, adapters: Any) -> None:
    def loss(adapters: Any, merge: bool) -> jax.Array:
        if merge:
            found = vit.bind(MODEL, lora.merged(encoder, ALL, adapters))(images())
        else:
            found = lora.attach(vit.bind(MODEL, encoder), ALL, adapters)(images())
        return jnp.sum(jnp.sin(found))

    apart, together = (sharding.paths(jax.grad(loss)(adapters, merge)) for merge in (False, True))
    for path, gradient in together.items():
        np.testing.assert_allclose(apart[path], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1, 1.0, ("qkv",)), "rank is -1; it has to be at least 0"),
        ((2, 1.0, ("qkv", "norm1")), r"targets is 'qkv\+norm1'; it may be some of qkv\+proj\+fc1\+fc2"),
        ((2, 1.0, ("qkv", "qkv")), "targets is 'qkv.qkv'"),
        ((2, 1.0, ()), "targets is ''"),
    ],
)
def test_config_names_the_field_that_is_wrong(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(*fields)
