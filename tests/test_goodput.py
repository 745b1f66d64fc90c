"""The ledger of a run's time."""

from pathlib import Path

import pytest

from curia_jax import goodput


def start(name: str, taken: tuple[int, int], began: float, time: float, **seconds: float) -> goodput.Start:
    return goodput.Start(name, *taken, began, time, {**dict.fromkeys(goodput.PHASES, 0.0), **seconds})


def test_steps_after_the_checkpoint_that_was_resumed_are_lost() -> None:
    """100 steps in 200 s, killed; 30 of them again after a pause of 50 s."""
    found = goodput.summarise(
        [
            start("a", (0, 100), 1000.0, 1260.0, starting=20.0, compiling=40.0, steps=200.0),
            start("b", (70, 100), 1310.0, 1400.0, starting=20.0, compiling=10.0, saving=5.0, steps=55.0),
        ]
    )
    assert (found.starts, found.lost_steps, found.lost, found.down) == (2, 30, 60.0, 50.0)
    assert found.seconds == {"starting": 40.0, "compiling": 50.0, "input_wait": 0.0, "saving": 5.0, "steps": 195.0}
    assert found.total == 1400.0 - 1000.0
    assert found.goodput == pytest.approx(195 / 400)
    assert found.text() == (
        "goodput 48.8% of 6.7 min in 2 starts: starting 40 s, compiling 50 s, saving 5 s, steps 3.2 min, lost steps 1.0 min, down 50 s"
    )


def test_ledger_accounts_for_all_time_and_survives_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])

    def run(start_step: int, end: int) -> goodput.Summary:
        ledger = goodput.Ledger(str(tmp_path), start_step, now[0])
        now[0] += 7
        with ledger.spending("compiling"):
            now[0] += 30
        ledger.training()
        for step in range(start_step + 1, end + 1):
            now[0] += 2
            ledger.waited(0.5, 0.25)
            found = ledger.write(step)
        ledger.close()
        return found

    first = run(0, 10)
    assert first.seconds == {"starting": 7, "compiling": 30, "input_wait": 5.0, "saving": 2.5, "steps": 12.5}
    with (tmp_path / goodput.LEDGER).open("a") as file:
        file.write('{"id": "x", "sta')  # killed during a write
    now[0] += 100
    both = run(6, 10)
    assert both.starts == 2 and both.down == 100 and both.lost_steps == 4
    assert both.lost == pytest.approx(12.5 * 4 / 10)
    assert both.total == pytest.approx(now[0] - 1000)
    assert goodput.summarise(goodput.read(str(tmp_path))) == both


def test_only_one_host_writes(tmp_path: Path) -> None:
    ledger = goodput.Ledger(str(tmp_path), 0, 0, writes=False)
    ledger.write(1)
    ledger.close()
    assert not list(tmp_path.iterdir())
