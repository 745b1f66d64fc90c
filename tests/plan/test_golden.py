"""FLOPs, memory and communication of the named runs against golden files, so that a change shows in review.

After an intended change: rm tests/golden/step_*.txt (or plan_*.txt, with `make golden`), run the tests once and look at the diff.
The plans are the same with the libtpu of both ends of what is supported.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from curia_jax import config as configs
from curia_jax import sharding
from curia_jax.objectives import mae
from curia_jax.plan import estimator, flops, topologies

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
NAMED = sorted(file.stem for file in (ROOT / "configs").glob("pretrain_vit_*.py"))


def compare(name: str, text: str) -> None:
    golden = GOLDEN / name
    if not golden.exists():
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden} did not exist; it is written now, look at it and run the test again")
    assert text == golden.read_text(encoding="utf-8")


def on_eight_devices(name: str, *overrides: str) -> mae.MAEObjective:
    """The named run's step with its batch per chip, split over 8 simulated devices instead of 256 chips."""
    config = configs.load(str(ROOT / "configs" / f"{name}.py"))
    words = [f"--config.batch_size={config.batch_size // 256 * 8}", "--config.mesh.data=1", "--config.mesh.fsdp=8"]
    config = configs.load(str(ROOT / "configs" / f"{name}.py"), [*words, "--config.model.unroll=1", *overrides])
    return mae.make(
        config, sharding.make_mesh(**config.mesh), canvas=tuple(config.data.canvas), warmup_steps=1, total_steps=100
    )


@pytest.mark.parametrize("name", NAMED)
def test_flops_and_argument_bytes_of_named_runs(name: str) -> None:
    """Per image, and bytes per device of what the step takes; from tracing alone."""
    objective = on_eight_devices(name)
    batch = objective.abstract_batch["pixels"].shape[0]
    hardware, pallas = flops.hardware_flops(objective.trace())
    held = Counter()
    for path, leaf in sharding.paths({"state": objective.abstract_state, "batch": objective.abstract_batch}).items():
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        held[path.split("/")[0]] += size
    lines = {
        "parameters": objective.parameters,
        "images per device": batch // 8,
        "model FLOPs per image": round(objective.flops_per_example),
        "hardware FLOPs per image": hardware // batch,
        "of these in Pallas kernels": pallas // batch,
        "bytes of state per device": held["state"],
        "bytes of batch per device": held["batch"],
    }
    compare(f"step_{name}.txt", "".join(f"{key}: {value:,}\n" for key, value in lines.items()))


def collectives(text: str) -> str:
    """Collectives of a compiled program by kind, type and shape, a loop's body counted once, in one line each."""
    found: Counter[tuple[str, str]] = Counter()
    for shapes, kind in re.findall(
        r"= (\([^)]*\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    ):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            found[kind, shape] += 1
    return "".join(f"{kind} {shape} x {count}\n" for (kind, shape), count in sorted(found.items()))


@pytest.mark.long
def test_collectives_of_a_named_run(uncached: Callable[[], AbstractContextManager[None]]) -> None:
    """B/16 over fsdp=8, by XLA for CPUs: weights are gathered, gradients reduced, activations stay."""
    objective = on_eight_devices("pretrain_vit_b16_224", "--config.batch_size=8", "--config.data.canvas=64")
    with uncached():
        text = collectives(objective.compile().as_text())
    compare("collectives_pretrain_vit_b16_224.txt", text)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["pretrain_vit_b16_224", "pretrain_vit_l16_224"])
def test_plans_of_named_runs_by_the_tpu_compiler(name: str, tmp_path: Path) -> None:
    """Memory, communication and step time on v5e:16x16; minutes each."""
    version = topologies.compiler_version().removeprefix("libtpu ")
    if version not in estimator.TESTED_LIBTPU:
        pytest.skip(f"the golden plans are those of libtpu {', '.join(estimator.TESTED_LIBTPU)}, not of {version}")
    compare(f"plan_{name}.txt", planned(name, tmp_path / "plan.json"))


def planned(name: str, file: Path) -> str:
    """The golden lines of a plan; figures that depend on the compiler's schedule have two digits."""
    words = [f"--config=configs/{name}.py", "--topology=v5e:16x16", f"--json={file}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", "curia_jax.plan", *words], cwd=ROOT, env=environment, check=False)
    plan = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"{key}: {plan[key]:,}" for key in ("fits", "model_flops_per_step", "hardware_flops_per_step")]
    for key in ("hbm_bytes_per_chip", "estimated_step_seconds", "estimated_mfu", "images_per_second_per_chip"):
        lines.append(f"{key}: {plan[key]:.2g}")
    for row in sorted(plan["collectives"], key=lambda row: (row["kind"], row["axis"], row["overlapped"])):
        lines.append(f"{row['kind']} over {row['axis']}: {row['count']} of {row['bytes']:,} bytes in all")
    return "\n".join(lines) + "\n"
