"""The data of a task in the published schema: which files it is, and what each case is; its images: see pictures.py."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float32

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import labels
from curia_jax.evaluate.tasks import CLASSES, TIME, VALUE, Task
from data_pipeline.format import shards

# What the splits are called, by our names.
NAMES = {
    labels.FIT: ("train",),
    labels.HELD_OUT: ("val", "validation", "valid"),
    labels.TEST: ("test",),
}
# What tells patients apart: the first of these columns that is there, and what it stands for.
GROUPS = {
    "patient": labels.KNOWN_PATIENTS,
    "patient_id": labels.KNOWN_PATIENTS,
    "series_id": "series (patients unknown)",
    "filename": "files (patients unknown)",
}
SPANS_SPLITS = ("patient", "patient_id", "series_id")  # a value in two splits is a leak; file names are used again
IMAGE, MASK = "image", "mask"
EVENT = "event"  # of a time: 1 where it was seen
_TOGETHER = 1024  # rows that are read at a time, of columns without images


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a task's splits.

    Attributes:
      by_split: our name of a split -> its files, in order; parquet, or Arrow as `datasets` saves it.
      sha256: hex digest of the names of the splits and the content of the files.
    """

    by_split: Mapping[str, tuple[Path, ...]]
    sha256: str


def find(folder: Path, name: str) -> Files | None:
    """The files of a task in a folder of tasks; None if it has none.

    They are those that the `configs` of a README.md name (of the folder, or of its folder NAME), or NAME/…/SPLIT*.parquet, or the
    Arrow files that `datasets` saved in NAME/SPLIT.

    Raises:
      DataError: the train or the test split is missing, or a file that a README.md names.
    """
    own = folder / name
    by_split = _of_readme(folder, name) or _of_readme(own, name)
    if not by_split and own.is_dir():
        by_split = {}
        for split, names in NAMES.items():
            found = [
                path
                for word in names
                for path in (*sorted(own.rglob(f"{word}*.parquet")), *sorted(own.glob(f"{word}/*.arrow")))
            ]
            if found:
                by_split[split] = tuple(found)
    if not by_split:
        return None
    for split in (labels.FIT, labels.TEST):
        if split not in by_split:
            raise DataError(f"{name} has no files of the split {NAMES[split][0]!r}; there are: {', '.join(by_split)}")
    digest = hashlib.sha256()
    for split, paths in by_split.items():
        for path in paths:
            if not path.is_file():
                raise DataError(f"{name}: README.md names {path.name}, which is missing; download it again")
            digest.update(f"{split} {shards.sha256(path)}\n".encode())
    return Files(by_split, digest.hexdigest())


def _of_readme(folder: Path, name: str) -> dict[str, tuple[Path, ...]]:
    """The files that the front matter of a README.md lists for the config `name`, or for its only one."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8").split("---\n", 2)
    try:
        configs = (yaml.safe_load(parts[1]) or {}).get("configs", []) if len(parts) == 3 else []
        chosen = [one for one in configs if one.get("config_name") == name] or (configs if len(configs) == 1 else [])
        listed = chosen[0]["data_files"] if chosen else []
        by_split: dict[str, tuple[Path, ...]] = {}
        for split, names in NAMES.items():
            for entry in listed:
                if entry["split"] in names:
                    patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
                    found = [path for text in patterns for path in sorted(folder.glob(text)) or [folder / text]]
                    by_split[split] = by_split.get(split, ()) + tuple(found)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{readme} lists its configs in a way that cannot be read: {type(error).__name__}") from error
    return by_split


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows that are read together: a row group of a Parquet file, or a record batch of an Arrow file.

    Attributes:
      number: of the part in its file.
      first_row: its number in the split.
      rows: how many there are.
    """

    path: Path
    number: int
    first_row: int
    rows: int


def parts(paths: Sequence[Path]) -> list[Part]:
    """The parts of a split's files, in order.

    Raises:
      DataError: a file is damaged.
    """
    found: list[Part] = []
    row = 0
    for path in paths:
        with _opened(path) as file:
            if isinstance(file, pq.ParquetFile):
                counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            else:
                counts = [batch.num_rows for batch in file]
        for number, count in enumerate(counts):
            found.append(Part(path, number, row, count))
            row += count
    return found


