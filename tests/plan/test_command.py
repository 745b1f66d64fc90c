"""The planner as a command: real compilations of a tiny model, each in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curia_common.exit_codes import ExitCode
from curia_jax.plan import __main__ as command
from curia_jax.plan import estimator, topologies

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--config=tests/configs/tiny.py", "--config.model.dtype=bfloat16"]
SMALL_RUN = ["--topology=v5e:2x2", "--examples=1600", "--config.duration=100 epochs"]


def environment(folder: Path) -> dict[str, str]:
    """That of the suite without its settings of XLA, and with a cache in `folder`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"XDG_CACHE_HOME": str(folder / "cache")}


def plan(folder: Path, *words: str, program: tuple[str, ...] = ("-m", "curia_jax.plan")):
    """Runs the command in a process of its own, because the suite's has other settings of XLA.

    Returns:
      The finished process and the contents of --json.
    """
    file = folder / "plan.json"
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, *program, *TINY, f"--json={file}", *words],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return done, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory):
    """A folder whose cache has the small run, its finished process and its plan."""
    folder = tmp_path_factory.mktemp("plan")
    return folder, *plan(folder, *SMALL_RUN)


@pytest.mark.libtpu
def test_plan_json_has_the_documented_figures(planned):
    _, done, found = planned
    assert done.returncode == 0, done.stderr
    assert found["fits"] and not found["cached"] and found["estimate_error"] is None
    assert 0 < found["hbm_bytes_per_chip"] < found["hbm_limit_bytes"]
    assert found["hbm_bytes_per_chip"] == sum(found["memory"].values())
    assert found["estimated_step_seconds"] > 0
    # Model FLOPs are those of the matmuls, forward and twice backward. The program's own are near: it has augmentation
    # besides, and a patch embedding without a gradient of its input.
    assert 0.8 < found["hardware_flops_per_step"] / found["model_flops_per_step"] < 3
    assert found["estimated_mfu"] == pytest.approx(
        found["model_flops_per_step"] / found["estimated_step_seconds"] / (4 * 197e12)
    )
    assert found["images_per_second_per_chip"] == pytest.approx(16 / found["estimated_step_seconds"] / 4)
    assert 0 <= found["exposed_collective_fraction"] < 1 and 0 <= found["unestimated_fraction"] < 0.1
    assert {"encoder attention", "decoder mlp", "optimizer", "augment", "loss"} <= {p["part"] for p in found["parts"]}
    matmuls = sum(p["product_seconds"] for p in found["parts"]) * 4 * 197e12  # as compiled, loops with their trips
    assert matmuls == pytest.approx(found["hardware_flops_per_step"], rel=0.02)
    assert all(0 <= p["bound_seconds"] < p["seconds"] for p in found["parts"])
    moved = sum(p["hbm_seconds"] for p in found["parts"]) * 819e9
    assert moved > found["memory"]["arguments"]  # each is read at least once
    assert {c["axis"] for c in found["collectives"]} >= {"fsdp"}
    assert any(c["kind"] == "all-gather" for c in found["collectives"])  # weights are gathered where they are used
    assert {row["kind"] for row in found["largest_tensors"]} == {"argument", "temporary"}
    assert found["host_images_per_second_needed"] == pytest.approx(16 / found["estimated_step_seconds"])
    assert found["total_steps"] == 10_000
    assert found["chip_hours"] == pytest.approx(10_000 * found["estimated_step_seconds"] / 3600 * 4)
    assert found["cost"] == pytest.approx(found["chip_hours"] * 1.20)
    assert "where the time goes" in done.stderr and "not measured" in done.stderr and done.stdout == ""


@pytest.mark.libtpu
def test_second_plan_of_the_same_step_comes_from_the_cache(planned):
    folder, _, first = planned
    _, second = plan(folder, *SMALL_RUN)
    assert second["cached"]
    assert {k: v for k, v in second.items() if k != "cached"} == {k: v for k, v in first.items() if k != "cached"}


