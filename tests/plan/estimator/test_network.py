"""Time of collectives on the links of a TPU slice and between TPU slices."""

import numpy as np
import pytest

from curia_jax.plan import topologies
from curia_jax.plan.estimator.network import Network


def network(text: str, slices: int = 1, **mesh: int) -> Network:
    """Partitions in the order of the coordinates."""
    topology = topologies.parse(text, slices)
    coordinates = np.array(list(np.ndindex(*topology.shape)))
    return Network(topology, coordinates, {"replica": 1, "data": 1, "fsdp": 1} | mesh)


def test_all_reduce_moves_twice_the_bytes_of_all_gather():
    everyone = (tuple(range(256)),)
    of = network("v5e:16x16", data=256)
    size = 10**9
    # Two closed dimensions of two links each at 45 GB/s; 8 + 8 hops.
    gather = size * 255 / 256 / (4 * 45e9) + 16e-6
    assert of.seconds("all-gather", size, everyone) == (pytest.approx(gather), 0.0)
    assert of.seconds("all-reduce", size, everyone) == (pytest.approx(2 * (gather - 16e-6) + 16e-6), 0.0)
    assert of.axes(everyone) == "data"


def test_row_of_an_open_torus_has_half_the_links():
    row = tuple(tuple(range(n, n + 4)) for n in range(0, 16, 4))
    of = network("v5e:4x4", data=4, fsdp=4)
    assert of.seconds("reduce-scatter", 10**9, row).ici == pytest.approx(1e9 * 3 / 4 / 45e9 + 3e-6)
    assert of.axes(row) == "fsdp"
    assert of.axes((tuple(range(16)),)) == "data+fsdp"


def test_collective_between_tpu_slices_uses_the_data_centre_network():
    of = network("v5e:16x16", 2, replica=2, data=256)
    assert of.seconds("all-reduce", 10**9, None) == (0.0, pytest.approx(2 * 1e9 / 2 / 3.125e9))
    assert of.axes(None) == "replica"


def test_cycles_are_seconds_at_the_clock_of_the_chip():
    of = network("v5e:16x16", 2, replica=2, data=256)
    assert of.cycles("all-reduce", 10**9, None) == pytest.approx(1e9 / 3.125e9 * 1.5e9)
