"""The plain baseline of docs/performance.md computes the function that the model computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plain_step
from curia_jax.models import mae
from tests.models.test_mae import setup


@pytest.mark.parametrize("fields", [{}, {"activation": "gelu_tanh", "attention": "pallas", "unroll": 2}])
def test_plain_loss_and_gradients_equal_those_of_the_model(fields: dict[str, Any]) -> None:
    """float32, within 1e-5 of the largest entry of each tensor."""
    config, params, images, noise = setup(dtype="float32", **fields)

    def model(params: Any) -> jax.Array:
        return mae.bind(config, params)(images, noise).loss

    wanted, gradients = jax.jit(jax.value_and_grad(lambda p: plain_step.loss(config, p, images, noise)[0]))(params)
    found, found_gradients = jax.jit(jax.value_and_grad(model))(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9),
        found_gradients,
        gradients,
    )
