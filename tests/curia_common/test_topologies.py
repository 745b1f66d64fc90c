"""Topologies: the names that people type, the counts that follow, and the nearest ones of what does not exist."""

import math

import pytest

from curia_common import topologies
from curia_common.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "api_type", "hosts", "devices"),
    [
        ("v5e-256", "v5e:16x16", "v5litepod-256", 64, 256),
        ("v5e:16x16", "v5e:16x16", "v5litepod-256", 64, 256),
        ("v5litepod-16", "v5e:4x4", "v5litepod-16", 4, 16),
        ("v6e-32", "v6e:4x8", "v6e-32", 8, 32),
        ("v4-8", "v4:2x2x1", "v4-8", 1, 4),
        ("v4-1024", "v4:8x8x8", "v4-1024", 128, 512),
        ("v5p-512", "v5p:4x8x8", "v5p-512", 64, 256),
        ("tpu7x-128", "v7x:4x4x4", "tpu7x-128", 16, 128),
    ],
)
def test_topology_name_gives_shape_type_hosts_and_devices(text, name, api_type, hosts, devices) -> None:
    found = topologies.parse(text)
    assert (str(found), found.api_type, found.hosts, found.devices) == (name, api_type, hosts, devices)
    assert found.platform == "tpu"


def test_several_slices_multiply_hosts_and_devices() -> None:
    found = topologies.parse("v5e-256", slices=2)
    assert (found.hosts, found.hosts_per_slice, found.devices, str(found)) == (128, 64, 512, "2 x v5e:16x16")


def test_machines_have_hosts_and_devices_of_each() -> None:
    found = topologies.parse("gpu:4x8")
    assert (found.platform, found.hosts, found.devices, found.chips) == ("gpu", 4, 32, 32)
    with pytest.raises(UserError, match="gpu:4x8 has no TPUs"):
        _ = found.api_type


@pytest.mark.parametrize("kind", topologies.GENERATIONS)
def test_offered_shapes_exist_with_whole_hosts(kind: str) -> None:
    shapes = topologies.offered(kind)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        found = topologies.parse(f"{kind}:{'x'.join(map(str, shape))}")
        topologies.check_offered(found)
        assert found.hosts * topologies.CHIPS_PER_HOST == math.prod(shape) <= topologies.GENERATIONS[kind].largest
    for shape in shapes[:20]:
        api_type = topologies.Topology(kind, shape).api_type
        assert math.prod(topologies.parse(api_type).shape) == math.prod(shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-250", r"there is no TPU slice v5e-250; the nearest are v5e-256 \(v5e:16x16\), v5e-128 \(v5e:8x16\), v5e-64"),
        ("v5e:16x15", r"there is no TPU slice v5e:16x15; the nearest are v5e:16x16, v5e:8x16, v5e:8x8"),
        ("v5p-0", "there is no TPU slice v5p-0; the nearest are v5p-8"),
        ("v5p:3x4x4", r"there is no TPU slice v5p:3x4x4; the nearest are v5p:"),
        ("v9-4", "no TPU chip 'v9'; there are: v4, v5e"),
        ("v5p:4x4", "v5p is a 3-D torus, such as v5p:4x4x8"),
        ("v5e", "cannot read the topology 'v5e'; write a chip and a shape or a type"),
        ("cpu:4", "cannot read the topology 'cpu:4'"),
        ("cpu-4", "write machines x devices of each, such as cpu:4x8"),
    ],
)  # fmt: skip
def test_unknown_topology_names_the_nearest_ones(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topologies.check_offered(topologies.parse(text))


def test_slices_of_machines_are_refused() -> None:
    with pytest.raises(UserError, match="gpu:4x8 has no TPU slices"):
        topologies.parse("gpu:4x8", slices=2)
