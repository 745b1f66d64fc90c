"""TPU topologies: names and counts."""

import pytest

from curia_common.errors import UserError
from curia_jax.plan import topologies


def test_topology_counts_chips_devices_and_hosts():
    two = topologies.parse("v6e:16x16", 2)
    assert (two.chips, two.devices, two.hosts, str(two)) == (512, 512, 128, "2 x v6e:16x16")
    ironwood = topologies.parse("tpu7x:2x2x1")
    assert (ironwood.kind, ironwood.chips, ironwood.devices, ironwood.hosts) == ("v7x", 4, 8, 1)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e", 1, "cannot read the topology 'v5e'; write .* v5e:16x16"),
        ("v9:4x4", 1, "no TPU chip 'v9'; there are: v4, v5e"),
        ("v5p:4x4", 1, "v5p is a 3-D torus, such as v5p:4x4x8"),
        ("v5e:0x4", 1, "2-D torus"),
        ("v5e:4x4", 0, "--slices is 0"),
    ],
)
def test_impossible_topology_raises(text: str, slices: int, message: str):
    with pytest.raises(UserError, match=message):
        topologies.parse(text, slices)


def test_peak_flops_equal_those_of_telemetry():
    from curia_jax import telemetry

    names = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "v7x": "TPU7x"}
    for kind, name in names.items():
        chip = topologies.CHIPS[kind]
        assert chip.flops / chip.devices == telemetry.PEAK_FLOPS[name]
