"""Parameters as plain nested dicts of arrays, and NNX modules made from them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

# Nested dicts by name, with float32 arrays (or their ShapeDtypeStructs) as leaves.
Params = Mapping[str, Any]
Module = TypeVar("Module", bound=nnx.Module)


def to_dict(module: nnx.Module) -> Params:
    """Parameters of a module."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def from_dict(make: Callable[[], Module], params: Params) -> Module:
    """The module that `make()` builds, with `params` in place of its own, which are never computed.

    Raises:
      ValueError: trees or shapes differ; the first tensors that do are named.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    wanted = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))
    found = jax.tree.map(jnp.shape, params)
    if wanted != found:
        raise ValueError(f"parameters do not fit the model: {_difference(wanted, found)}")
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graph, state)


def _difference(wanted: Params, found: Params) -> str:
    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    a, b = shapes(wanted), shapes(found)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    lines = [f"{name} is {b.get(name, 'missing')}, wanted {a.get(name, 'nothing')}" for name in names]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
