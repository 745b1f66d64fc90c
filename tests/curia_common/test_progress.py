import time

import pytest

from data_pipeline import progress


def test_progress_is_said_every_ten_seconds_with_rate_and_time_left(monkeypatch, capsys) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.Counter(progress.console(), "convert", 1000) as counter:
        for n in range(250):
            clock[0] = n / 10
            counter.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 101 of 1,000 files, 10/s, 1.5 min left"
    assert len(lines) == 3 and lines[2].startswith("convert: 1,000 files in 24.9 s")


@pytest.mark.parametrize(
    ("name", "total", "unit", "step", "line"),
    [
        ("verify", 4000, "MB", 1000, "verify: 1,000 of 4,000 MB, 50/s, 1.0 min left"),
        ("convert", 12, "shards", 2, "convert: 2 of 12 shards, 6.0/min, 1.7 min left"),  # slower than one a second
    ],
)
def test_what_is_counted_can_come_in_portions(
    monkeypatch, capsys, name: str, total: int, unit: str, step: int, line: str
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.Counter(progress.console(), name, total, unit) as counter:
        clock[0] = 20.0
        counter.step(step)
    assert capsys.readouterr().err.splitlines()[0] == line
