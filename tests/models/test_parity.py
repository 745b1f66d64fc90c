"""The JAX model against transformers' ViTMAE: same weights, images and noise; logits, loss, features, all gradients.

Where PyTorch is not installed, the frozen results are used instead, with a warning.
"""

import functools
import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import mae, vit
from tests.models import make_references as reference

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
if not HAS_TORCH:
    warnings.warn(
        "PyTorch or transformers is not installed: parity is tested against the frozen references in "
        f"{reference.FOLDER} alone",
        stacklevel=1,
    )

# float32 on values of order 1: numerically equal programs differ by a few units of 1e-7; a wrong epsilon or GELU by 1e-4.
TOLERANCE = 1e-5


@functools.cache
def live(name: str) -> dict[str, np.ndarray]:
    return reference.run_torch(name)


@functools.cache
def ours(name: str) -> dict[str, Any]:
    config = mae.config(**reference.CASES[name])
    params = jax.tree.map(jnp.asarray, reference.random_params(config, seed=1))
    images, noise = (jnp.asarray(array) for array in reference.inputs(config, seed=2))

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            output = mae.bind(config, params)(images, noise)
            return output.loss, output

        (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        encoder = vit.bind(config.encoder, params["encoder"])
        tokens, hidden = encoder.encode(encoder.embed(images), range(config.encoder.depth))
        return output, gradients, tokens, hidden

    output, gradients, tokens, hidden = jax.device_get(run(params))
    named = reference.torch_names(gradients, config)
    return {
        "logits": output.prediction, "loss": output.loss, "mask": output.mask, "tokens": tokens,
        **{f"hidden.{i}": values for i, values in enumerate(hidden)},
        **{f"grad.{key}": gradient for key, gradient in named.items()},
    }  # fmt: skip


@pytest.fixture(params=[pytest.param("pytorch", marks=pytest.mark.torch), "frozen"])
def results(request: pytest.FixtureRequest) -> Any:
    return {"pytorch": live, "frozen": reference.read_frozen}[request.param]


@pytest.mark.parametrize("name", reference.CASES)
def test_outputs_and_gradients_equal_transformers(name: str, results: Any) -> None:
    wanted, found = results(name), ours(name)
    assert set(found) == set(wanted)
    np.testing.assert_array_equal(found["mask"], wanted["mask"])
    for key, values in wanted.items():
        assert found[key].shape == values.shape, key
        np.testing.assert_allclose(found[key], values, rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", reference.CASES)
def test_frozen_references_equal_live_transformers(name: str) -> None:
    wanted, frozen = live(name), reference.read_frozen(name)
    assert set(frozen) == set(wanted)
    for key, values in wanted.items():
        # Another processor's libraries may round otherwise, no more.
        np.testing.assert_allclose(frozen[key], values, rtol=0, atol=3e-6, err_msg=key)


def test_references_detect_a_wrong_epsilon_or_gelu() -> None:
    """The comparison above fails for the two most frequent mistakes."""
    config = mae.config(**reference.CASES["square"])
    params = jax.tree.map(jnp.asarray, reference.random_params(config, seed=1))
    images, noise = (jnp.asarray(array) for array in reference.inputs(config, seed=2))
    wanted = reference.read_frozen("square")["logits"]
    for change in ({"layer_norm_eps": 1e-5}, {"activation": "gelu_tanh"}):
        wrong = mae.config(**reference.CASES["square"], **change)
        prediction = jax.jit(lambda params, wrong=wrong: mae.bind(wrong, params)(images, noise).prediction)(params)
        assert np.abs(prediction - wanted).max() > 2 * TOLERANCE, change


def test_references_stay_small() -> None:
    assert sum(path.stat().st_size for path in reference.FOLDER.iterdir()) < 200_000
