"""One row of results: the record behind the JSON of `python -m curia_jax.evaluate`, its tables and its figures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from curia_common.errors import DataError, UserError

PATIENTS = "patients"
_DIFFERENCE = "_difference"

Record = TypeVar("Record")
Row = Mapping[str, Any]  # of the JSON file
Setting = Mapping[str, float | int | bool]


@dataclasses.dataclass(frozen=True)
class Study:
    """What is scored, the same for every row of a task.

    Attributes:
      task: name of the label, or the one that --task gave.
      n, patients: test cases and their patients, or what stands for those; see `groups`.
      unit: what a case is, "slice" or "series".
      classes: that can be learned.
      classes_not_learned: of the test split alone; their cases count as wrong.
      draws, seed: of the bootstrap.
      train_n, train_patients: slices that probes learn from, and their patients.
      groups: what counts as a patient: "patients", or "files (patients unknown)" and the like.
    """

    task: str
    n: int
    patients: int
    unit: str
    classes: tuple[str, ...]
    classes_not_learned: tuple[str, ...]
    draws: int
    seed: int
    train_n: int
    train_patients: int
    groups: str = PATIENTS

    @property
    def interval(self) -> str:
        """How the intervals are made."""
        return f"95 % percentile bootstrap over {self.groups}"

    def count_groups(self, number: int) -> str:
        """ "1 patient", "12 patients", "80 files (patients unknown)"."""
        return "1 patient" if (number, self.groups) == (1, PATIENTS) else f"{number:,} {self.groups}"


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a probe was fitted.

    Attributes:
      dimension: number of features.
      selection: how its settings were chosen.
      selection_auroc: macro AUROC of the chosen settings on the held-out cases; None where undefined.
      chosen: the settings.
    """

    dimension: int
    selection: str
    selection_auroc: float | None
    chosen: Setting


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which features of which checkpoint were scored.

    Attributes:
      features, layers: as the options say; None for features that are not an encoder's.
      step, examples_seen: of the checkpoint.
      encoder_sha256: `trained_model.digest` of the encoder.
      image_size: of the training, (height, width) in px.
      image_sizes: that features were taken at; empty for that of the training.
      view_sha256: of the settings by which pixels were prepared.
    """

    features: str | None
    layers: str | None
    step: int
    examples_seen: int
    encoder_sha256: str
    image_size: tuple[int, ...]
    image_sizes: tuple[tuple[int, ...], ...]
    view_sha256: str


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric, or the difference of two, with its 95 % interval.

    Attributes:
      backbone: where the features come from: checkpoint, random, pixels; "none" for the majority class.
      head: the probe.
      metric: auroc, accuracy or balanced_accuracy.
      value, low, high: the metric and the ends of its interval; None where undefined.
      degenerate_draws: bootstrap draws in which the metric is undefined; they are left out of the interval.
      draws_without_a_class: draws that miss a class and still define the metric.
      against: the other backbone of a paired difference, `backbone` minus `against`; None for a value.
      fit: of the probe; None for differences and the majority class.
    """

    study: Study
    backbone: str
    head: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    degenerate_draws: int
    draws_without_a_class: int
    against: str | None = None
    fit: Fit | None = None
    provenance: Provenance | None = None

    @property
    def value_text(self) -> str:
        """Three digits; a difference has its sign."""
        return "undefined" if self.value is None else format(self.value, self._format)

    @property
    def interval_text(self) -> str:
        if self.low is None or self.high is None:
            return "[no interval]"
        return f"[{self.low:{self._format}}, {self.high:{self._format}}]"

    @property
    def _format(self) -> str:
        return ".3f" if self.against is None else "+.3f"

    def to_row(self) -> Row:
        """The JSON row, the fields that every reader wants first."""
        first = {
            "task": self.study.task, "backbone": self.backbone, "head": self.head,
            "metric": self.metric if self.against is None else self.metric + _DIFFERENCE,
            "value": self.value, "low": self.low, "high": self.high, "n": self.study.n,
        }  # fmt: skip
        draws = {name: getattr(self, name) for name in ("degenerate_draws", "draws_without_a_class")}
        # Absent where they do not apply; a None that is left is JSON's null for undefined.
        optional = {"against": self.against}
        optional |= dataclasses.asdict(self.provenance) if self.provenance else {}
        optional = {name: value for name, value in optional.items() if value is not None}
        fit = dataclasses.asdict(self.fit) if self.fit else {}
        return {**first, **dataclasses.asdict(self.study), "interval": self.study.interval, **fit, **draws, **optional}

    @classmethod
    def from_row(cls, row: Row) -> "Score":
        """Reads a row that `to_row` made.

        Raises:
          KeyError: a field is missing.
        """
        fit = _record(Fit, row) if "selection" in row else None
        provenance = _record(Provenance, {"features": None, "layers": None, **row}) if "encoder_sha256" in row else None
        own = ("backbone", "head", "value", "low", "high", "degenerate_draws", "draws_without_a_class")
        return cls(
            study=_record(Study, {"groups": PATIENTS, **row}), metric=row["metric"].removesuffix(_DIFFERENCE), against=row.get("against"),
            fit=fit, provenance=provenance, **{name: row[name] for name in own},
        )  # fmt: skip


def _record(kind: type[Record], row: Row) -> Record:
    """The part of a row that a record holds."""
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] - only dataclasses are passed
    return kind(**{field.name: _with_tuples(row[field.name]) for field in fields})


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read(path: str | Path) -> list[Score]:
    """The rows that `python -m curia_jax.evaluate --json` wrote.

    Raises:
      UserError: no such file.
      DataError: it holds something else.
    """
    try:
        return [Score.from_row(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"no file {path}; python -m curia_jax.evaluate --json writes it") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a JSON file: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not hold rows of python -m curia_jax.evaluate --json: no {error}") from error


def rows(scores: Sequence[Score]) -> list[Row]:
    """The content of the JSON file."""
    return [score.to_row() for score in scores]
