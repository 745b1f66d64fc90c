"""Where the time of a run went, over all its starts: the ledger `goodput.jsonl`, and what follows from it.

Every start of a run appends how it spent its time so far, in seconds. Steps after the checkpoint from which the next start resumed
count as lost.
"""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curia_common.progress import format_seconds
from curia_jax import journal, json_records, storage

LEDGER = "goodput.jsonl"
PHASES: tuple[str, ...] = ("starting", "compiling", "input_wait", "saving", "steps")
_NUMBERS = ("start_step", "step", "began", "time")


class Start(NamedTuple):
    """One start of a run, as far as its ledger goes.

    Attributes:
      step: steps taken when it was last written; `start_step` is that of the checkpoint it resumed from.
      began, time: of its first and its last moment, seconds since 1970.
      seconds: phase -> seconds.
    """

    id: str
    start_step: int
    step: int
    began: float
    time: float
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run's time in seconds.

    Attributes:
      seconds: phase -> seconds over all starts; "steps" without those that were lost.
      lost: spent on steps that had to be taken again.
      down: between the end of a start and the next one.
    """

    starts: int
    seconds: Mapping[str, float]
    lost_steps: int
    lost: float
    down: float

    @property
    def total(self) -> float:
        """From the beginning of the first start to the end of the last."""
        return sum(self.seconds.values()) + self.lost + self.down

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps which count."""
        return self.seconds["steps"] / self.total if self.total > 0 else 0.0

    def text(self) -> str:
        """One line."""
        shares = {
            **{name.replace("_", " "): value for name, value in self.seconds.items()},
            "lost steps": self.lost,
            "down": self.down,
        }
        parts = ", ".join(f"{name} {format_seconds(value)}" for name, value in shares.items() if value >= 0.5)
        return f"goodput {self.goodput:.1%} of {format_seconds(self.total)} in {self.starts} starts: {parts}"


class Ledger:
    """The ledger of this start.

    Args:
      began: when it began, seconds since 1970.
      writes: only one host of a run does.
    """

    def __init__(self, workdir: str | Path, start_step: int, began: int | float, *, writes: bool = True) -> None:
        self._earlier: list[Start] = []
        with contextlib.suppress(OSError):  # which must not end a run
            self._earlier = read(workdir)
        self._file = journal.Writer(Path(workdir) / LEDGER) if writes else None
        self._id, self._start_step, self._began = uuid.uuid4().hex[:12], start_step, float(began)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._training = False

    @contextlib.contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """The time in the block belongs to this phase."""
        began = time.time()
        try:
            yield
        finally:
            self._seconds[phase] += max(0.0, time.time() - began)

    def training(self) -> None:
        """From here on, time that is not spent otherwise is spent on steps; before, on starting."""
        self._seconds["starting"] = max(0.0, time.time() - self._began - self._seconds["compiling"])
        self._training = True

    def waited(self, input_wait: float, saving: float) -> None:
        """Adds the seconds in which the devices had no input, and in which a save held up the loop."""
        self._seconds["input_wait"] += input_wait
        self._seconds["saving"] += saving

    def write(self, step: int) -> Summary:
        """Appends the state of this start; returns that of the run."""
        now = time.time()
        rest = "steps" if self._training else "starting"
        others = sum(value for phase, value in self._seconds.items() if phase != rest)
        self._seconds[rest] = max(0.0, now - self._began - others)
        start = Start(self._id, self._start_step, step, self._began, now, dict(self._seconds))
        if self._file is not None:
            seconds = {name: round(value, 3) for name, value in self._seconds.items()}
            self._file.write({**start._asdict(), "seconds": seconds})
        return summarise([*self._earlier, start])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(workdir: str | Path) -> list[Start]:
    """All starts of a run, in their order; the last line of each."""
    starts: dict[str, Start] = {}
    for line in journal.read(storage.root(workdir) / LEDGER, _NUMBERS).lines:
        seconds = line.get("seconds")
        if isinstance(seconds, dict) and all(json_records.is_number(seconds.get(name)) for name in PHASES):
            starts[str(line.get("id"))] = Start(
                str(line.get("id")), int(line["start_step"]), int(line["step"]), float(line["began"]), float(line["time"]),
                {name: float(seconds[name]) for name in PHASES},
            )  # fmt: skip
    return list(starts.values())


def summarise(starts: Sequence[Start]) -> Summary:
    """Adds up the starts of a run."""
    seconds = dict.fromkeys(PHASES, 0.0)
    lost_steps, lost, down = 0, 0.0, 0.0
    for number, start in enumerate(starts):
        for phase in PHASES:
            seconds[phase] += start.seconds[phase]
        if number + 1 == len(starts):
            continue
        later = starts[number + 1]
        down += max(0.0, later.began - start.time)
        repeated = min(start.step - later.start_step, start.step - start.start_step)
        if repeated > 0:
            share = start.seconds["steps"] * repeated / (start.step - start.start_step)
            lost_steps, lost = lost_steps + repeated, lost + share
            seconds["steps"] -= share
    return Summary(len(starts), seconds, lost_steps, lost, down)
