"""Silent corruption: chips that compute wrongly without an error.

Every so many steps one step is computed twice and compared bit by bit, and the copies of what several devices hold in common are
compared with each other. Of each array a device computes a 32-bit sum in which every flipped bit shows; only these sums travel.

Costs, per check: one more step, one copy of the state in device memory while it lasts, and a wait of the host for both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, UInt32

from curia_common.errors import RestartError
from curia_jax import sharding

Step = Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]


class Check:
    """A train step that checks itself: (state, batch) -> (state, metrics).

    Args:
      step: compiled; donates the state.
      abstract: the state as ShapeDtypeStructs with shardings.
      start_step: steps that the first state has taken.
      every: steps between checks, at least 1.
    """

    def __init__(self, step: Step, abstract: PyTree, mesh: Mesh, *, start_step: int, every: int) -> None:
        self._step, self._mesh, self._every = step, mesh, every
        self._taken, self._good = start_step, start_step
        self._names = list(sharding.paths(abstract))
        leaves = jax.tree.leaves(abstract)
        self._specs = [leaf.sharding.spec for leaf in leaves]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        self._sums = jax.jit(functools.partial(_sums, mesh, self._specs), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Mapping[str, jax.Array]]:
        """Takes a step.

        Raises:
          RestartError: results differ; names the devices, their hosts and the last check that passed.
        """
        self._taken += 1
        if self._taken % self._every:
            return self._step(state, batch)
        once, _ = self._step(self._copy(state), batch)
        first = np.asarray(jax.device_get(self._sums(once)))
        del once  # or there would be three states
        state, metrics = self._step(state, batch)
        second = np.asarray(jax.device_get(self._sums(state)))
        self._compare(first != second, "computed twice, gave different results")
        self._compare(self._deviating(second), "left different copies of the same values")
        self._good = self._taken
        return state, metrics

    def _deviating(self, sums: UInt32[np.ndarray, "*mesh arrays"]) -> np.ndarray:
        """Which devices hold another copy than most; where two are as frequent, all that hold either."""
        wrong = np.zeros(sums.shape, bool)
        for array, spec in enumerate(self._specs):
            split = {name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,)) if name}
            same = [axis for axis, name in enumerate(self._mesh.axis_names) if name not in split]
            found = np.moveaxis(sums[..., array], same, range(len(same)))
            copies = found.reshape(int(np.prod(found.shape[: len(same)], dtype=int)), -1)
            marks = np.zeros(copies.shape, bool)
            for group in range(copies.shape[1]):
                values, counts = np.unique(copies[:, group], return_counts=True)
                if len(values) > 1:
                    usual = values[counts == counts.max()]
                    marks[:, group] = ~np.isin(copies[:, group], usual) if len(usual) == 1 else True
            wrong[..., array] = np.moveaxis(marks.reshape(found.shape), range(len(same)), same)
        return wrong

    def _compare(self, wrong: np.ndarray, what: str) -> None:
        if not wrong.any():
            return
        devices: list[Any] = [self._mesh.devices[tuple(index)] for index in np.argwhere(wrong.any(-1))]
        who = ", ".join(f"device {device.id} of host {device.process_index}" for device in devices[:4])
        who += f" and {len(devices) - 4} more" if len(devices) > 4 else ""
        array = self._names[int(np.argwhere(wrong)[0][-1])]
        raise RestartError(
            f"step {self._taken} {what} on {who} (first in {array}): a chip computes wrongly; run without that machine. The last "
            f"check that passed was at step {self._good}: remove the checkpoints after it, and rerun the same command"
        )


def _sums(mesh: Mesh, specs: list[Any], state: PyTree) -> UInt32[Array, "*mesh arrays"]:
    """Of every array, the sum of each device's own part: an axis for each of the mesh, then the arrays."""
    axes = mesh.axis_names

    def local(*parts: jax.Array) -> jax.Array:
        return jnp.stack([_sum(part) for part in parts]).reshape((1,) * len(axes) + (len(parts),))

    summed = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=P(*axes, None), check_vma=False)
    return summed(*jax.tree.leaves(state))


def _sum(values: jax.Array) -> UInt32[Array, ""]:
    """Modulo 2**32, each value's bits times an odd number that depends on its place, so that no single flipped bit cancels."""
    if values.dtype == jnp.bool_:
        values = values.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[values.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(values, unsigned).astype(jnp.uint32).ravel()
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
