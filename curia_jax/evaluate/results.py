"""Rows of results: what `python -m curia_jax.evaluate` writes, and its tables and figures read."""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from etils import epath

from curia_common.errors import DataError, UserError
from curia_jax import json_records

PATIENTS = "patients"
ALL_LABELS = "100 %"  # in the column `labels`
# The backbones that every table has beside those that a user names: an encoder of the same shape with random weights, the
# pixels, a histogram of the pixels. And the class frequencies, which need no image.
FLOORS = RANDOM, PIXELS, HISTOGRAM = ("random", "pixels", "histogram")
MAJORITY = "majority"
CLINICAL = "clinical"  # of survival: columns such as age and stage, without an image
OK, NOT_RUN, FAILED = "ok", "not_run", "failed"
# Of every row, in this order; a row with status "ok" has further fields that say how its value was obtained.
COLUMNS: tuple[str, ...] = (
    "task", "protocol", "backbone", "against", "head", "features", "labels", "metric", "value", "low", "high", "n", "events",
    "seed", "data_sha256", "status", "reason", "subgroup", "across", "trained_on", "tested_on",
)  # fmt: skip
RESULTS, TABLE = "results.json", "results.csv"  # in the folder that --output names
MODALITY = "modality"  # the column across which anatomy-cross-modality is scored
# Before a value of a column in `against`: the other side of a difference across it.
TRAINED_ON, TESTED_ON = "trained on ", "tested on "
SHARDS = "shards/"  # before the label in the name of a task that is a label of a shard folder

Row = Mapping[str, Any]  # of the JSON file
Setting = Mapping[str, float | int | bool]


def file_stem(protocol: str, across: str | None) -> str:
    """How the names of a task's files begin, in its folder in --output: "ours", "ours-across-scanner"."""
    return protocol if across is None else re.sub(r"[^\w.-]+", "-", f"{protocol}-across-{across}")


def predictions_path(output: Path, study: "Study") -> Path:
    """The scores of every test case."""
    return output / study.task / f"{file_stem(study.protocol, study.across)}-predictions.parquet"


def labels_text(amount: int | float) -> str:
    """How many labels heads learn from, as rows say it: "25 %" of the patients, or "k=5" cases of each class."""
    return f"k={amount}" if isinstance(amount, int) else f"{100 * amount:.6g} %"


def labels_amount(text: str) -> int | float:
    """The number of cases of each class, an int, or the share of the patients, a float, that `labels_text` wrote.

    Raises:
      ValueError: it is neither.
    """
    return int(text.removeprefix("k=")) if text.startswith("k=") else float(text.removesuffix(" %")) / 100


@dataclasses.dataclass(frozen=True)
class Study:
    """What is scored, the same for every row of a task.

    Attributes:
      task: its name, "shards/…" where it is a label of a shard folder.
      n, patients: test cases and their patients, or what stands for those; see `groups`.
      unit: what a case is, "slice" or "series".
      classes: that can be learned.
      classes_not_learned: of the test split alone; their cases count as wrong.
      draws, seed: of the bootstrap.
      train_n, train_patients: slices that probes learn from, and their patients.
      groups: what counts as a patient: "patients", or "files (patients unknown)" and the like.
      protocol: by which heads are trained and their settings chosen.
      labels: that the heads get, as `labels_text` writes it: share of the training patients, or cases of each class.
      events: test cases of the positive class, or with an event; None with more than two classes, and for values.
      data_sha256: digest of images, labels and splits.
      near_duplicates: test series that look like one that heads learn from.
      subgroup: of the test cases, "scanner=A"; None for all of them.
      in_corpus: images of the whole test split that are in the pretraining corpus; None where none was given.
      in_corpus_first: some of them, "test 12".
      across: the column across which the task is scored, "modality"; None where all cases are used.
      trained_on, tested_on: its values in the cases that heads learned from and in those that were scored, "CT" and "MR".
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
    protocol: str = "ours"
    labels: str = ALL_LABELS
    events: int | None = None
    data_sha256: str = ""
    near_duplicates: int = 0
    subgroup: str | None = None
    in_corpus: int | None = None
    in_corpus_first: tuple[str, ...] = ()
    across: str | None = None
    trained_on: str | None = None
    tested_on: str | None = None

    @property
    def title(self) -> str:
        """The task's name for people, and which cases heads learned from and were scored on."""
        name = self.task.removeprefix(SHARDS)
        if self.across is None:
            return name
        column = "" if self.across == MODALITY else f"{self.across.partition(':')[0]} "
        return f"{name}, {column}{self.trained_on} to {self.tested_on}"

    @property
    def few_text(self) -> str:
        """ "", or how many labels the heads learned from and which: ", 10 % of the labels (seed 1)"."""
        if self.labels == ALL_LABELS:
            return ""
        amount = labels_amount(self.labels)
        words = f"{amount} labels of every class" if isinstance(amount, int) else f"{self.labels} of the labels"
        return f", {words} (seed {self.seed})"

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
      selection: how its settings and its features were chosen.
      selection_loss: log loss of classes, squared error of values, of the chosen settings, mean over the held-out cases; None
        where nothing was chosen.
      selection_auroc: macro AUROC of the same; None where undefined.
      chosen: the settings.
    """

    dimension: int
    selection: str
    selection_loss: float | None
    selection_auroc: float | None
    chosen: Setting


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which features of which weights were scored.

    Attributes:
      weights_sha256: `trained_model.digest` of the encoder; the name of a backbone without weights.
      preparation: settings by which pixels are prepared.
      readouts: the features that could be chosen; empty for features that are not an encoder's.
      image_size: of the training, (height, width) in px.
      image_sizes: that features were taken at; empty for that of the training.
      step, examples_seen: of the checkpoint; None for weights that no training made.
    """

    weights_sha256: str
    preparation: str
    readouts: tuple[str, ...] = ()
    image_size: tuple[int, ...] = ()
    image_sizes: tuple[tuple[int, ...], ...] = ()
    step: int | None = None
    examples_seen: int | None = None


