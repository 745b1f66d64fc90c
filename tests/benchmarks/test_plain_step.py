"""The baseline of docs/performance.md computes what the model computes, the slow way."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import mae
from tests.models.test_mae import setup

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plain_step.py"


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fields", [{}, {"activation": "gelu_tanh", "attention": "pallas", "unroll": 2}])
def test_loss_and_gradients_are_those_of_the_model(plain: ModuleType, fields: dict[str, Any]) -> None:
    """float32, within 1e-5 of the largest entry of each tensor."""
    config, params, images, noise = setup(dtype="float32", **fields)

    def model(params: Any) -> jax.Array:
        return mae.bind(config, params)(images, noise).loss

    wanted, gradients = jax.jit(jax.value_and_grad(lambda p: plain.loss(config, p, images, noise)[0]))(params)
    found, found_gradients = jax.jit(jax.value_and_grad(model))(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9),
        found_gradients,
        gradients,
    )
