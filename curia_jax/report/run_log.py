"""What a run logged: lines of metrics.jsonl and events.jsonl, as records."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from curia_common.errors import DataError, UserError

Line = Mapping[str, Any]  # of a JSON lines file
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A line of metrics.jsonl.

    Attributes:
      time: when it was written, seconds since 1970.
      images_per_second, mfu: None before there is an interval to measure.
    """

    step: int
    examples_seen: int
    loss: float
    baseline_loss: float
    time: float
    images_per_second: float | None = None
    mfu: float | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of events.jsonl: a run "started", "resumed", "preempted" or "finished".

    Attributes:
      time: seconds since 1970.
    """

    event: str
    step: int
    examples_seen: int
    time: float


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the event "started" says of the run.

    Attributes:
      mesh: axis -> devices along it.
      peak_flops: FLOP/s of all devices together.
      peak_source: where that figure is from.
    """

    total_steps: int
    parameters: int
    device: str
    mesh: Mapping[str, int]
    peak_flops: float
    peak_source: str


@dataclasses.dataclass(frozen=True)
class RunLog:
    """The log of a run, in the order of time; `metrics` has at least one line."""

    metrics: tuple[Metrics, ...]
    events: tuple[Event, ...]
    setup: Setup

    @property
    def images_per_second(self) -> float | None:
        """Median; None where nothing was measured."""
        rates = [line.images_per_second for line in self.metrics if line.images_per_second is not None]
        return statistics.median(rates) if rates else None

    @property
    def mfu(self) -> float | None:
        """Median share of the devices' peak FLOP/s; None where nothing was measured."""
        shares = [line.mfu for line in self.metrics if line.mfu is not None]
        return statistics.median(shares) if shares else None

    @property
    def devices(self) -> int:
        return math.prod(self.setup.mesh.values())

    @property
    def resumed_at(self) -> list[int]:
        """Examples seen at each resume."""
        return [event.examples_seen for event in self.events if event.event == "resumed"]


def read(workdir: str | Path) -> RunLog:
    """The log of a work directory.

    Raises:
      UserError: there is none, or the run has not taken a step.
      DataError: it is damaged.
    """
    metrics, events = (_lines(Path(workdir) / f"{name}.jsonl") for name in ("metrics", "events"))
    try:
        started = next(line for line in events if line["event"] == "started")
        return RunLog(
            tuple(_record(Metrics, line) for line in metrics),
            tuple(_record(Event, line) for line in events),
            _record(Setup, started),
        )
    except (KeyError, TypeError, StopIteration) as error:
        raise DataError(f"the log in {workdir} is damaged: a line lacks a field ({error})") from error


def _record(kind: type[Record], line: Line) -> Record:
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] - only dataclasses are passed
    return kind(**{field.name: line[field.name] for field in fields if field.name in line})


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; --run takes the work directory of curia_jax.pretrain")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not lines:
        raise UserError(f"{path} is empty: the run has not taken a step yet")
    return lines
