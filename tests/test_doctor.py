"""What the doctor says of runs in every state."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from curia_jax import checkpoint, doctor, goodput, saving
from tests import test_lease

STARTED = {
    "event": "started",
    "step": 0,
    "total_steps": 100,
    "command": "python -m curia_jax.pretrain --config=c --workdir=w",
}


def make_run(workdir: Path, *events: dict[str, object], steps: tuple[int, ...] = ()) -> Path:
    """A work directory with these events, and checkpoints that have seen 8 examples a step."""
    workdir.mkdir(exist_ok=True)
    (workdir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    checkpointer = saving.Checkpointer(str(workdir), keep=10)
    for step in steps:
        checkpointer.save(step, {"step": jnp.int32(step)}, checkpoint.Meta({"seed": 0}, 8 * step))
    checkpointer.close()
    return workdir


def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, object]]:
    capsys.readouterr()
    code = doctor.main([f"--workdir={workdir}", f"--json={workdir}.json"])
    out = capsys.readouterr().out
    return code, out, json.loads(Path(f"{workdir}.json").read_text()) if code in (0, 65) else {}


@pytest.mark.parametrize(
    ("event", "state"),
    [("preempted", "stopped"), ("saved", "interrupted"), ("non-finite", "diverged"), ("finished", "finished")],
)
def test_doctor_names_the_state_and_the_command_that_continues(
    event: str, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = make_run(tmp_path / "run", STARTED, {"event": event, "step": 6}, steps=(4, 6))
    code, out, found = run(workdir, capsys)
    assert code == 0
    assert {name: found[name] for name in ("state", "steps", "checkpoints", "torn", "examples_seen", "goodput")} == {
        "state": state, "steps": 6, "checkpoints": [4, 6], "torn": {}, "examples_seen": 48, "goodput": None,
    }  # fmt: skip
    assert found["next_command"] == (None if state == "finished" else STARTED["command"])
    assert "checkpoints: 2 whole, the newest of step 6 of 100\ndata: 48 examples seen there" in out
    assert ("continue with: python -m curia_jax.pretrain" in out) == (state != "finished")


def test_doctor_finds_torn_checkpoints_and_continues_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = make_run(tmp_path / "run", STARTED, steps=(4, 6, 8))
    (workdir / "checkpoints/8/commit_success.txt").unlink()
    victim = max(
        (p for p in (workdir / "checkpoints/6/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, out, found = run(workdir, capsys)
    assert (code, found["steps"], found["examples_seen"], found["checkpoints"]) == (0, 4, 32, [4])
    assert set(found["torn"]) == {"6", "8"} and "has other bytes than were saved" in found["torn"]["6"]  # type: ignore[arg-type, index]
    assert "torn: checkpoints/8: it was not finished" in out


def test_doctor_returns_65_where_no_checkpoint_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = make_run(tmp_path / "run", STARTED, steps=(4,))
    shutil.rmtree(workdir / "checkpoints/4/state")
    code, out, found = run(workdir, capsys)
    assert (code, found["steps"], found["checkpoints"]) == (65, None, [])
    assert "checkpoints: none that is whole" in out


def test_doctor_shows_the_last_error_of_the_host_that_failed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = make_run(tmp_path / "run", STARTED)
    (workdir / "logs").mkdir()
    (workdir / "logs/host-0.log").write_text(
        "2026-11-26 10:00:00,000 ERROR curia: error: an old one\n"
        "2026-11-27 10:00:01,000 ERROR curia: error: host 0 of 2 ends because host 1 ended with exit code 65: shard 3 is damaged\n"
    )
    (workdir / "logs/host-1.log").write_text("2026-11-27 10:00:00,500 ERROR curia: error: shard 3 is damaged\n")
    _, out, found = run(workdir, capsys)
    assert found["last_error"] == "host 1, 2026-11-27 10:00:00: shard 3 is damaged"
    assert "last error: host 1, 2026-11-27 10:00:00: shard 3 is damaged\n" in out


def test_doctor_sees_a_running_run_and_names_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = make_run(tmp_path / "run", STARTED)
    holder = test_lease.hold(workdir, 60)
    try:
        test_lease.wait_until_held(holder)
        _, out, found = run(workdir, capsys)
    finally:
        holder.kill()
        holder.wait()
    assert (found["state"], found["next_command"]) == ("running", None)
    assert out.startswith(f"{workdir} is running as process {holder.pid} on ")


def test_doctor_adds_up_the_goodput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = make_run(tmp_path / "run", STARTED)
    line = {"id": "a", "start_step": 0, "step": 5, "began": 1000.0, "time": 1100.0}
    seconds = {**dict.fromkeys(goodput.PHASES, 0.0), "starting": 25.0, "steps": 75.0}
    (workdir / goodput.LEDGER).write_text(json.dumps({**line, "seconds": seconds}) + "\ngarbage\n")
    _, out, found = run(workdir, capsys)
    assert found["goodput"] == 0.75 and "goodput 75.0% of 1.7 min in 1 starts" in out
