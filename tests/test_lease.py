"""One run at a time in a work directory, whatever happened to the one before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common.errors import RestartError
from curia_jax import lease

HOLDER = """
import sys, time
from curia_jax import lease
lease.RENEW_SECONDS = 0.2
lease.LEASE_SECONDS = float(sys.argv[2])
with lease.holding(sys.argv[1]):
    print("held", flush=True)
    time.sleep(1000)
"""


def hold(workdir: Path | str, lease_seconds: float) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", HOLDER, str(workdir), str(lease_seconds)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_held(holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"


def test_second_run_is_refused_and_told_who_has_the_work_directory(tmp_path: Path) -> None:
    holder = hold(tmp_path, 60)
    try:
        wait_until_held(holder)
        with pytest.raises(RestartError, match=rf"is in use by process {holder.pid} on .*; stop that run") as error:
            with lease.holding(str(tmp_path)):
                pytest.fail("both hold it")
        assert error.value.exit_code == 75
        assert (lease.owner(str(tmp_path)) or "").startswith(f"process {holder.pid} on ")
    finally:
        holder.kill()
        holder.wait()


def test_lock_of_a_killed_process_is_taken_over_before_it_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = hold(tmp_path, 60)
    wait_until_held(holder)
    holder.kill()
    holder.wait()
    assert lease.owner(str(tmp_path)) is None
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3600.0)  # waiting for its end would exceed the time limit of a test
    with lease.holding(str(tmp_path)):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / lease.FILE).exists()


def test_lock_of_another_machine_is_taken_over_when_its_lease_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    (tmp_path / lease.FILE).write_text(
        json.dumps({"host": "elsewhere", "boot": "b", "process": 1, "renewed": time.time()})
    )
    with lease.holding(str(tmp_path)):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", ["", "garbage", "[]", "{}", '{"process": "x"}'])
def test_damaged_lock_is_taken_over_when_its_lease_has_run_out(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    (tmp_path / lease.FILE).write_text(content)
    with lease.holding(str(tmp_path)):
        assert json.loads((tmp_path / lease.FILE).read_text())["process"] == os.getpid()


def test_owner_that_was_suspended_and_replaced_ends_with_75(tmp_path: Path) -> None:
    """As after SIGSTOP, or on a machine that lost its network: another run takes its place."""
    first = hold(tmp_path, 1)
    wait_until_held(first)
    first.send_signal(signal.SIGSTOP)
    second = hold(tmp_path, 1)
    try:
        wait_until_held(second)
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 75
        assert f"now belongs to process {second.pid} on " in err.splitlines()[-1]
        assert second.poll() is None
    finally:
        second.kill()
        second.wait()


def test_of_many_runs_that_start_together_one_wins(tmp_path: Path) -> None:
    assert_one_wins(str(tmp_path))


def assert_one_wins(workdir: str) -> None:
    """Starts four runs at once: one gets the lock, the others are told who has it."""
    runs = [hold(workdir, 20) for _ in range(4)]
    try:
        deadline = time.monotonic() + 200
        while sum(run.poll() is None for run in runs) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        (winner,) = (run for run in runs if run.poll() is None)
        wait_until_held(winner)
    finally:
        for run in runs:
            run.kill()
    others = [run.communicate()[1] for run in runs if run is not winner]
    assert all("is in use by process" in err for err in others), others
