"""Labels of a shard folder: which exist, whether one can be probed, and their class numbers."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped

from curia_common.errors import UserError
from curia_jax.evaluate.targets import Times
from data_pipeline.format import files

# Columns of every shard folder that can be probed like a label.
TECHNICAL = ("modality", "plane", "body_part")
_UNKNOWN = ("", "unknown")
# After a label's name: predict it as a number.
VALUE = ":value"
# Labels with more different numbers than this are probably values.
_MOST_CLASSES = 10
PREFIX = "label_"
_NEAR = "near_duplicate_of"
# What the dataset counts as a patient where nothing names one, by the value of its column `patient_from`.
KNOWN_PATIENTS = "patients"
_INSTEAD = {"study": "studies", "series": "series", "file": "files"}
# The splits that are used; an index may have others.
FIT, HELD_OUT, TEST = SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The labelled slices of one split.

    Attributes:
      slices: slice numbers within the split.
      names: class name of each.
      patients, series: pseudonyms of each.
      events: of a time, whether the event was seen then, or follow-up ended; None for classes and values.
    """

    slices: Int[np.ndarray, " n"]
    names: Shaped[np.ndarray, " n"]
    patients: Shaped[np.ndarray, " n"]
    series: Shaped[np.ndarray, " n"]
    events: Bool[np.ndarray, " n"] | None = None

    def restricted(self, inside: Bool[np.ndarray, " n"] | Int[np.ndarray, " _m"]) -> "Labelled":
        """Some of the slices: those that are marked, or that have these places."""
        events = None if self.events is None else self.events[inside]
        return Labelled(self.slices[inside], self.names[inside], self.patients[inside], self.series[inside], events)


