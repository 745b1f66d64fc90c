"""Variables of processes on TPUs, read by the libtpu that is installed."""

import os
import subprocess
import sys

import pytest

from curia_common import tpu_environment
from curia_common.topologies import GENERATIONS

# Describes two TPU slices of a chip, for which libtpu reads its flags, and compiles a sum over all of their devices for them, with the
# options that training gives the compiler.
PROGRAM = """
import sys, jax, numpy as np
from jax.experimental.topologies import get_topology_desc
from curia_jax import xla_flags
kind, shape, options = sys.argv[1], sys.argv[2], {"num_slices": 2}
if kind == "v4":
    options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
devices = get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
mesh = jax.sharding.Mesh(np.array(devices), ("all",))
split, whole = (jax.sharding.NamedSharding(mesh, jax.P(name)) for name in ("all", None))
given = jax.ShapeDtypeStruct((8 * len(devices), 128), "bfloat16", sharding=split)
lowered = jax.jit(lambda x: x.T @ x, out_shardings=whole).lower(given)
lowered.compile(compiler_options=xla_flags.compiler_options(devices[0].device_kind, 2))
print(*sorted({device.slice_index for device in devices}))
"""
# What lets libtpu load on a machine without a TPU.
ELSEWHERE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def load(kind: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    name = {"v7x": "tpu7x"}.get(kind, kind)
    shape = "2x2" if GENERATIONS[kind].dimensions == 2 else "2x2x1"
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name, shape], env={**os.environ, **variables, **ELSEWHERE},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.libtpu
@pytest.mark.parametrize("kind", GENERATIONS)
def test_libtpu_accepts_the_flags_for_every_chip(kind: str) -> None:
    found = load(kind, dict(tpu_environment.of(2)))
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == ["0", "1"]


@pytest.mark.libtpu
def test_libtpu_refuses_a_flag_that_it_does_not_have() -> None:
    """Which is why the test above says something."""
    found = load("v5e", {"LIBTPU_INIT_ARGS": "--megascale_no_such_flag=true"})
    assert found.returncode != 0 and "Unknown command line flag" in found.stderr


def test_flags_between_slices_are_for_several_slices_alone() -> None:
    assert tpu_environment.LIBTPU_FLAGS not in tpu_environment.of(1)
    assert (
        "--megascale_error_reporter_abort_on_hang=true" in tpu_environment.of(2)[tpu_environment.LIBTPU_FLAGS].split()
    )
    assert tpu_environment.of(1)["JAX_PLATFORMS"].startswith("tpu")
