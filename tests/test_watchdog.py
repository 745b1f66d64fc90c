"""The watchdog on a clock that the test moves; a stuck run of two hosts is in test_hosts.py."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from curia_common import logs
from curia_common.exit_codes import ExitCode
from curia_jax import watchdog

STEP = 9 * 0.01  # below ten ticks, which is what a suspended process looks like


class Clock:
    """Time that stands still but for `move`; the watchdog reads it once for each look."""

    def __init__(self) -> None:
        self.now, self.looks, self._changed = 0.0, 0, threading.Condition()

    def monotonic(self) -> float:
        with self._changed:
            self.looks += 1
            self._changed.notify_all()
            return self.now

    def move(self, seconds: float) -> None:
        """Waits until the watchdog has seen the new time."""
        with self._changed:
            self.now += seconds
            wanted = self.looks + 2  # it has finished with the first look when it takes the second
            assert self._changed.wait_for(lambda: self.looks >= wanted, timeout=60)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    return made


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """Exit code and line with which the process would end, once for each look after that."""
    found: list[tuple[int, str]] = []

    def leave(code: int, line: str, dump: Callable[[], None]) -> None:
        dump()
        found.append((code, line))

    monkeypatch.setattr(watchdog.cli, "leave", leave)
    yield found
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logs.LogFile]:
    made = logs.LogFile(tmp_path, 0)
    yield made
    made.close()


def test_silence_ends_the_process_with_the_stacks_in_the_log(log: logs.LogFile, ends, clock: Clock) -> None:
    with watchdog.Watchdog(0.5, log) as dog:
        dog.beat("compiling")
        while not ends:
            clock.move(STEP)
    code, line = ends[0]
    assert code == ExitCode.RESTART
    assert line.startswith(
        "error: host 0 of 1 made no progress for 0.5 s while compiling; the stacks of its threads are in "
    )
    text = log.path.read_text()
    assert "stacks of host 0 of 1 while compiling:" in text
    assert "in test_silence_ends_the_process_with_the_stacks_in_the_log" in text


def test_beats_keep_the_process_alive(log: logs.LogFile, ends, clock: Clock) -> None:
    with watchdog.Watchdog(1.0, log) as dog:
        for _ in range(4):
            for _ in range(5):
                clock.move(STEP)
            dog.beat("taking steps")
    assert clock.now > 1.0 and ends == []


def test_suspended_process_is_not_ended_when_it_continues(log: logs.LogFile, ends, clock: Clock) -> None:
    with watchdog.Watchdog(1.0, log):
        for seconds in (3600.0, *[STEP] * 5):
            clock.move(seconds)
    assert ends == []


def test_no_seconds_start_no_watchdog(log: logs.LogFile, ends) -> None:
    before = threading.active_count()
    with watchdog.Watchdog(0, log):
        assert threading.active_count() == before
    assert ends == []