def read(
    path: Path, columns: Sequence[str], *, part: int | None = None, together: int = _TOGETHER
) -> Iterator[pa.RecordBatch]:
    """Those of the columns that a file has, a few rows at a time.

    Args:
      part: number of the part to read; the whole file unless given.
      together: rows at a time.

    Raises:
      DataError: the file is damaged.
    """
    with _opened(path) as file:
        if isinstance(file, pq.ParquetFile):
            there = [name for name in columns if name in file.schema_arrow.names]
            groups = None if part is None else [part]
            yield from file.iter_batches(batch_size=together, row_groups=groups, columns=there)
            return
        for number, batch in enumerate(file):
            if part in (None, number):
                chosen = batch.select([name for name in columns if name in batch.schema.names])
                yield from (chosen.slice(start, together) for start in range(0, len(chosen), together))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile | pa.RecordBatchReader]:
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                yield reader
        else:
            with pq.ParquetFile(path) as file:
                yield file
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is damaged: {type(error).__name__}; download it again") from error


def _columns(path: Path) -> list[str]:
    return _schema(path).names


def _schema(path: Path) -> pa.Schema:
    with _opened(path) as file:
        return file.schema_arrow if isinstance(file, pq.ParquetFile) else file.schema


# ---- cases


def read_cases(task: Task, files: Files) -> labels.Task:
    """Targets, patients and series of all cases; the slice numbers are row numbers.

    Raises:
      DataError: a target is missing or not of its kind, a patient or series is in two splits, or a class is not in training.
      UserError: the test split cannot tell two classes apart.
    """
    first = next(iter(files.by_split.values()))[0]
    known = _columns(first)
    if "target" not in known:
        raise DataError(f"{task.name}: {first.name} has no column target; there are: {', '.join(known)}")
    if task.target == TIME and EVENT not in known:
        raise DataError(
            f"{task.name}: {first.name} has no column {EVENT}, 1 where the event was seen at the time in target and 0 where follow-up ended"
        )
    parse = _class_name if task.target == CLASSES else _number
    group = next((name for name in GROUPS if name in known), None)
    series = "series_id" if "series_id" in known else None
    splits = {}
    seen: dict[str, tuple[str, int]] = {}
    for split in labels.SPLITS:
        names: list[str] = []
        events: list[bool] = []
        columns: dict[str, list[str]] = {"group": [], "series": []}
        for path in files.by_split.get(split, ()):
            for table in read(path, [name for name in dict.fromkeys(("target", EVENT, group, series)) if name]):
                first_row = len(names)
                for row, value in enumerate(table.column("target").to_pylist(), start=first_row):
                    names.append(parse(task, split, row, value))
                if task.target == TIME:
                    events += _events(task, split, first_row, table.column(EVENT).to_pylist())
                for key, column in (("group", group), ("series", series)):
                    columns[key] += (
                        [str(value) for value in table.column(column).to_pylist()]
                        if column
                        else [f"{split} {row}" for row in range(first_row, len(names))]
                    )
        if group in SPANS_SPLITS:
            for row, value in enumerate(columns["group"]):
                other, there = seen.setdefault(value, (split, row))
                if other != split:
                    raise DataError(
                        f"{task.name}: row {row} of {split} is of the same {group} as row {there} of {other}; split by {group}"
                    )
        slices = np.arange(len(names))
        seen_events = np.array(events, bool) if task.target == TIME else None
        splits[split] = labels.Labelled(
            slices, *(np.array(c, np.str_) for c in (names, columns["group"], columns["series"])), events=seen_events
        )
    groups = GROUPS[group] if group else "images (patients unknown)"
    if task.target != CLASSES:
        found = labels.Task(
            task.name, (), (), splits, groups, is_value=task.target == VALUE, is_time=task.target == TIME
        )
        if reason := labels.obstacle_of(found):
            raise UserError(f"{task.name} cannot be scored: {reason}")
        return found
    learned = sorted(set(splits[labels.FIT].names.tolist()))
    for split in (labels.HELD_OUT, labels.TEST):
        for row, name in enumerate(splits[split].names.tolist()):
            if name not in learned:
                raise DataError(f"{task.name}: row {row} of {split} is of class {name!r}, which no row of train has")
    found = labels.Task(task.name, tuple(learned), (), splits, groups)
    if reason := labels.obstacle_of(found):
        raise UserError(f"{task.name} cannot be scored: {reason}")
    return found


