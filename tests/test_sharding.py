"""Meshes, the table from parameter to PartitionSpec, and the sharding of moments."""

import itertools
import re
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import optimizer, sharding
from curia_jax.models import mae, vit
from curia_jax.objectives.mae import RULES

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return sharding.make_mesh(replica=2, data=2, fsdp=2)


def state_of(size: str, mesh: Mesh) -> Any:
    model = mae.config(size=size)
    params = jax.eval_shape(lambda: mae.init(model, jax.random.key(0)))
    transform, _ = optimizer.make(
        configs.load("configs/demo.py").optimizer, batch_size=256, warmup_steps=1, total_steps=10
    )
    shardings = sharding.parameter_shardings(params, mesh, RULES)
    moments = sharding.optimizer_shardings(transform, params, shardings, mesh)
    return params, shardings, jax.eval_shape(transform.init, params), moments


def describe(tree: Any, shardings: Any) -> str:
    """One line per leaf: path, shape, PartitionSpec."""
    specs = sharding.paths(jax.tree.map(lambda s: s.spec, shardings, is_leaf=lambda s: isinstance(s, NamedSharding)))
    leaves = sorted(sharding.paths(tree).items())
    return "".join(f"{path} {tuple(leaf.shape)} {specs[path]}\n" for path, leaf in leaves)


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_partition_specs_are_the_golden_ones(size: str, mesh: Mesh) -> None:
    """After an intended change: rm tests/golden/sharding_*.txt, run this test once and look at the diff."""
    params, shardings, opt_state, moments = state_of(size, mesh)
    text = "parameters\n" + describe(params, shardings) + "optimizer\n" + describe(opt_state, moments)
    golden = GOLDEN / f"sharding_{size}.txt"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
        pytest.fail(f"{golden} did not exist; it was written now; review it and run the test again")
    assert text == golden.read_text()


def test_moments_are_sharded_like_their_parameters(mesh: Mesh) -> None:
    params, shardings, opt_state, moments = state_of("B", mesh)
    wanted = {path: s.spec for path, s in sharding.paths(shardings).items()}
    found = {"mu": 0, "nu": 0}
    for path, leaf in sharding.paths(moments).items():
        match = re.search(r"\b(mu|nu)/(.*)", path)
        if match:
            assert leaf.spec == wanted[match[2]], path
            found[match[1]] += 1
    assert found == {"mu": len(wanted), "nu": len(wanted)}


def test_moments_on_devices_have_the_promised_sharding(mesh: Mesh) -> None:
    params, shardings, _, moments = state_of("Ti", mesh)
    live = jax.jit(lambda: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), params), out_shardings=shardings)()
    transform, _ = optimizer.make(
        configs.load("configs/demo.py").optimizer, batch_size=256, warmup_steps=1, total_steps=10
    )
    state = jax.jit(transform.init, out_shardings=moments)(live)
    kernel = optax.tree.get(state, "mu")["encoder"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", None)
    assert kernel.addressable_shards[0].data.shape[1] * 2 == kernel.shape[1]


def test_at_most_two_percent_of_bytes_are_replicated(mesh: Mesh) -> None:
    params, shardings, _, _ = state_of("L", mesh)
    sizes = {path: leaf.size for path, leaf in sharding.paths(params).items()}
    whole = sum(sizes[path] for path, s in sharding.paths(shardings).items() if "fsdp" not in s.spec)
    assert whole / sum(sizes.values()) < 0.02


def test_parameter_without_a_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sharding rule matches parameter surprise/kernel"):
        sharding.parameter_specs(
            {"surprise": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}, ((r"other", P()),)
        )


def test_rule_without_a_parameter_is_an_error() -> None:
    params = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match=r"match no parameter.*ghost"):
        sharding.parameter_specs(params, ((r"a", P()), (r"ghost", P())))


def test_encoder_only_model_has_a_table_of_its_own(mesh: Mesh) -> None:
    params = {"encoder": jax.eval_shape(lambda: vit.init(vit.config(size="Ti"), jax.random.key(0)))}
    specs = sharding.paths(sharding.parameter_specs(params, sharding.encoder_rules("encoder")))
    assert specs["encoder/blocks/attn/qkv/kernel"] == P(None, "fsdp", None)
    with pytest.raises(ValueError, match="match no parameter.*decoder"):
        sharding.parameter_specs(params, RULES)


def test_dimension_that_does_not_divide_names_parameter_and_axis() -> None:
    mesh = sharding.make_mesh(data=1, fsdp=8)
    rules = ((r"odd", P("fsdp")),)
    with pytest.raises(UserError, match=r"odd has a dimension of 12, which does not divide over fsdp=8"):
        sharding.parameter_shardings({"odd": jax.ShapeDtypeStruct((12,), jnp.float32)}, mesh, rules)


@pytest.mark.parametrize(
    ("sizes", "shape"), [({}, (1, 8, 1)), ({"fsdp": 4}, (1, 2, 4)), ({"replica": 2, "data": 1, "fsdp": -1}, (2, 1, 4))]
)
def test_mesh_has_the_wanted_sizes(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == shape
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


def chips(slices: int, side: int) -> list[Any]:
    """Fake TPU slices of side x side chips."""
    of_all = {"platform": "tpu", "device_kind": "TPU v5 lite", "process_index": 0, "core_on_chip": 0}
    places = itertools.product(range(slices), range(side), range(side))
    return [
        mock.Mock(spec=jax.Device, id=number, slice_index=number_of_slice, coords=(x, y, 0), **of_all)
        for number, (number_of_slice, y, x) in enumerate(places)
    ]


@pytest.mark.parametrize("slices", [1, 2])
def test_mesh_axis_may_split_a_torus_dimension(slices: int) -> None:
    """On several TPU slices as on one; each replica is a TPU slice."""
    mesh = sharding.make_mesh(slices, data=2, fsdp=8, devices=chips(slices, side=4))
    assert mesh.devices.shape == (slices, 2, 8)
    for number, of_slice in enumerate(mesh.devices):
        assert {chip.slice_index for chip in of_slice.flat} == {number}
        assert len({chip.coords for chip in of_slice.flat}) == 16


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 16}, {"data": 4, "fsdp": 4}, {"data": -1, "fsdp": -1}, {"data": 0}]
)
def test_mesh_that_does_not_fit_the_devices_is_an_error(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="does not fit 8 devices; set --config.mesh.replica=1"):
        sharding.make_mesh(**sizes)


def test_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"batch_size 100 does not divide over 8 devices .*--config.batch_size=96 or 104"
    ):
        sharding.check_batch(100, sharding.make_mesh())


def test_batch_is_split_over_every_device() -> None:
    mesh = sharding.make_mesh(replica=2, data=2, fsdp=2)
    batch = jax.device_put(jnp.arange(16), sharding.batch_sharding(mesh))
    assert isinstance(batch.sharding, NamedSharding)
    assert [s.data.shape for s in batch.addressable_shards] == [(2,)] * 8
