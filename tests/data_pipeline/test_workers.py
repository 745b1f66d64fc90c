import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common.errors import RemoteFault, UserError
from curia_common.exit_codes import ExitCode
from data_pipeline import workers

HERE = Path(__file__).parent


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    import tasks

    return tasks


def run(function, work, *, count: int = 2, timeout: float = 20.0):
    """Results by number of the task, and every item that was reported."""
    results, reported = {}, []
    for message in workers.run(function, work, workers=count, timeout=timeout):
        if isinstance(message, workers.Done):
            assert message.number not in results
            results[message.number] = message.result
        else:
            reported.append(message.item)
    return results, reported


def test_every_task_is_done_once_and_every_item_reported(tasks) -> None:
    results, reported = run(tasks.work, [["a", "b"], ["c"], [], ["d", "e", "f"]])
    assert results == {
        0: [("a", "done"), ("b", "done")], 1: [("c", "done")], 2: [], 3: [(item, "done") for item in "def"],
    }  # fmt: skip
    assert sorted(reported) == list("abcdef")


def test_crash_or_hang_skips_that_item_alone(tasks) -> None:
    work = [["a", "crash", "b", "hang", "c"], ["d"]]
    results, reported = run(tasks.work, work, timeout=10.0)
    assert results[0] == [
        ("a", "done"), ("crash", "the decoder crashed on it (SIGSEGV)"), ("b", "done"),
        ("hang", "reading it took more than 10 s"), ("c", "done"),
    ]  # fmt: skip
    assert results[1] == [("d", "done")]
    assert sorted(reported) == ["a", "b", "c", "crash", "d", "hang"]


def test_idle_workers_are_reused_unless_a_call_failed(tasks) -> None:
    idle: list = []

    def one(task):
        found = workers.run(tasks.pid, [task], workers=1, timeout=20.0, idle=idle)
        return [message.result for message in found if isinstance(message, workers.Done)][0]

    try:
        first = one("a")
        assert one("b") == first and len(idle) == 1
        with pytest.raises(RemoteFault):
            one("bug")
        assert idle == []
        assert one("c") != first
    finally:
        for worker in idle:
            worker.stop()


def test_killed_worker_retries_its_item_once(tasks, tmp_path: Path) -> None:
    once = f"killed once:{tmp_path / 'mark'}"
    results, reported = run(tasks.work, [["a", once, "killed always", "b"]], count=1)
    assert [outcome for _, outcome in results[0]] == ["done", "done", "the decoder crashed on it (SIGKILL)", "done"]
    assert len(reported) == 4


def test_work_after_the_last_item_has_no_time_limit(tasks) -> None:
    results, _ = run(tasks.work, [["a", "slow end"]], count=1, timeout=5.0)
    assert results == {0: [("a", "done"), ("slow end", "done")]}


def test_worker_that_went_on_while_the_caller_was_busy_is_not_stuck(tasks, tmp_path: Path) -> None:
    mark, results = tmp_path / "mark", {}
    for message in workers.run(tasks.work, [["a", f"mark:{mark}"]], workers=1, timeout=2.0):
        if isinstance(message, workers.Done):
            results[message.number] = message.result
        elif message.item == "a":
            time.sleep(2.5)  # longer than the time limit of an item
            while not mark.exists():
                time.sleep(0.05)
    assert [outcome for _, outcome in results[0]] == ["done", "done"]


def test_worker_that_dies_between_items_is_an_error(tasks) -> None:
    with pytest.raises(UserError, match="out of memory: try fewer --workers"):
        run(tasks.work, [["dead end"]], count=1)


@pytest.mark.parametrize(
    ("item", "kind", "text", "code"),
    [
        ("user", workers.TaskError, "fix this", ExitCode.USAGE),
        ("storage", workers.TaskError, "scratch disk is full", ExitCode.RESTART),
        ("disk", workers.TaskError, "No space left on device: /out/shard", ExitCode.RESTART),
        ("bug", RemoteFault, "ValueError", None),
    ],
)
def test_failed_task_ends_the_run_with_item_and_exit_code(
    tasks, item: str, kind: type, text: str, code: ExitCode | None
) -> None:
    with pytest.raises(kind) as caught:
        run(tasks.work, [["a", item]], count=1)
    assert text in str(caught.value)
    assert "a header value" not in str(caught.value)  # texts of unexpected errors may quote data
    if kind is workers.TaskError:
        assert (caught.value.item, caught.value.exit_code) == (item, code)


def test_workers_ignore_signals(tasks) -> None:
    # A cluster sends SIGTERM to every process of a job; the parent reacts to it.
    assert run(tasks.signals, ["x"], count=1)[0] == {0: "alive"}


def test_workers_end_when_their_parent_is_killed(tasks, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nif __name__ == '__main__':\n"
        f"    import tasks; from data_pipeline import workers\n"
        f"    list(workers.run(tasks.pid_then_wait, [{str(tmp_path / 'worker')!r}], workers=1, timeout=100))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    parent = subprocess.Popen([sys.executable, script], env=environment)
    mark = tmp_path / "worker.pid"
    end = time.monotonic() + 30
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.05)
    worker = int(mark.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _runs(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody waits for an orphan in a container


def test_memory_limit_is_enforced_and_worker_survives(tasks) -> None:
    def run(size: int):
        return [
            m
            for m in workers.run(tasks.hungry, [size, 1], workers=1, timeout=20.0, memory=1 << 30)
            if m.__class__ is workers.Done
        ]

    assert [len(message.result) if message.number else message.result for message in run(10**10)] == [100_000_000, 1]
    with pytest.raises(UserError, match="more memory than it may take; raise --memory-gb"):
        run(10**12 + 1)


def test_memory_limit_leaves_out_what_arrow_reserves(tasks) -> None:
    (done,) = workers.run(tasks.table_and_bytes, [800_000_000], workers=1, timeout=60.0, memory=1_300_000_000)
    assert done.result == 800_000_000
