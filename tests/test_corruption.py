"""A chip that computes wrongly: one flipped bit on one of eight devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from curia_common.errors import RestartError
from curia_jax import corruption, sharding
from tests import two_hosts

SPECS = {"step": P(), "params": {"bias": P(), "kernel": P("fsdp")}}


class Loop:
    """Steps of a state with split and replicated arrays on a mesh of 2 x 2 x 2. `flip` changes the state after a call of step."""

    def __init__(self, every: int, flip: Callable[[int, Any], Any] = lambda call, state: state) -> None:
        self.mesh = sharding.make_mesh(2, 2, 2)
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), SPECS)
        state = {"step": jnp.int32(0), "params": {"bias": jnp.arange(3.0), "kernel": jnp.arange(8, dtype=jnp.bfloat16)}}
        self.state = jax.device_put(state, shardings)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state
        )
        advance = jax.jit(
            lambda state, batch: jax.tree.map(lambda leaf: leaf + 1, state), out_shardings=shardings, donate_argnums=0
        )
        self.calls = 0

        def step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
            self.calls += 1
            return flip(self.calls, advance(state, batch)), {}

        self.check = corruption.Check(step, abstract, self.mesh, start_step=0, every=every)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.state, _ = self.check(self.state, None)


def flip_bit(array: jax.Array, device: int, element: int, bit: int) -> jax.Array:
    """The array with one bit of one device's copy flipped."""
    parts = []
    for shard in array.addressable_shards:
        values = np.array(shard.data)
        if shard.device.id == device:
            values.view(np.uint8).reshape(values.size, -1)[element, bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_every_kth_step_is_computed_twice_and_counts_once() -> None:
    loop = Loop(every=3)
    loop.run(7)
    assert loop.calls == 7 + 2 and int(loop.state["step"]) == 7


@pytest.mark.parametrize("bit", [0, 7, 15])
@pytest.mark.parametrize("call", [5, 6])  # the first and the second time of step 4
def test_bit_flipped_in_a_computation_is_found_and_its_device_named(call: int, bit: int) -> None:
    def flip(number: int, state: Any) -> Any:
        if number == call:
            state["params"]["kernel"] = flip_bit(state["params"]["kernel"], device=5, element=2, bit=bit)
        return state

    loop = Loop(every=2, flip=flip)
    with pytest.raises(RestartError) as error:
        loop.run(10)
    assert error.value.exit_code == 75
    assert str(error.value).startswith(
        "step 4 computed twice, gave different results on device 5 of host 0 (first in params/kernel): a chip computes wrongly"
    )
    assert "The last check that passed was at step 2: remove the checkpoints after it" in str(error.value)


@pytest.mark.parametrize("element", [0, 2])
def test_copy_of_a_replicated_array_that_differs_is_found(element: int) -> None:
    def flip(number: int, state: Any) -> Any:
        if number == 1:  # before the first check; both computations of step 2 have it
            state["params"]["bias"] = flip_bit(state["params"]["bias"], device=3, element=element, bit=4)
        return state

    with pytest.raises(
        RestartError, match=r"left different copies of the same values on device 3 of host 0 \(first in params/bias\)"
    ):
        Loop(every=2, flip=flip).run(10)


def test_copies_of_a_split_array_are_compared_along_the_other_axes() -> None:
    def flip(number: int, state: Any) -> Any:
        if number == 1:
            state["params"]["kernel"] = flip_bit(state["params"]["kernel"], device=6, element=1, bit=9)
        return state

    with pytest.raises(RestartError, match=r"different copies .* on device 6 of host 0 \(first in params/kernel\)"):
        Loop(every=2, flip=flip).run(10)


def test_bit_flipped_on_one_of_two_hosts_ends_both_with_75(tmp_path: Any) -> None:
    ends = two_hosts.run(tmp_path, "flip")
    assert [end.code for end in ends] == [75, 75]
    # Two copies, and nobody knows which is right.
    assert all("different copies of the same values on device" in end.err and "host 1" in end.err for end in ends)
