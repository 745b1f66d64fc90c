"""The one progress display: a bar on a terminal, a line every ten seconds elsewhere, both with rate and time left."""

import collections
import sys
import time

SECONDS_BETWEEN_LINES = 10.0
WINDOW_SECONDS = 60.0  # of the rate: what a stage does first says little of the rest


class Progress:
    """Shows how far a stage is, on standard error. A context manager.

    Rate and time left are those of the last minute, or of the newest progress where that took longer. The first line has no time
    left and the rate since the start, because workers are still starting then. A run that resumes starts at `done`.

    Args:
      stage: what is being done, as a verb ("convert").
      total: how many there are; None if unknown.
      unit: what is counted ("files").
      done: how many were finished before.
      enabled: False shows nothing (all hosts but the first).
    """

    def __init__(
        self, stage: str, total: int | None, unit: str = "files", *, done: int = 0, enabled: bool = True
    ) -> None:
        self._stage, self._total, self._unit, self._start = stage, total, unit, done
        self._done: int | float = done
        self._enabled = enabled
        self._bar = None
        self._lines: collections.deque[tuple[float, int | float]] = collections.deque()  # when, and how many were done

    def __enter__(self) -> "Progress":
        self._began = self._last_line = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description:<10}"), rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(), rich_progress.TextColumn(f"{self._unit}  {{task.fields[text]}}"),
                rich_progress.TimeElapsedColumn(), rich_progress.TextColumn("left"), rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True, markup=False, highlight=False, emoji=False),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._total, completed=self._start, text="")
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None:
            seconds = time.monotonic() - self._began
            amount = self._done - self._start
            self._print(f"{amount:,.0f} {self._unit} in {format_seconds(seconds)}, {_format_rate(self._rate())}")

    def step(self, amount: int | float = 1, text: str = "") -> None:
        """`amount` more are done; `text` says more about the newest, such as its loss."""
        self.update(self._done + amount, text)

    def update(self, done: int | float, text: str = "") -> None:
        """`done` are finished by now."""
        self._done = done
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, text="  ".join(filter(None, (_format_rate(self._rate()), text)))
            )
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            of = f" of {self._total:,}" if self._total is not None else ""
            recent, left = self._recent_rate(now), ""
            if recent and self._total is not None:
                left = f", {format_seconds((self._total - done) / recent)} left"
            self._print(
                f"{done:,.0f}{of} {self._unit}, {_format_rate(recent or self._rate())}{left}"
                + (f"  {text}" if text else "")
            )

    def _recent_rate(self, now: float) -> float:
        """Per second; 0 where it is unknown, at the first line and where nothing was done since. Notes this line."""
        before = self._lines
        while len(before) > 1 and now - before[1][0] >= WINDOW_SECONDS and self._done > before[1][1]:
            before.popleft()
        since, done = before[0] if before else (now, self._done)
        before.append((now, self._done))
        return (self._done - done) / (now - since) if self._done > done else 0.0

    def _rate(self) -> float:
        return (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _print(self, text: str) -> None:
        print(f"{self._stage}: {text}", file=sys.stderr, flush=True)


def _format_rate(per_second: float) -> str:
    return (
        f"{per_second:,.0f}/s"
        if per_second >= 10
        else f"{per_second:.1f}/s"
        if per_second >= 1
        else f"{60 * per_second:.1f}/min"
    )


def format_seconds(seconds: int | float) -> str:
    """42 s, 3.5 min, 12 min, 2.5 h, 3.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for unit, length, until in (("min", 60.0, 7200.0), ("h", 3600.0, 172800.0), ("days", 86400.0, float("inf"))):
        if seconds < until:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    raise AssertionError