def _class_name(task: Task, split: str, row: int, value: object) -> str:
    """Class numbers as text with leading zeros, so that they sort; other names as they are."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "" or isinstance(value, float):
        raise DataError(f"{task.name}: the target of row {row} of {split} is {value}, which is not a class")
    return f"{value:03d}" if isinstance(value, int) and (task.classes or 0) > 10 else str(value)


def _number(task: Task, split: str, row: int, value: object) -> str:
    """A value, or a time above 0, as text."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    if not np.isfinite(number) or (task.target == TIME and number <= 0):
        wanted = "a number" if task.target == VALUE else "a time above 0"
        raise DataError(f"{task.name}: the target of row {row} of {split} is {value}, which is not {wanted}")
    return repr(float(number))


def _events(task: Task, split: str, first_row: int, values: Sequence[object]) -> list[bool]:
    for row, value in enumerate(values, start=first_row):
        if value not in (0, 1):
            raise DataError(f"{task.name}: column {EVENT} of row {row} of {split} is {value}; it has to be 0 or 1")
    return [bool(value) for value in values]


def clinical(task: Task, files: Files) -> dict[str, Float32[np.ndarray, "_n _d"]]:
    """The columns `task.clinical` of every split that has rows, as features: numbers as they are, text as one column for each
    value of the training split. A missing number is the mean of the training split.

    Raises:
      DataError: a column is not there.
    """
    columns: dict[str, dict[str, list[object]]] = {
        split: {name: [] for name in task.clinical} for split in files.by_split
    }
    for split, paths in files.by_split.items():
        for path in paths:
            for table in read(path, task.clinical):
                for name in task.clinical:
                    if name not in table.column_names:
                        raise DataError(
                            f"{task.name}: {path.name} has no column {name}, which the clinical floor needs"
                        )
                    columns[split][name] += table.column(name).to_pylist()
    encoders = {name: _encoder(values) for name, values in columns[labels.FIT].items()}
    return {
        split: np.concatenate(
            [np.array([encoders[name](value) for value in values], np.float32) for name, values in own.items()], axis=1
        )
        for split, own in columns.items()
        if all(own.values())
    }


def class_names(files: Files) -> tuple[str, ...] | None:
    """The names of the class numbers, where the data states them: a ClassLabel, which `datasets` keeps in the schema of every file.

    Raises:
      DataError: two files state different ones.
    """
    found = {}
    for path in (path for paths in files.by_split.values() for path in paths):
        try:
            stated = json.loads((_schema(path).metadata or {})[b"huggingface"])["info"]["features"]["target"]["names"]
            found[tuple(map(str, stated))] = path.name
        except (KeyError, TypeError, ValueError):  # no ClassLabel
            continue
    if len(found) > 1:
        raise DataError(
            f"{' and '.join(found.values())} state different names of the classes; save both splits together"
        )
    return next(iter(found), None)


def column(files: Files, split: str, name: str) -> list[object] | None:
    """A column of a split, row by row; None where a file does not have it."""
    found: list[object] = []
    for path in files.by_split[split]:
        if name not in _columns(path):
            return None
        for table in read(path, [name]):
            found += table.column(name).to_pylist()
    return found


def _encoder(learned: Sequence[object]) -> Callable[[object], list[float]]:
    """From a value of a column to features, by its values in the training split."""
    words = sorted({value for value in learned if isinstance(value, str)})
    if words:
        return lambda value: [float(value == word) for word in words]
    known = [float(value) for value in learned if _is_finite(value)]
    mean = float(np.mean(known)) if known else 0.0
    return lambda value: [float(value) if _is_finite(value) else mean]


def _is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and bool(np.isfinite(value))
