import io
import sys
import time

import pytest

from curia_common import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_prints_a_line_every_ten_seconds_with_rate_and_time_left(clock, capsys) -> None:
    with progress.Progress("convert", 1000) as counter:
        for n in range(1000):
            clock[0] = n / 10
            counter.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 101 of 1,000 files, 10/s, 1.5 min left"
    assert len(lines) == 10 and lines[-1] == "convert: 1,000 files in 1.7 min, 10/s"


@pytest.mark.parametrize(
    ("stage", "total", "unit", "step", "line"),
    [
        ("verify", 4000, "MB", 1000, "verify: 1,000 of 4,000 MB, 50/s, 1.0 min left"),
        ("convert", 12, "shards", 2, "convert: 2 of 12 shards, 6.0/min, 1.7 min left"),  # slower than one a second
        ("listing", None, "objects", 1000, "listing: 1,000 objects, 50/s"),  # nobody knows how many there are
    ],
)
def test_progress_counts_any_unit_in_any_portion(clock, capsys, stage, total, unit, step, line) -> None:
    with progress.Progress(stage, total, unit) as counter:
        clock[0] = 20.0
        counter.step(step)
    assert capsys.readouterr().err.splitlines()[0] == line


def test_resumed_progress_measures_its_rate_from_where_it_resumed(clock, capsys) -> None:
    with progress.Progress("train", 1000, "steps", done=900) as counter:
        clock[0] = 10.0
        counter.update(950, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 950 of 1,000 steps, 5.0/s, 10 s left  loss 0.5"
    assert lines[1] == "train: 50 steps in 10 s, 5.0/s"


def test_progress_says_nothing_where_it_is_disabled_or_the_stage_failed(clock, capsys) -> None:
    with progress.Progress("train", 10, enabled=False) as counter:
        clock[0] = 100.0
        counter.step()
    with pytest.raises(ValueError), progress.Progress("convert", 10):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_progress_draws_a_bar_on_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress.Progress("convert", 30) as counter:
        for _ in range(30):
            counter.step()
    assert "convert" in terminal.getvalue() and "30/30" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (3600, "60 min"), (9000, "2.5 h"), (400_000, "4.6 days")],
)
def test_seconds_are_written_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert progress.format_seconds(seconds) == text
