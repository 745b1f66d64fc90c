"""Runs by Slurm: the batch script, executed, and a queue that starts, ends and cancels jobs."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curia_common.errors import UserError
from launch import __main__ as command
from launch import records, slurm
from tests.launch.clouds import check_scripts, make_cloud, spec_of
from tests.launch.fake_cloud import Cloud

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "launch"
SPEC = spec_of("slurm", "gpu:2x8")


def test_rendering_is_that_of_the_golden_file() -> None:
    text = slurm.render(SPEC).files["job.sbatch"]
    if os.environ.get("CURIA_WRITE_GOLDEN"):
        (GOLDEN / "slurm_gpu_2x8.txt").write_text(text)
    assert (GOLDEN / "slurm_gpu_2x8.txt").read_text() == text


def test_script_passes_shellcheck(tmp_path: Path) -> None:
    slurm.render(SPEC).write(tmp_path, SPEC)
    check_scripts(tmp_path / "job.sbatch", tmp_path / "commands.sh")


@pytest.mark.parametrize(
    ("topology", "words", "options", "message"),
    [
        ("v5e:4x4", (), {}, "has TPUs, which --target=slurm does not serve; --target=gke does"),
        ("gpu:2x8", ("--workdir=runs/first",), {}, "--workdir=runs/first is relative"),
        ("gpu:2x8", ("--config.data.shards=gs://data/ct",), {}, "is a bucket, which Slurm does not mount"),
        ("gpu:2x8", ("--workdir=/tmp/first",), {}, "--workdir=/tmp/first is on the own disk of each machine"),
        (
            "gpu:2x8",
            ("--config.data.shards=/dev/shm/ct",),
            {},
            "--config.data.shards=/dev/shm/ct is on the own disk of each machine",
        ),
        (
            "gpu:2x8",
            ("--config.data.shards=/data/mr:1,gs://data/ct:1",),
            {},
            "=gs://data/ct is a bucket, which Slurm does not mount",
        ),
        ("gpu:2x8", ("--config.data.shards=/data/mr:1,/tmp/ct:1",), {}, "=/tmp/ct is on the own disk of each machine"),
        ("gpu:2x8", (), {"project": "p"}, "--project means nothing with --target=slurm"),
        ("gpu:2x8", (), {"spot": True}, "--spot means nothing"),
    ],
)
def test_spec_that_slurm_does_not_serve_is_refused(
    topology: str, words: tuple[str, ...], options, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        slurm.render(spec_of("slurm", topology, *words, **options))


# ---- the script


def start(folder: Path, codes: tuple[int, int], restarts: int = 0, **settings: str) -> tuple[int, str, str]:
    """One start of the job, with two machines that end with these codes: exit code, output, and what Slurm was asked for."""
    (folder / "bin").mkdir(exist_ok=True)
    # srun starts the command once for each machine, and ends with the highest exit code.
    programs = {
        "srun": f'shift 2; highest=0; for n in 0 1; do SLURM_PROCID=$n CODES="{codes[0]} {codes[1]}" "$@"; c=$?; '
        '[ "$c" -gt "$highest" ] && highest=$c; done; exit "$highest"',
        "scontrol": f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$*" >>{folder}/asked',
    }
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    text = slurm.render(SPEC).files["job.sbatch"]
    task = (
        "import os; n = int(os.environ['JAX_PROCESS_ID']); "
        "print(n, *(os.environ[k] for k in ('JAX_COORDINATOR_ADDRESS', 'CURIA_LAUNCH_COORDINATOR', 'JAX_NUM_PROCESSES', "
        "'CURIA_LAUNCH_ATTEMPT', 'CURIA_LAUNCH_DEVICES')), flush=True); raise SystemExit(int(os.environ['CODES'].split()[n]))"
    )
    text = re.sub(r"COMMAND=\(.*?\n\)\n", f'COMMAND=("{sys.executable}" -S -c "{task}")\n', text, flags=re.DOTALL)
    for name, value in settings.items():
        text, found = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert found == 1
    variables = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4711",
                 "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    ended = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True, check=False)
    asked = folder / "asked"
    return ended.returncode, ended.stdout + ended.stderr, asked.read_text() if asked.exists() else ""


def test_processes_find_each_other_and_their_attempt(tmp_path: Path) -> None:
    code, said, asked = start(tmp_path, (0, 0), restarts=3)
    assert code == 0 and asked == ""
    lines = said.splitlines()
    assert lines[1:3] == [f"{n} node7:8476 node7:8476 2 4711.3 16" for n in (0, 1)]


def test_restart_code_asks_for_another_start(tmp_path: Path) -> None:
    _, said, asked = start(tmp_path, (75, 75))
    assert asked == "requeue 4711\n" and "ended with exit code 75" in said


@pytest.mark.parametrize("code", [2, 64, 65, 66])
def test_final_exit_code_is_that_of_the_job(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, (code, code))[::2] == (code, "")


def test_job_that_was_stopped_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert start(tmp_path, (75, 75))[::2] == (75, "")


def test_fast_failures_that_are_alike_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("1 3\n" * 3)
    assert start(tmp_path, (1, 1))[2] == "requeue 4711\n"
    code, said, asked = start(tmp_path, (1, 1))
    assert code == 1 and asked == "requeue 4711\n"  # the one of before
    assert "it failed 5 times in a row with exit code 1 within 600 s" in said


def test_slow_failures_and_other_codes_do_not_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("1 3\n1 9000\n1 3\n1 3\n")
    assert start(tmp_path, (1, 1))[2] == "requeue 4711\n"


def test_budget_of_restarts_ends_the_job(tmp_path: Path) -> None:
    code, said, asked = start(tmp_path, (75, 75), restarts=50)
    assert (code, asked) == (75, "") and "it was started again 50 times" in said


# ---- the command


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    monkeypatch.setattr(slurm, "stop", functools.partial(slurm.stop, pause=lambda seconds: None))
    return make_cloud(tmp_path, monkeypatch)


def launch() -> int:
    words = ["--target=slurm", "--topology=gpu:2x8", "--run=first", "--yes", "--allow-dirty"]
    return command.main([*words, "--", "pretrain", "--config=demo", "--workdir=/shared/first"])


def test_job_is_submitted_once_shown_and_stopped(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    assert "submitted as job 4711" in capsys.readouterr().err
    assert launch() == 2
    assert "first is in the queue already (pending)" in capsys.readouterr().err
    assert len(cloud.calls("sbatch")) == 1
    assert command.main(["status", "first"]) == 0
    assert "first: running" in capsys.readouterr().out

    (records.folder_of("first") / "output.log").write_text("0: step 1\n")
    assert command.main(["logs", "first"]) == 0
    assert capsys.readouterr().out == "0: step 1\n"

    cloud.set(queue=["RUNNING", "RUNNING", None])  # it saves, and leaves the queue
    assert command.main(["stop", "first"]) == 0
    assert "first has saved and ended" in capsys.readouterr().out
    assert [call[1:] for call in cloud.calls("scancel")] == [["--signal=TERM", "4711"]]
    assert (records.folder_of("first") / "stop").exists()


def test_job_that_does_not_end_is_cancelled(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    cloud.set(queue=["RUNNING"])
    assert command.main(["stop", "first"]) == 0
    assert "first was cancelled; it resumes from its newest checkpoint" in capsys.readouterr().out


def test_restart_forgets_the_stop_and_the_failures(cloud: Cloud) -> None:
    assert launch() == 0
    folder = records.folder_of("first")
    (folder / "failures").write_text("75 3\n")
    cloud.set(queue=["PENDING"])
    assert command.main(["restart", "first"]) == 0
    assert not (folder / "stop").exists() and not (folder / "failures").exists()
    assert len(cloud.calls("sbatch")) == 2
