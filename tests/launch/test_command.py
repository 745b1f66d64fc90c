"""python -m launch: dry runs, refusals before anything is created, and what a submission asks."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import __main__ as command
from launch import spec

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ["--", "pretrain", "--config=demo", "--workdir=runs/first"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where launched runs are recorded."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_dry_run_writes_all_that_would_be_sent(tmp_path: Path, state: Path) -> None:
    folder = tmp_path / "out"
    options = ["--target=local", "--topology=v5e:2x4", "--dry-run", f"--output={folder}"]
    for _ in range(2):  # the folder of an earlier dry run may be written again
        assert command.main([*options, *PRETRAIN]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["commands.sh", "pod.sh", "spec.json"]
    assert spec.LaunchSpec.from_json((folder / "spec.json").read_text()).workdir == "runs/first"
    lines = [line for line in (folder / "pod.sh").read_text().splitlines() if "curia_jax.pretrain" in line]
    assert len(lines) == 2 and all(f"JAX_PROCESS_ID={n} " in line for n, line in enumerate(lines))
    assert all("JAX_NUM_CPU_DEVICES=4 " in line and "CURIA_LAUNCH_DEVICES=8 " in line for line in lines)
    subprocess.run(["sh", "-n", folder / "pod.sh"], check=True)
    assert not state.exists()


def test_dry_run_without_a_folder_says_each_thing_once(capsys) -> None:
    words = ["pretrain", "--config=demo", "--workdir=gs://b/run", "--config.data.shards=gs://b/ct"]
    assert command.main(["--target=gke", "--topology=v5e-16", "--dry-run", "--", *words]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/sh\n") and "kubectl create --filename=jobset.yaml" in shown.out
    lines = shown.err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "each image will be a request to gs://b",
        "no plan, so memory and cost are not known",
        "--output=DIR writes jobset.yaml, nodepools.sh, other_launchers.txt, which these commands read",
        "placeholders, which a submission needs: --image, --project, --zone, --cluster",
    ]


def test_dry_run_leaves_a_folder_of_something_else_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert command.main(["--target=local", "--topology=cpu:2x1", "--dry-run", f"--output={tmp_path}", *PRETRAIN]) == 2
    assert "is not empty and no folder of an earlier dry run" in last_line(capsys)
    assert not (tmp_path / "spec.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (PRETRAIN, "--target is missing"),
        (["--target=local", *PRETRAIN], "--topology is missing"),
        (["--target=local", "--topology=v5e-250", *PRETRAIN], "no TPU slice v5e-250; the nearest are v5e-256"),
        (["--target=local", "--topology=gpu:2x8", *PRETRAIN], "--target=local simulates devices on the CPU"),
        (["--target=local", "--topology=cpu:2x1", "--spot", "--zone=z", *PRETRAIN], "--zone, --spot means nothing with --target=local"),
        (["--target=local", "--topology=cpu:2x1", "--output=a", *PRETRAIN], "--output belongs to --dry-run"),
        (["status", "nothing"], "no run 'nothing' was launched from this machine"),
        (["logs"], "logs takes the name of one run: python -m launch logs RUN"),
    ],
)  # fmt: skip
def test_wrong_words_exit_2_with_a_remedy(words: list[str], message: str, state: Path, capsys) -> None:
    assert command.main(words) == 2
    assert message in last_line(capsys)
    assert not state.exists()


def test_help_starts_without_jax_or_the_rest_of_the_project() -> None:
    """Within a second: it imports nothing that takes one."""
    program = "import sys, launch.__main__\nprint(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "curia_jax", "data_pipeline", "rich", "etils"} & set(found.stdout.split())
