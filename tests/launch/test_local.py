"""The pod on this machine: what ends a run, what starts it again, and that no two attempts live side by side.

Processes are those of tests.launch.worker; tests/launch/test_training.py has the real ones.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Launcher:
    """Launches in a folder of its own. `run` is the work directory."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        self._environment = {
            **os.environ,
            "XDG_STATE_HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "MODULE": "tests.launch.worker",
        }
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *what: str, options: str = "--topology=cpu:3x1") -> subprocess.Popen[str]:
        """Launches the worker with these words, see there."""
        return self.command("--target=local", *options.split(), "--", "pretrain", f"--workdir={self.run}", *what)

    def command(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.launcher", *words], cwd=ROOT, env=self._environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def attempts(self) -> int:
        """How many have started."""
        return len({path.name.split("-")[1] for path in self.run.glob("started-*")})

    def pids(self, attempt: int) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.run.glob(f"started-{attempt}-*"))]

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        for path in [*self.run.glob("started-*"), *self.run.glob("child")]:
            if alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_run_without_a_fault_ends_with_0_and_prefixed_output(launcher: Launcher) -> None:
    code, out, err = ended(launcher.start())
    folder = launcher.run.parent / "curia_jax" / "launch" / "run"
    assert code == 0
    assert err == f"output: {folder}/output.log\nmetrics: tensorboard --logdir={launcher.run}/tensorboard\n"
    assert sorted(out.splitlines()) == [
        "[0] process 0 of attempt 1 is done", "[1] process 1 of attempt 1 is done", "[2] process 2 of attempt 1 is done",
        "[launch] attempt 1: 3 processes, from the beginning", "[launch] finished",
    ]  # fmt: skip
    assert ended(launcher.command("logs", "run"))[1] == out
    assert ended(launcher.command("status", "run"))[1].startswith(
        "run run: finished, attempt 1, 0 of 3 processes alive"
    )


@pytest.mark.parametrize(("fault", "how"), [("kill", "was killed by SIGKILL"), ("exit=1", "ended with exit code 1"), ("exit=75", "ended with exit code 75")])  # fmt: skip
def test_lost_process_starts_all_again(fault: str, how: str, launcher: Launcher) -> None:
    code, out, _ = ended(launcher.start("1:0:save=7", f"1:2:{fault}"))
    assert code == 0 and launcher.attempts() == 2
    assert f"[launch] process 2 {how}" in out
    assert "[launch] attempt 2: 3 processes, from the checkpoint of step 7" in out
    assert len(launcher.pids(2)) == 3


@pytest.mark.parametrize("final", [2, 64, 65, 66])
def test_final_exit_code_stops_the_run(final: int, launcher: Launcher) -> None:
    code, _, err = ended(launcher.start(f"1:1:exit={final}"))
    assert code == final and launcher.attempts() == 1
    assert f"error: process 1 ended with exit code {final}: error: exit code {final}" in err
    assert "starting again would not change that" in err


def test_five_failures_alike_stop_the_run_and_say_why(launcher: Launcher) -> None:
    code, _, err = ended(launcher.start("*:1:exit=75"))
    assert code == 1 and launcher.attempts() == 5
    assert (
        "error: 5 attempts in a row failed alike without a new checkpoint: process 1 ended with exit code 75: error: exit"
        in err
    )
    status = ended(launcher.command("status", "run"))[1]
    assert status.startswith("run run: failed, attempt 5") and "restarts: 4 of 50; last: process 1 ended" in status


def test_failures_with_progress_between_them_do_not_count_as_alike(launcher: Launcher) -> None:
    saves = [f"{attempt}:0:save={attempt}" for attempt in range(1, 8)]
    code, _, err = ended(launcher.start(*saves, "*:1:exit=3", options="--topology=cpu:2x1 --max-restarts=6"))
    assert code == 3 and launcher.attempts() == 7
    assert "error: no restart is left of --max-restarts=6: process 1 ended with exit code 3" in err


def test_sigterm_stops_all_processes_and_exits_75(launcher: Launcher) -> None:
    process = launcher.start("*:*:hang")
    wait_for(lambda: len(launcher.pids(1)) == 3)
    process.send_signal(signal.SIGTERM)
    code, out, _ = ended(process)
    assert code == 75 and launcher.attempts() == 1
    assert "[launch] stopped" in out and not any(map(alive, launcher.pids(1)))


def test_process_that_ignores_sigterm_is_killed_after_the_grace_period(launcher: Launcher) -> None:
    process = launcher.start("*:1:deaf", "*:*:hang", options="--topology=cpu:3x1 --grace=1")
    wait_for(lambda: process.stdout and process.stdout.readline() == "[1] hanging\n")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75
    assert not any(map(alive, launcher.pids(1)))


def test_stuck_process_of_a_failed_attempt_is_killed_before_the_next(launcher: Launcher) -> None:
    code, out, _ = ended(
        launcher.start("1:0:orphan", "1:0:deaf", "1:0:hang", "1:1:kill", options="--topology=cpu:2x1 --grace=1")
    )
    assert code == 0 and launcher.attempts() == 2
    assert "killing what has not ended 1 s after it should have" in out
    assert not alive(int((launcher.run / "child").read_text()))


def test_stop_and_restart_by_name(launcher: Launcher) -> None:
    process = launcher.start("1:*:hang")
    wait_for(lambda: len(launcher.pids(1)) == 3)
    assert "\nerror: run run is being run by process" in ended(launcher.start())[2]
    assert ended(launcher.command("stop", "run"))[1] == "run run has saved and ended\n"
    assert ended(process)[0] == 75
    assert ended(launcher.command("stop", "run"))[1] == "run run was not running\n"
    assert ended(launcher.command("restart", "run"))[0] == 0 and launcher.attempts() == 2


def test_processes_of_a_killed_launcher_end_before_the_next_attempt(launcher: Launcher) -> None:
    process = launcher.start("1:*:hang")
    wait_for(lambda: len(launcher.pids(1)) == 3)
    wait_for(lambda: "running" in ended(launcher.command("status", "run"))[1])
    process.kill()
    process.wait()
    assert all(map(alive, launcher.pids(1)))
    assert (
        "run run: has lost its launcher; 3 of its processes are still running"
        in ended(launcher.command("status", "run"))[1]
    )
    code, out, _ = ended(launcher.start())
    assert code == 0 and "[launch] stopping 3 processes of attempt 1, whose launcher has ended" in out
    assert launcher.attempts() == 2 and not any(map(alive, launcher.pids(1)))


def test_second_interrupt_kills_the_processes(launcher: Launcher) -> None:
    process = launcher.start("*:*:deaf", "*:*:hang")
    wait_for(lambda: len(launcher.pids(1)) == 3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert ended(process)[0] == 130
    wait_for(lambda: not any(map(alive, launcher.pids(1))))