@dataclasses.dataclass(frozen=True)
class Task:
    """One label over the splits of a shard folder.

    Attributes:
      name: as it appears in results.
      classes: names of the classes that can be learned; the class number is the position. The second of two is the
        positive one.
      unseen: classes of the test split alone. Their numbers follow those of `classes`, so that no score is theirs and
        their cases count as wrong.
      splits: split name -> its labelled slices, possibly none.
      groups: what the pseudonyms of patients stand for: "patients", or what is known instead, such as
        "files (patients unknown)".
      is_value: whether the label is a number to predict; then there are no classes.
      is_time: whether it is a time to an event; the same.
      near_duplicates: labelled series of the test split that look like one to learn from.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[str, ...]
    splits: Mapping[str, Labelled]
    groups: str = KNOWN_PATIENTS
    is_value: bool = False
    near_duplicates: int = 0
    is_time: bool = False

    def targets(self, split: str) -> Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times:
        """Class number, value or time of each labelled slice."""
        events = self.splits[split].events
        if events is not None:
            return Times(self.splits[split].names.astype(np.float64), events)
        if self.is_value:
            return self.splits[split].names.astype(np.float64)
        number = {name: i for i, name in enumerate(self.classes + self.unseen)}
        return np.array([number[name] for name in self.splits[split].names.tolist()], np.int64)


def read_index(shards: str | Path) -> pa.Table:
    """The index of a shard folder.

    Raises:
      UserError: there is none.
      DataError: it is damaged.
    """
    path = Path(shards) / "index.parquet"
    if not path.is_file():
        run = (Path(shards) / "checkpoints").exists()
        hint = " (which looks like a work directory of curia_jax.pretrain)" if run else ""
        raise UserError(f"no index.parquet in {shards}{hint}; --shards takes the folder that data_pipeline.build wrote")
    return files.read_table(path, dict.fromkeys(("split", "patient", "series", "modality"), pa.string()))


def available(index: pa.Table) -> list[str]:
    """Names that `task` takes: the labels first, then the technical columns."""
    own = [name.removeprefix(PREFIX) for name in index.column_names if name.startswith(PREFIX)]
    return own + [name for name in TECHNICAL if name in index.column_names]


def task(index: pa.Table, label: str, name: str | None = None) -> Task:
    """One label as a task: its classes, or with VALUE after its name the number that it is.

    Slices without a value (null, empty, "unknown") are left out.

    Args:
      index: rows in the order of the slices of each split.
      label: a label, or one of TECHNICAL; VALUE may follow.
      name: of the task; default is the label.

    Raises:
      UserError: there is no such label, or it cannot be probed (see `obstacle`).
    """
    column = label.removesuffix(VALUE)
    if column not in available(index):
        raise UserError(f"no label {column!r} in the shards; there are: {', '.join(available(index))}")
    found = _task(index, column, name or label, is_value=column != label)
    reason = obstacle_of(found)
    if reason:
        raise UserError(f"label {label!r} cannot be probed: {reason}")
    return found


def obstacle(index: pa.Table, label: str) -> str | None:
    """The reason why a label of the index cannot be probed; None if it can. Rows may be in any order."""
    return obstacle_of(_task(index, label, label))


def _task(index: pa.Table, label: str, name: str, *, is_value: bool = False) -> Task:
    column = PREFIX + label if PREFIX + label in index.column_names else label
    split_of = _strings(index, "split")
    values, patients, series = (_strings(index, c) for c in (column, "patient", "series"))
    known = ~np.isin(values, _UNKNOWN)
    splits = {}
    for split in (FIT, HELD_OUT, TEST):
        rows = np.flatnonzero(split_of == split)
        slices = np.flatnonzero(known[rows])
        chosen = rows[slices]
        splits[split] = Labelled(slices, values[chosen], patients[chosen], series[chosen])
    who, alike = groups(index.filter(pa.array(known))), _near_duplicates(index, splits)
    if is_value:
        return Task(name, (), (), splits, who, is_value=True, near_duplicates=alike)
    # Text order: "0" < "1", "no" < "yes", so that the positive class comes second.
    learned = sorted({*splits[FIT].names.tolist(), *splits[HELD_OUT].names.tolist()})
    unseen = sorted(set(splits[TEST].names.tolist()) - set(learned))
    return Task(name, tuple(learned), tuple(unseen), splits, who, near_duplicates=alike)


def _near_duplicates(index: pa.Table, splits: Mapping[str, Labelled]) -> int:
    """Labelled test series with a near-duplicate in training or validation."""
    if _NEAR not in index.column_names:
        return 0
    series, first = _strings(index, "series").tolist(), _strings(index, _NEAR).tolist()
    group = {name: like or name for name, like in zip(series, first, strict=True)}
    learned, test = (
        {str(name) for split in names for name in splits[split].series} for names in ((FIT, HELD_OUT), (TEST,))
    )
    seen = {group[name] for name in learned}
    return sum(group[name] in seen for name in test)


def groups(index: pa.Table) -> str:
    """What the pseudonyms of patients stand for in these rows, in words: "patients", or what is known instead.

    Datasets of older versions do not say; there patients are taken to be known.
    """
    patient_from = set(_strings(index, "patient_from").tolist()) if "patient_from" in index.column_names else set()
    instead = [words for name, words in _INSTEAD.items() if name in patient_from]
    if not instead:
        return KNOWN_PATIENTS
    if patient_from <= set(_INSTEAD):
        return f"{' and '.join(instead)} (patients unknown)"
    return f"patients and {' and '.join(instead)} (some patients unknown)"


def _strings(index: pa.Table, column: str) -> Shaped[np.ndarray, " n"]:
    return np.array(["" if value is None else str(value) for value in index.column(column).to_pylist()], dtype=np.str_)


def obstacle_of(task: Task) -> str | None:
    """The reason why a task cannot be probed; None if it can."""
    if not any(len(part.slices) for part in task.splits.values()):
        return "no slice has a value"
    test, fit, held_out = (task.splits[split] for split in (TEST, FIT, HELD_OUT))
    names, patients = (np.concatenate([getattr(fit, f), getattr(held_out, f)]) for f in ("names", "patients"))
    if task.is_value or task.is_time:
        text = [name for name in (*names.tolist(), *test.names.tolist()) if not _is_number(name)]
        if text:
            return f"{text[0]!r} is not a number"
    if test.events is not None and not test.events.any():
        return "the test split has no event, so that the order of no two times is known"
    if fit.events is not None and not fit.events.any():
        return "the training split has no event"
    # What follows holds for values too: a value that never changes, or a single patient, is nothing to learn or to test on.
    for title, found in (("test split", np.unique(test.names)), ("training and validation splits", np.unique(names))):
        if len(found) == 0:
            return f"the {title} has no slice with a value; build the shards from more patients"
        if len(found) == 1:
            return (
                f"every labelled slice of the {title} is of class {str(found[0])!r}; a probe needs at least 2 classes"
            )
    if len(np.unique(test.patients)) < 2:
        return "the test split has a single labelled patient; an interval needs at least 2"
    if task.is_value or task.is_time:
        return (
            None
            if len(np.unique(patients)) > 1
            else "the training and validation splits have a single labelled patient"
        )
    if selection_on_validation(fit.names, held_out.names):
        return None
    numbers = len(task.classes) > _MOST_CLASSES and all(map(_is_number, task.classes))
    single = [str(c) for c in np.unique(names) if len(np.unique(patients[names == c])) < 2]
    if single:
        return (
            f"class {single[0]!r} occurs in a single patient outside the test split and the validation split lacks a "
            "class, so that a probe's settings cannot be chosen by patients"
            + (
                f"; its {len(task.classes)} classes are numbers: {task.name}{VALUE} predicts the number"
                if numbers
                else ""
            )
        )
    return None


def selection_on_validation(fit: Shaped[np.ndarray, " n"], held_out: Shaped[np.ndarray, " m"]) -> bool:
    """Whether the validation split can choose a probe's settings: it has every class of the training split, and these are
    at least two.

    Args:
      fit, held_out: class names of the training and the validation cases.
    """
    wanted = set(fit.tolist())
    return len(wanted) > 1 and wanted <= set(held_out.tolist())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
