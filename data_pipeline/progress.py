"""How far a stage is: a bar on a terminal, a line every ten seconds elsewhere."""

import time

import rich.progress
from rich.console import Console

EVERY = 10.0  # seconds between two lines


def console() -> Console:
    """Standard error, as it is: no colours in logs, and square brackets in paths are just that."""
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)


class Counter:
    """Counts what is done of a stage, with rate and time left. A context manager; the last line is its exit's.

    Args:
      total: how many there are.
      unit: what is counted.
    """

    def __init__(self, console: Console, stage: str, total: int, unit: str = "files") -> None:
        self._console, self._stage, self._total, self._unit = console, stage, total, unit
        self._done, self._began = 0, time.monotonic()
        self._last = self._began
        p = rich.progress
        self._bar = p.Progress(
            p.TextColumn("{task.description:<10}"), p.BarColumn(), p.MofNCompleteColumn(), p.TextColumn(f"{unit}  {{task.fields[rate]}}"),
            p.TimeElapsedColumn(), p.TextColumn("left"), p.TimeRemainingColumn(), console=console, transient=False,
            disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "Counter":
        self._bar.start()
        self._task = self._bar.add_task(self._stage, total=self._total, rate="")
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        self._bar.stop()
        if kind is None and not self._console.is_terminal:
            seconds = time.monotonic() - self._began
            self._console.print(
                f"{self._stage}: {self._total:,} {self._unit} in {seconds:.1f} s, {_per_time(self._total / max(seconds, 1e-9))}"
            )

    def step(self, amount: int = 1) -> None:
        """`amount` more are done."""
        self._done += amount
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=_per_time(rate))
        if not self._console.is_terminal and now - self._last >= EVERY:
            self._last = now
            left = (self._total - self._done) / max(rate, 1e-9)
            self._console.print(
                f"{self._stage}: {self._done:,} of {self._total:,} {self._unit}, {_per_time(rate)}, {left / 60:.1f} min left"
            )


def _per_time(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
