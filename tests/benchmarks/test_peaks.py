"""The share of a chip's peak is that of the compiled program."""

import jax
import pytest

from benchmarks import peaks
from curia_jax.plan import topologies


@pytest.mark.libtpu
def test_large_matmul_reaches_more_of_the_peak_than_a_pass_over_memory() -> None:
    topologies.prepare_environment()

    def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x @ weight

    flops, _ = peaks.reached((matmul, ((2048, 2048), (2048, 2048))), "v5e")
    assert 0.7 < flops <= 1.0
    none, memory = peaks.reached((lambda x: x + 1, ((131_072, 4096),)), "v5e")
    assert none == 0 and 0.3 < memory <= 1.0


def test_every_chip_has_a_smallest_topology_of_one_host() -> None:
    for name, topology in peaks.SMALLEST.items():
        found = topologies.parse(topology)
        assert found.chip is topologies.CHIPS[name] and found.chips == 4


def test_unknown_chip_is_refused_before_anything_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert peaks.main(["--chip=v3"]) == 2
    assert "invalid choice: 'v3'" in capsys.readouterr().err
