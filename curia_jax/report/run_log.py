"""What a run logged: lines of metrics.jsonl and events.jsonl, as records."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from curia_common import logs
from curia_common.errors import DataError, UserError
from curia_jax import journal, json_records, storage

logger = logs.get_logger(__name__)

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
    loss: int | float
    baseline_loss: int | float
    time: int | float
    images_per_second: int | float | None = None
    mfu: int | float | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of events.jsonl: a run "started", "resumed", "preempted" or "finished".

    Attributes:
      time: seconds since 1970.
    """

    event: str
    step: int
    examples_seen: int
    time: int | float


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
    peak_flops: int | float
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


def read(workdir: str | Path | epath.Path) -> RunLog:
    """The log of a work directory. Lines that are torn or damaged are left out, with a warning.

    Raises:
      UserError: there is none, or the run has not taken a step.
      DataError: no line can be read, or none says what was run.
    """
    folder = storage.root(workdir)
    for name in ("metrics.jsonl", "events.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {workdir}; --run takes the work directory of curia_jax.pretrain")
    metrics, _ = _records(folder / "metrics.jsonl", Metrics)
    events, lines = _records(folder / "events.jsonl", Event)
    setups = [
        setup for line in lines if line.get("event") in ("started", "resumed") and (setup := _record(Setup, line))
    ]
    if not setups:
        raise DataError(f"{workdir}/events.jsonl is damaged: no line says how the run was started; copy it again")
    return RunLog(metrics, events, setups[0])


def _records(path: epath.Path, kind: type[Record]) -> tuple[tuple[Record, ...], list[journal.Line]]:
    """The lines of a file that make records, as records and as they are."""
    found = journal.read(path, ("time",))
    both = [(record, line) for line in found.lines if (record := _record(kind, line)) is not None]
    damaged = found.unreadable + len(found.lines) - len(both)
    if not both and damaged:
        raise DataError(f"{path} is damaged: none of its {damaged} lines can be read; copy it again")
    if not both:
        raise UserError(f"{path} is empty: the run has not taken a step yet")
    if damaged:
        logger.warning(f"{path}: left out damaged lines ({damaged})")
    return tuple(record for record, _ in both), [line for _, line in both]


def _record(kind: type[Record], line: Line) -> Record | None:
    """The line as a record; None where a field is missing or of another type. Losses of a run that diverged are not finite."""
    try:
        return json_records.record(kind, line, finite=False)
    except ValueError:
        return None