@dataclasses.dataclass(frozen=True)
class NotScored:
    """A task without a score.

    Attributes:
      across: as in Study.
      status: NOT_RUN or FAILED.
      reason: in words.
    """

    task: str
    protocol: str
    status: str
    reason: str
    across: str | None = None

    def to_row(self) -> Row:
        """The JSON row."""
        return {**dict.fromkeys(COLUMNS), **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric, or the difference of two, with its 95 % interval.

    Attributes:
      backbone: where the features come from: as the user named it, or one of FLOORS; MAJORITY for the class frequencies.
      head: the probe; "none" for the class frequencies.
      metric: of classes auroc, accuracy, balanced_accuracy, brier; of values rmse, mae, r2; of times c_index.
      value, low, high: the metric and the ends of its interval; None where undefined.
      degenerate_draws: bootstrap draws in which the metric is undefined; they are left out of the interval.
      draws_without_a_class: draws that miss a class and still define the metric.
      against: the other side of a difference, `backbone` minus `against`: another backbone, or across a column the same backbone
        "trained on MR" or "tested on CT"; None for a value.
      features: those that were chosen for the probe of `backbone`; None for the class frequencies.
      fit: of the probe; None for differences and the class frequencies.
      p: of a difference: two-sided p-value of none, by DeLong's method for the AUROC of two classes where no patient has two cases, by
        the bootstrap otherwise.
      p_holm: the same, corrected by Holm's method over the tasks of the command.
      doubt: why the interval means little; None if nothing speaks against it.
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
    features: str | None = None
    fit: Fit | None = None
    provenance: Provenance | None = None
    p: float | None = None
    p_holm: float | None = None
    doubt: str | None = None

    @property
    def is_across(self) -> bool:
        """Whether it is a difference across a column, of one backbone, and not of two backbones."""
        return (
            self.study.across is not None
            and self.against is not None
            and self.against.startswith((TRAINED_ON, TESTED_ON))
        )

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
        """The JSON row: COLUMNS, then how the value was obtained."""
        own = {name: getattr(self, name) for name in _OF_SCORE}
        study = dataclasses.asdict(self.study)
        first = {name: (own | study | {"status": OK, "reason": None})[name] for name in COLUMNS}
        # Absent where they do not apply.
        parts = [dataclasses.asdict(part) for part in (self.fit, self.provenance) if part]
        return {
            **first,
            **study,
            "interval": self.study.interval,
            **own,
            **{k: v for part in parts for k, v in part.items()},
        }

    @classmethod
    def from_row(cls, row: Row) -> "Score":
        """Reads a row that `to_row` made.

        Raises:
          ValueError: a field is missing or of another type.
        """
        return cls(
            study=json_records.record(Study, row),
            fit=json_records.record(Fit, row) if "selection" in row else None,
            provenance=json_records.record(Provenance, row) if "weights_sha256" in row else None,
            **vars(json_records.record(_Own, row)),
        )


@dataclasses.dataclass(frozen=True)
class _Own:
    """The fields of a score that are not of its study, fit or provenance, in the order of a row."""

    backbone: str
    against: str | None
    head: str
    features: str | None
    metric: Literal["auroc", "accuracy", "balanced_accuracy", "brier", "rmse", "mae", "r2", "c_index"]
    value: float | None
    low: float | None
    high: float | None
    degenerate_draws: int
    draws_without_a_class: int
    p: float | None
    p_holm: float | None
    doubt: str | None


_OF_SCORE = tuple(field.name for field in dataclasses.fields(_Own))


def read(path: str | Path) -> list[Score]:
    """The scores of a results.json that `python -m curia_jax.evaluate` wrote, without those of subgroups.

    Raises:
      UserError: no such file.
      DataError: it holds something else.
    """
    try:
        found = [Score.from_row(row) for row in read_rows(Path(path)) if row.get("status") == OK]
        return [score for score in found if score.study.subgroup is None]
    except FileNotFoundError:
        raise UserError(f"no file {path}; python -m curia_jax.evaluate --output writes results.json in it") from None
    except ValueError as error:
        raise DataError(
            f"{path} does not hold rows of this version of python -m curia_jax.evaluate: {error}"
        ) from error


def read_rows(path: Path | epath.Path) -> list[Row]:
    """All rows of a file, as they are.

    Raises:
      FileNotFoundError: no such file.
      DataError: it is not JSON, or not a list of objects.
    """
    try:
        content = json_records.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) and "status" in row for row in content):
        raise DataError(
            f"{path} does not hold rows of this version of python -m curia_jax.evaluate: it is not a list of them"
        )
    return content


def rows(scores: Sequence[Score | NotScored]) -> list[Row]:
    """The content of the JSON file."""
    return [score.to_row() for score in scores]


def to_csv(rows: Sequence[Row]) -> str:
    """COLUMNS of the rows; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