# Changes what the compiler says before the command reads it.
CHANGED = """
import sys
from curia_jax.plan import __main__ as command
from curia_jax.plan import estimator, topologies
topologies.prepare_environment()
from curia_jax.plan import compiler
import dataclasses
found = compiler.compile_for
compiler.compile_for = lambda *args, **options: dataclasses.replace(found(*args, **options), {change})
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.libtpu
@pytest.mark.parametrize("change", ['text="HloModule in another form"', 'text=""'])
def test_unreadable_compiler_text_leaves_memory_and_fit(planned, change: str):
    folder, _, first = planned
    done, found = plan(folder, *SMALL_RUN, program=("-c", CHANGED.format(change=change)))
    assert done.returncode == ExitCode.DONE, done.stderr
    assert found["fits"] and found["memory"] == first["memory"]
    assert "estimated_step_seconds" not in found and "cost" not in found
    assert estimator.TESTED_LIBTPU[0] in found["estimate_error"]
    assert "no step time, MFU, input needs and cost" in done.stderr


@pytest.mark.libtpu
def test_plan_that_does_not_fit_exits_66_in_one_line(planned):
    folder, _, _ = planned
    program = ("-c", CHANGED.format(change="refused=True, text='', limit=1"))
    done, found = plan(folder, *SMALL_RUN, "--limit=-1", program=program)
    assert done.returncode == ExitCode.DOES_NOT_FIT, done.stderr
    assert not found["fits"] and found["would_fit"] is None and "estimated_step_seconds" not in found
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: v5e:2x2 needs ") and "more chips" in last


@pytest.mark.long
@pytest.mark.libtpu
def test_gradients_between_two_tpu_slices_use_the_data_centre_network(tmp_path: Path):
    mesh = ["--config.mesh.replica=2", "--config.mesh.data=4", "--config.mesh.fsdp=1"]
    done, found = plan(tmp_path, "--topology=v6e:2x2", "--slices=2", *mesh)
    assert done.returncode == 0, done.stderr
    assert found["hbm_limit_bytes"] > 30 * 2**30 and found["chips"] == 8
    between = [c for c in found["collectives"] if c["axis"] == "replica"]
    assert between and all(c["dcn_seconds"] > 0 and c["ici_seconds"] == 0 for c in between)
    # Every gradient crosses, at least two bytes for each parameter; each of four chips sends a quarter.
    assert sum(c["bytes"] for c in between) >= 2 * found["parameters"] / 4


ERRORS = [
    (["--topology=v5e:4x4"], "mesh replica=1, data=2, fsdp=2 does not fit 16 devices; set"),
    (["--topology=v5e:2x2", "--slices=2"], "--config.mesh.replica=2 --config.mesh.data=2 --config.mesh.fsdp=2"),
    (["--topology=v5e:2x2", "--config.batch_size=6"], "does not divide over 4 devices"),
    (["--topology=v5e:2x2", "--config.modle.size=B"], "did you mean --config.model.size"),
    (["--topology=v5e:2x2", "--config.duration=1 example"], "less than one step"),
    (["--topology=v5e:3x7"], "libtpu knows no topology v5e:3x7"),
    (["--topology=v5e:2x2", "--examples=0"], "--examples is 0; it has to be at least 1"),
    (["--topology=v5e:2x2", "--prices=/nowhere"], "cannot read the price table"),
]
ASK = """
import contextlib, io, json, sys
from curia_jax.plan import __main__ as command
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        code = command.main(words)
    found.append((code, stream.getvalue()))
print(json.dumps(found))
"""


@pytest.mark.libtpu
def test_wrong_topology_mesh_or_option_is_one_line_and_exit_2(tmp_path: Path):
    lines = json.dumps([[*TINY, *words] for words, _ in ERRORS])
    done = subprocess.run(
        [sys.executable, "-c", ASK, lines],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (words, message), (code, error) in zip(ERRORS, json.loads(done.stdout), strict=True):
        errors = [line for line in error.splitlines() if not line.startswith("compiling for")]
        assert (code, len(errors)) == (ExitCode.USAGE, 1), (words, error)
        assert errors[0].startswith("error: ") and message in errors[0], words


def test_missing_compiler_is_one_line_that_says_how_to_install_it(monkeypatch, capsys):
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(topologies, "prepare_environment", lambda: None)  # the suite's process keeps its own
    assert command.main([*TINY, "--topology=v5e:2x2"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'curia-jax[plan]'" in error


def test_help_lists_the_exit_codes(capsys):
    assert command.main(["--help"]) == 0
    assert "66  the run does not fit the accelerators" in capsys.readouterr().out
