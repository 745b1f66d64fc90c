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
    assert lines[0] == "convert: 101 of 1,000 files, 10/s"
    assert lines[1] == "convert: 201 of 1,000 files, 10/s, 1.3 min left"
    assert len(lines) == 10 and lines[-1] == "convert: 1,000 files in 1.7 min, 10/s"


@pytest.mark.parametrize(
    ("stage", "total", "unit", "step", "line"),
    [
        ("verify", 4000, "MB", 1000, "verify: 2,000 of 4,000 MB, 50/s, 40 s left"),
        ("convert", 12, "shards", 2, "convert: 4 of 12 shards, 6.0/min, 1.3 min left"),  # slower than one a second
        ("listing", None, "objects", 1000, "listing: 2,000 objects, 50/s"),  # nobody knows how many there are
    ],
)
def test_progress_counts_any_unit_in_any_portion(clock, capsys, stage, total, unit, step, line) -> None:
    with progress.Progress(stage, total, unit) as counter:
        for clock[0] in (20.0, 40.0):
            counter.step(step)
    assert capsys.readouterr().err.splitlines()[1] == line


def test_time_left_forgets_a_slow_start(clock, capsys) -> None:
    """Workers take 60 s to start on a busy machine, and then read 10 files a second."""
    with progress.Progress("convert", 10_000) as counter:
        for n in range(2000):
            clock[0] = 60 + n / 10
            counter.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 1 of 10,000 files, 1.0/min"
    assert lines[1] == "convert: 101 of 10,000 files, 10/s, 16 min left"


def test_time_left_follows_the_last_minute(clock, capsys) -> None:
    """A minute of files of 1 s each, then of files of 5 s each, and a pause that is longer than a minute."""
    with progress.Progress("convert", 1000) as counter:
        for clock[0] in map(float, (*range(1, 61), *range(65, 186, 5), 385)):
            counter.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[5] == "convert: 60 of 1,000 files, 1.0/s, 16 min left"
    assert lines[-3] == "convert: 84 of 1,000 files, 12.0/min, 76 min left"
    assert lines[-2] == "convert: 86 of 1,000 files, 0.6/min, 26 h left"


def test_resumed_progress_measures_its_rate_from_where_it_resumed(clock, capsys) -> None:
    with progress.Progress("train", 1000, "steps", done=900) as counter:
        clock[0] = 10.0
        counter.update(950, "loss 0.5")
        clock[0] = 20.0
        counter.update(980, "loss 0.4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 950 of 1,000 steps, 5.0/s  loss 0.5"
    assert lines[1] == "train: 980 of 1,000 steps, 3.0/s, 7 s left  loss 0.4"
    assert lines[2] == "train: 80 steps in 20 s, 4.0/s"


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
