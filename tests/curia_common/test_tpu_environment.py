"""Variables of processes on TPUs, read by the libtpu that is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curia_common import tpu_environment
from curia_common.topologies import GENERATIONS, Topology, offered

ROOT = Path(__file__).resolve().parents[2]

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
# Compiles the train step for two TPU slices of a chip, the smallest there are, as pretrain compiles it there, past the planner's cache of answers. The
# model has the sizes of tests/configs/tiny.py: more of the same takes the compiler minutes.
STEP = """
import sys
from curia_jax import config
from curia_jax.plan import compiler, topologies
there = topologies.parse(sys.argv[1], 2)
tiny = config.load("tests/configs/tiny.py", []).model
sizes = ("width", "depth", "heads", "mlp_width", "image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads")
overrides = ["--config.model.size=custom", "--config.model.unroll=1", *(f"--config.model.{name}={tiny[name]}" for name in sizes)]
overrides += ["--config.mesh.replica=2", "--config.mesh.data=-1", "--config.mesh.fsdp=2", f"--config.batch_size={4 * there.devices}"]
step = compiler.trace_step(config.load("pretrain_vit_b16_224", overrides), there, examples=10_000, canvas=(32, 32))
found = compiler.compile_for(there, step.traced, options=step.objective.compiler_options)
assert not found.cached
print(there.devices, step.mesh.size, found.fits, found.memory["arguments"], step.objective.parameters)
"""
# What lets libtpu load on a machine without a TPU.
ELSEWHERE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def smallest(kind: str) -> str:
    """Shape of the smallest TPU slice."""
    return Topology(kind, offered(kind)[0]).shape_text


def load(kind: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    name = {"v7x": "tpu7x"}.get(kind, kind)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name, smallest(kind)], env={**os.environ, **variables, **ELSEWHERE},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.libtpu
@pytest.mark.parametrize("kind", GENERATIONS)
def test_libtpu_accepts_the_flags_for_every_chip(kind: str) -> None:
    found = load(kind, dict(tpu_environment.of(2)))
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == ["0", "1"]


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", GENERATIONS)
def test_train_step_compiles_for_every_chip_with_its_environment(kind: str, tmp_path: Path) -> None:
    variables = {**os.environ, **tpu_environment.of(2), **ELSEWHERE, "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", STEP, f"{kind}:{smallest(kind)}"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    devices, mesh, fits, arguments, parameters = found.stdout.split()
    assert devices == mesh == str(2 * 4 * GENERATIONS[kind].devices) and fits == "True"
    # A device has half of the parameters and of their two moments, float32.
    assert int(arguments) >= int(parameters) * 12 / 2


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
