"""Pretraining on a pod of four processes: stopped, killed and started again, it ends with the parameters of an undisturbed run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from curia_jax import config as configs
from curia_jax import lease, saving, sharding
from curia_jax.objectives import mae

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = ["--config.devices.multihost=true", "--config.devices.cpu_count=0", "--config.devices.heartbeat_seconds=10"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # 16 processes compile the step


def launcher(folder: Path, *words: str, **variables: str) -> dict[str, Any]:
    """Runs the launcher to its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"XDG_STATE_HOME": str(folder), "PYTHONPATH": str(ROOT), "MODULE": "tests.launch.training"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.launch.launcher", *words], cwd=ROOT, env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip
    return {"code": found.returncode, "out": found.stdout, "err": found.stderr}


@pytest.fixture(scope="session")
def launched(once: Callable[[str, Callable[[Path], None]], Path], tiny_shards: Path) -> Path:
    """Runs of 12 steps on four processes: `straight` undisturbed; `broken` with SIGTERM to its launcher at batch 3 of attempt 1, and
    process 2 killed at batch 5 of attempt 2."""

    def build(folder: Path) -> None:
        def words(name: str) -> list[str]:
            command = [
                "pretrain",
                "--config=tests/configs/tiny.py",
                f"--workdir={folder}/{name}",
                f"--config.data.shards={tiny_shards}",
            ]
            return ["--target=local", "--topology=cpu:4x1", "--", *command, *OVERRIDES]

        faults = {"FAULTS": "1:0:3:stop 2:2:5:kill"}
        results = {
            "straight": launcher(folder, *words("straight")),
            "stopped": launcher(folder, *words("broken"), **faults),
            "restarted": launcher(folder, "restart", "broken", **faults),
            "status": launcher(folder, "status", "broken"),
        }
        (folder / "results.json").write_text(json.dumps(results))

    return once("launched", build)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def events(workdir: Path) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [(event["event"], event["step"]) for event in found]


def test_undisturbed_run_finishes_in_one_attempt(launched: Path) -> None:
    found = results(launched)["straight"]
    assert found["code"] == 0, found
    assert (
        "[0] 48 slices, canvas 32x32;" in found["out"]
        and "4 x cpu as {'replica': 1, 'data': 2, 'fsdp': 2}" in found["out"]
    )
    assert "attempt 2" not in found["out"] and found["out"].endswith("[launch] finished\n")


def test_sigterm_to_the_launcher_saves_and_exits_75(launched: Path) -> None:
    found = results(launched)["stopped"]
    assert found["code"] == 75, found
    step = next(step for event, step in events(launched / "broken") if event == "preempted")
    assert f"[launch] stopped, from the checkpoint of step {step} next; python -m launch restart broken" in found["out"]


def test_killed_process_restarts_the_run_from_its_checkpoint(launched: Path) -> None:
    found = results(launched)["restarted"]
    assert found["code"] == 0, found
    assert "[launch] process 2 was killed by SIGKILL; starting again" in found["out"]
    assert "[launch] attempt 3: 4 processes, from the checkpoint of step" in found["out"]
    assert [event for event, _ in events(launched / "broken") if event in ("started", "resumed", "finished")] == [
        "started", "resumed", "resumed", "finished",
    ]  # fmt: skip
    status = results(launched)["status"]["out"]
    assert status.startswith("run broken: finished, attempt 3") and "newest checkpoint: step 12" in status


def test_disturbed_run_ends_with_the_state_of_an_undisturbed_one(launched: Path) -> None:
    check_same_state(str(launched / "straight"), str(launched / "broken"))


def check_same_state(*workdirs: str) -> None:
    """Both have the state of step 12, bit for bit."""
    config = configs.load("tests/configs/tiny.py")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    objective = mae.make(config, mesh, canvas=(32, 32), warmup_steps=1, total_steps=12)
    states = []
    for workdir in workdirs:
        checkpointer = saving.Checkpointer(workdir)
        state = checkpointer.restore(objective.abstract_state)
        checkpointer.close()
        assert int(state["step"]) == 12
        states.append(sharding.paths(state))
    for path, leaf in states[0].items():
        assert np.asarray(leaf).tobytes() == np.asarray(states[1][path]).tobytes(), path


@pytest.mark.bucket
def test_disturbed_run_in_a_bucket_ends_as_an_undisturbed_one(bucket: str, tmp_path: Path, tiny_shards: Path) -> None:
    """Process 0 is killed between the data and the marker of the checkpoint of step 8, then process 1 at a batch."""

    def launch(workdir: str, *options: str, steps: int = 12, state: str = "state", **variables: str) -> dict[str, Any]:
        command = ["pretrain", "--config=tests/configs/tiny.py", f"--workdir={workdir}"]
        command += [f"--config.data.shards={tiny_shards}", f"--config.duration={steps} steps"]
        words = ["--target=local", "--topology=cpu:2x2", *options, "--", *command, *OVERRIDES]
        return launcher(tmp_path / state, *words, **variables)

    straight = launch(f"{tmp_path}/straight")
    assert straight["code"] == 0, straight
    run = f"{bucket}/run"
    broken = launch(run, FAULTS="1:0:8:torn 2:1:6:kill")
    assert broken["code"] == 0, broken
    said = [line for line in broken["out"].splitlines() if line.startswith("[launch]")]
    assert said[:3] == [
        "[launch] attempt 1: 2 processes, from the beginning",
        "[launch] process 0 was killed by SIGKILL; starting again",
        "[launch] attempt 2: 2 processes, from the checkpoint of step 4",
    ]
    assert said[3].startswith("[launch] process 1 was killed by SIGKILL; starting again")
    assert said[4].startswith("[launch] attempt 3: 2 processes, from the checkpoint of step ")
    assert said[5:] == ["[launch] finished"]
    check_same_state(f"{tmp_path}/straight", run)
    assert f"newest checkpoint: step 12 in {run}" in launcher(tmp_path / "state", "status", "run")["out"]

    with lease.holding(run):  # as a run on another machine does
        second = launch(run, "--max-restarts=0", steps=24, state="elsewhere")
    assert second["code"] == 1
    assert "ended with exit code 75: error: " in second["err"]  # either host may be the one that is named
    assert f"{run} is in use by process {os.getpid()} on " in second["err"]
