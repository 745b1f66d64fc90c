"""Counts the matmul FLOPs of a traced program, recomputation included. A multiply-add counts as two, in any precision."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend import core

from curia_jax.plan.estimator.accounting import Shapes


class Flops(NamedTuple):
    """Matmul FLOPs, and those among them that are inside Pallas kernels."""

    total: int
    pallas: int


def hardware_flops(traced: jax.stages.Traced) -> Flops:
    """FLOPs of a traced program over all devices."""
    return _count(traced.jaxpr.jaxpr)


def pallas_flops(traced: jax.stages.Traced) -> dict[Shapes, int]:
    """FLOPs of one call of each Pallas kernel on one device, by the shapes of its results."""
    found: dict[Shapes, int] = {}

    def walk(jaxpr: core.Jaxpr) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                shapes = tuple(_shape(out) for out in equation.outvars)
                flops = math.prod(equation.params["grid_mapping"].grid)
                flops *= sum(_count(inner).total for inner in _called(equation))
                found[shapes] = max(flops, found.get(shapes, 0))
            else:
                for inner in _called(equation):
                    walk(inner)

    walk(traced.jaxpr.jaxpr)
    return found


def _count(jaxpr: core.Jaxpr) -> Flops:
    total = pallas = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[d] for d in contracted)
            continue
        if name == "conv_general_dilated":
            spec = params["dimension_numbers"].rhs_spec
            filters = _shape(equation.invars[1])
            per_output = math.prod(filters) // filters[spec[0]]
            total += 2 * math.prod(_shape(equation.outvars[0])) * per_output
            continue
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        elif name == "shard_map":
            times = params["mesh"].size
        inner = [_count(one) for one in _called(equation)]
        if name == "cond":  # which branch runs is not known: the most expensive counts
            inner = [max(inner)] if inner else []
        for one in inner:
            total += times * one.total
            pallas += times * (one.total if name == "pallas_call" else one.pallas)
    return Flops(total, pallas)


def _shape(value: core.Var | core.Literal) -> tuple[int, ...]:
    assert isinstance(value.aval, ShapedArray)
    return value.aval.shape


def _called(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Programs inside an equation; of branches for several platforms, the TPU's."""
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        values = equation.params.values()
    else:
        chosen = next(n for n, names in enumerate(platforms) if names is None or "tpu" in names)
        values = [equation.params["branches"][chosen]]
    for value in values:
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
