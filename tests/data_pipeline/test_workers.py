import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common.errors import UserError
from data_pipeline import workers

HERE = Path(__file__).parent


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    import tasks

    return tasks


def run(function, work, *, count: int = 2, timeout: float = 20.0):
    """Results by number of the task, and every item whose touching was announced."""
    results, touched = {}, []
    for message in workers.run(function, work, workers=count, timeout=timeout):
        if isinstance(message, workers.Done):
            assert message.number not in results
            results[message.number] = message.result
        else:
            touched.append(message.item)
    return results, touched


def test_every_task_is_done_once_and_every_item_announced(tasks) -> None:
    results, touched = run(tasks.work, [["a", "b"], ["c"], [], ["d", "e", "f"]])
    assert results == {
        0: [("a", "done"), ("b", "done")], 1: [("c", "done")], 2: [], 3: [(item, "done") for item in "def"],
    }  # fmt: skip
    assert sorted(touched) == list("abcdef")


def test_a_crash_or_a_hang_costs_that_item_alone_and_nothing_is_counted_twice(tasks) -> None:
    work = [["a", "crash", "b", "hang", "c"], ["d"]]
    results, touched = run(tasks.work, work, timeout=1.0)
    assert results[0] == [
        ("a", "done"), ("crash", "the decoder crashed on it (SIGSEGV)"), ("b", "done"),
        ("hang", "reading it took more than 1 s"), ("c", "done"),
    ]  # fmt: skip
    assert results[1] == [("d", "done")]
    assert sorted(touched) == ["a", "b", "c", "crash", "d", "hang"]


def test_idle_workers_are_used_again_and_those_of_a_failed_call_are_not(tasks) -> None:
    idle: list = []

    def one(task):
        found = workers.run(tasks.pid, [task], workers=1, timeout=20.0, idle=idle)
        return [message.result for message in found if isinstance(message, workers.Done)][0]

    try:
        first = one("a")
        assert one("b") == first and len(idle) == 1
        with pytest.raises(workers.TaskFault):
            one("bug")
        assert idle == []
        assert one("c") != first
    finally:
        for worker in idle:
            worker.stop()


def test_a_worker_killed_from_outside_gets_a_second_try_on_its_item_but_no_third(tasks, tmp_path: Path) -> None:
    once = f"killed once:{tmp_path / 'mark'}"
    results, touched = run(tasks.work, [["a", once, "killed always", "b"]], count=1)
    assert [outcome for _, outcome in results[0]] == ["done", "done", "the decoder crashed on it (SIGKILL)", "done"]
    assert len(touched) == 4


def test_what_comes_after_the_last_item_has_no_time_limit(tasks) -> None:
    results, _ = run(tasks.work, [["a", "slow end"]], count=1, timeout=0.7)
    assert results == {0: [("a", "done"), ("slow end", "done")]}


def test_a_worker_that_dies_with_nothing_in_hand_is_an_error_with_a_remedy(tasks) -> None:
    with pytest.raises(UserError, match="out of memory: try fewer --workers"):
        run(tasks.work, [["dead end"]], count=1)


@pytest.mark.parametrize(
    ("item", "kind", "text"),
    [
        ("user", workers.TaskError, "mend this"),
        ("disk", workers.TaskError, "No space left on device: /out/shard"),
        ("bug", workers.TaskFault, "ValueError"),
    ],
)
def test_a_failure_of_the_task_itself_ends_the_run_and_names_the_item(tasks, item: str, kind: type, text: str) -> None:
    with pytest.raises(kind) as caught:
        run(tasks.work, [["a", item]], count=1)
    assert text in str(caught.value)
    assert "a header value" not in str(caught.value)  # texts of unexpected errors may quote data
    if kind is workers.TaskError:
        assert caught.value.item == item


def test_workers_leave_signals_to_their_parent(tasks) -> None:
    # A cluster sends SIGTERM to every process of a job.
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


def test_a_worker_gets_no_more_than_its_memory_and_lives_on(tasks) -> None:
    def run(size: int):
        return [
            m
            for m in workers.run(tasks.hungry, [size, 1], workers=1, timeout=20.0, memory=1 << 30)
            if m.__class__ is workers.Done
        ]

    assert [len(message.result) if message.number else message.result for message in run(10**10)] == [100_000_000, 1]
    with pytest.raises(UserError, match="more memory than it may take; give it more with --memory-gb"):
        run(10**12 + 1)


def test_what_arrow_sets_aside_does_not_count_as_memory_taken(tasks) -> None:
    (done,) = workers.run(tasks.table_and_bytes, [800_000_000], workers=1, timeout=60.0, memory=1_300_000_000)
    assert done.result == 800_000_000
