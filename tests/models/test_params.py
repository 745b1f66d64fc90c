"""Modules to nested dicts of parameters and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curia_jax.models import params


class Two(nnx.Module):
    """Two layers, y = (x A + a) B + b."""

    def __init__(self, width: int = 3) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(2, width, rngs=rngs)
        self.second = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


def tree() -> dict[str, Any]:
    return {
        "first": {"kernel": jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "bias": jnp.asarray([0.5, 0.0, -0.5])},
        "second": {"kernel": jnp.asarray([[1.0], [10.0], [100.0]]), "bias": jnp.asarray([7.0])},
    }


def test_module_computes_with_the_given_parameters() -> None:
    module = params.from_dict(Two, tree())
    # (1, 1) A + a = (5.5, 7, 8.5), times (1, 10, 100) and 7.
    np.testing.assert_array_equal(module(jnp.ones(2)), [5.5 + 70 + 850 + 7])
    back = params.to_dict(module)
    assert jax.tree.structure(back) == jax.tree.structure(tree())
    jax.tree.map(np.testing.assert_array_equal, back, tree())


def test_own_parameters_are_not_computed() -> None:
    def make() -> Two:
        module = Two()
        assert isinstance(module.first.kernel.get_value(), jax.core.Tracer)
        return module

    params.from_dict(make, tree())


def test_module_of_traced_parameters_is_differentiable() -> None:
    gradient = jax.grad(lambda values: params.from_dict(Two, values)(jnp.ones(2))[0])(tree())
    np.testing.assert_array_equal(gradient["second"]["kernel"], [[5.5], [7.0], [8.5]])
    np.testing.assert_array_equal(gradient["first"]["bias"], [1.0, 10.0, 100.0])


def test_other_tree_is_refused_with_the_first_three_differences() -> None:
    other = tree()
    other["second"]["scale"] = other["second"].pop("bias")
    with pytest.raises(ValueError, match="parameters do not fit the model") as error:
        params.from_dict(lambda: Two(4), other)
    assert str(error.value).endswith(
        "first/bias is (3,), wanted (4,); first/kernel is (2, 3), wanted (2, 4); "
        "second/bias is missing, wanted (1,); and 2 more"
    )
    with pytest.raises(ValueError, match=r"second/scale is \(1,\), wanted nothing$"):
        params.from_dict(Two, tree() | {"second": tree()["second"] | {"scale": jnp.ones(1)}})
