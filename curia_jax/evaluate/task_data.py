"""The data of a task in the published schema: which files it is, what each case is, and its images.

A split is read in one pass, row by row, that refuses what would give a wrong figure and names the row: images of 1x1 px, which
stand for files that were missing at upload; masks of another shape, or empty; pixels that are not finite.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt16

from curia_common.errors import DataError, UserError
from curia_jax import data
from curia_jax.buffers import BufferPool
from curia_jax.evaluate import labels
from curia_jax.evaluate.tasks import BOTH, CLASSES, CT, TIME, VALUE, Task
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
MOST_SLICES = 1 << 16  # of a volume; image number = row * MOST_SLICES + slice
_TOGETHER = 16  # rows that are read at a time
_LEVELS = 65535  # of 16 bits


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


def _tables(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A file as tables of a few rows."""
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    table = pa.table(batch).select([name for name in columns if name in batch.schema.names])
                    for start in range(0, len(table), _TOGETHER):
                        yield table.slice(start, _TOGETHER)
            return
        with pq.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=_TOGETHER, columns=there):
                yield pa.table(batch)
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is damaged: {type(error).__name__}; download it again") from error


def _columns(path: Path) -> list[str]:
    return _schema(path).names


def _schema(path: Path) -> pa.Schema:
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                return reader.schema
        return pq.read_schema(path)
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is damaged: {type(error).__name__}; download it again") from error


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
    read = _class_name if task.target == CLASSES else _number
    group = next((name for name in GROUPS if name in known), None)
    series = "series_id" if "series_id" in known else None
    splits = {}
    seen: dict[str, tuple[str, int]] = {}
    for split in labels.SPLITS:
        names: list[str] = []
        events: list[bool] = []
        columns: dict[str, list[str]] = {"group": [], "series": []}
        for path in files.by_split.get(split, ()):
            for table in _tables(path, [name for name in dict.fromkeys(("target", EVENT, group, series)) if name]):
                first_row = len(names)
                for row, value in enumerate(table.column("target").to_pylist(), start=first_row):
                    names.append(read(task, split, row, value))
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
            for table in _tables(path, task.clinical):
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
        for table in _tables(path, [name]):
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


# ---- images


@dataclasses.dataclass(frozen=True)
class Picture:
    """One slice of a case.

    Attributes:
      number: row * MOST_SLICES + slice.
      values: HU, or raw values.
      hu: whether they are HU.
      mask: of the same shape; None without one.
      depth: slices of its volume; 1 of an image.
    """

    number: int
    values: Float32[np.ndarray, "rows columns"]
    hu: bool
    mask: Bool[np.ndarray, "rows columns"] | None
    depth: int


@dataclasses.dataclass(frozen=True)
class TaskImages:
    """The slices of a split that a task's features come from; see `features.Images`."""

    task: Task
    files: Files
    split: str

    @property
    def fingerprint(self) -> str:
        """Of the pixels, the units and the masks of all slices, and not of what else the files hold: features do not depend on targets."""
        return self._found[3]

    @property
    def source_digest(self) -> str:
        """Of the files, and of what is taken from them: known without reading any image."""
        what = f"{self.files.sha256} {self.task.form} {self.task.slices} {self.task.modality}"
        return hashlib.sha256(what.encode()).hexdigest()

    @functools.cached_property
    def masked(self) -> bool:
        """Whether features are those of a region; where the task leaves that to the data, its first row says it."""
        return _has_mask(self.files) if self.task.masked is None else self.task.masked

    @functools.cached_property
    def _found(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], tuple[int, int], str]:
        """Numbers and depths of all slices, the greatest height and width, and the fingerprint; from one pass over the split."""
        numbers, depths, largest = [], [], (1, 1)
        digest = hashlib.sha256()
        for picture in self._pictures():
            digest.update(f"{picture.number} {picture.values.shape} {picture.hu} {picture.mask is None} ".encode())
            digest.update(picture.values.tobytes())
            if picture.mask is not None:
                digest.update(np.packbits(picture.mask).tobytes())
            numbers.append(picture.number)
            depths.append(picture.depth)
            largest = max(largest[0], picture.values.shape[0]), max(largest[1], picture.values.shape[1])
        return np.array(numbers, np.int64), np.array(depths, np.int64), largest, digest.hexdigest()

    @property
    def numbers(self) -> Int[np.ndarray, " n"]:
        """Of all slices, in the order of rows."""
        return self._found[0]

    @property
    def depths(self) -> Int[np.ndarray, " n"]:
        """How many slices the volume of each slice has."""
        return self._found[1]

    def batches(self, numbers: Int[np.ndarray, " n"], batch_size: int) -> Iterator[data.HostBatch]:
        """Batches of the slices with these numbers, in the order of rows; with the field `mask` where the task has masks."""
        largest = self._found[2]
        pool = BufferPool((batch_size, *largest))
        waiting: list[Picture] = []
        wanted = set(numbers.tolist())
        for picture in self._pictures({number // MOST_SLICES for number in wanted}):
            if picture.number in wanted:
                waiting.append(picture)
            if len(waiting) == batch_size:
                yield _batch(waiting, pool.take())
                waiting = []
        if waiting:
            yield _batch(waiting, pool.take())

    def of_rows(self, rows: Sequence[int]) -> list[Picture]:
        """One slice of each of these rows, in their order: of a volume the middle one of those that features come from."""
        by_row: dict[int, list[Picture]] = {}
        for picture in self._pictures(set(rows)):
            by_row.setdefault(picture.number // MOST_SLICES, []).append(picture)
        return [by_row[row][len(by_row[row]) // 2] for row in rows]

    def _pictures(self, rows: set[int] | None = None) -> Iterator[Picture]:
        """The slices of the split's rows, or of some of them.

        Raises:
          DataError: a row cannot be used.
        """
        row = 0
        for path in self.files.by_split[self.split]:
            for table in _tables(path, (IMAGE, MASK, "modality")):
                for offset in range(len(table)):
                    if rows is None or row in rows:
                        yield from self._of_row(table, offset, row)
                    row += 1

    def _of_row(self, table: pa.Table, offset: int, row: int) -> Iterator[Picture]:
        task, where = self.task, f"{self.task.name}: row {row} of {self.split}"
        if IMAGE not in table.column_names:
            raise DataError(
                f"{task.name}: {self.split} has no column image; there are: {', '.join(table.column_names)}"
            )
        image = _array(table.column(IMAGE), offset, where)
        if image is None or image.ndim != (3 if task.volume else 2):
            shape = "no image" if image is None else f"an image of shape {image.shape}"
            wanted = "(rows, columns, slices)" if task.volume else "(rows, columns)"
            raise DataError(f"{where} has {shape}; the task takes {wanted}")
        if min(image.shape[:2]) < 2:
            raise DataError(
                f"{where} has an image of {image.shape[0]}x{image.shape[1]} px, as upload makes of a missing file"
            )
        if not image.size:
            raise DataError(f"{where} has a volume without a slice; leave the row out, or give it one")
        if not np.isfinite(image).all():
            raise DataError(f"{where} has pixels that are not finite")
        hu = task.modality == CT
        if task.modality == BOTH:
            if "modality" not in table.column_names:
                raise DataError(f"{task.name}: {self.split} has no column modality, which says the units of a row")
            hu = table.column("modality")[offset].as_py() == CT
        mask = None
        if self.masked:
            mask = _array(table.column(MASK), offset, where) if MASK in table.column_names else None
            if mask is None:
                raise DataError(f"{where} has no mask, and the task is about what is inside")
            if mask.shape != image.shape:
                raise DataError(f"{where} has a mask of shape {mask.shape}, but an image of shape {image.shape}")
            mask = mask > 0
            if not mask.any():
                raise DataError(f"{where} has an empty mask")
        for number in chosen_slices(image.shape[2], mask, task.slices) if task.volume else [0]:
            yield Picture(
                row * MOST_SLICES + number,
                image[:, :, number] if task.volume else image,
                hu,
                mask if mask is None or not task.volume else mask[:, :, number],
                image.shape[2] if task.volume else 1,
            )


def chosen_slices(count: int, mask: Bool[np.ndarray, "rows columns slices"] | None, wanted: int | None) -> list[int]:
    """Numbers of the slices of a volume that features come from.

    `wanted` slices around the middle of the volume, or of the slices that the mask reaches; None takes all. Slices that do not
    exist, or without mask, are left out.
    """
    inside = np.arange(count) if mask is None else np.flatnonzero(mask.any(axis=(0, 1)))
    if wanted is None:
        return inside.tolist()
    start = int(inside[len(inside) // 2]) - wanted // 2
    return [number for number in range(start, start + wanted) if number in set(inside.tolist())]


def _has_mask(files: Files) -> bool:
    """Whether the first row of the training split has a mask."""
    for table in _tables(files.by_split[labels.FIT][0], (MASK,)):
        return MASK in table.column_names and table.column(MASK).slice(0, 1).null_count == 0
    return False


def _array(column: pa.ChunkedArray, offset: int, where: str) -> Float32[np.ndarray, "..."] | None:
    """A cell of nested lists as an array; None where it is null."""
    cell = column.slice(offset, 1).combine_chunks()
    if isinstance(cell, pa.ChunkedArray):
        cell = cell.chunk(0)
    if isinstance(cell, pa.ExtensionArray):  # Array2D and Array3D of `datasets`
        cell = cell.storage
    if cell.null_count:
        return None
    shape: list[int] = []
    while pa.types.is_list(cell.type) or pa.types.is_large_list(cell.type):
        lengths = np.unique(cell.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) != 1:
            raise DataError(f"{where} has an image or mask whose lines differ in length")
        shape.append(int(lengths[0]))
        cell = cell.flatten()
    return np.asarray(cell.to_numpy(zero_copy_only=False), np.float32).reshape(shape)


def _batch(pictures: Sequence[Picture], pixels: UInt16[np.ndarray, "batch height width"]) -> data.HostBatch:
    """As shards give them; padded by repetition, `valid` is False there."""
    padded = [*pictures, *[pictures[-1]] * (len(pixels) - len(pictures))]
    pixels[:] = 0
    ranges = [_stored(one.values, pixels[row]) for row, one in enumerate(padded)]
    ends = [np.percentile(one.values, (0.5, 99.5), method="inverted_cdf") for one in padded]  # as in shards
    batch: data.HostBatch = {
        "pixels": pixels, "extent": np.array([one.values.shape for one in padded], np.int32),
        "slope": np.array([slope for slope, _ in ranges], np.float32),
        "intercept": np.array([intercept for _, intercept in ranges], np.float32),
        "low": np.array([low for low, _ in ends], np.float32), "high": np.array([high for _, high in ends], np.float32),
        "hu": np.array([one.hu for one in padded]), "slice": np.array([one.number for one in padded], np.int64),
        "valid": np.arange(len(padded)) < len(pictures),
    }  # fmt: skip
    if pictures[0].mask is not None:
        masks = np.zeros(pixels.shape, np.float32)
        for canvas, one in zip(masks, padded, strict=True):
            canvas[: one.values.shape[0], : one.values.shape[1]] = one.mask
        batch["mask"] = masks
    return batch


def _stored(
    values: Float[np.ndarray, "rows columns"], canvas: UInt16[np.ndarray, "height width"]
) -> tuple[float, float]:
    """Writes values to a canvas in 16 bits; real value = stored * slope + intercept.

    Whole numbers that fit are exact; others are within 1/131070 of their range.
    """
    low, high = float(values.min()), float(values.max())
    whole = high - low <= _LEVELS and bool((values == np.round(values)).all())
    slope = 1.0 if whole else (high - low) / _LEVELS
    canvas[: values.shape[0], : values.shape[1]] = np.round((values.astype(np.float64) - low) / slope)
    return slope, low


def pooled(
    numbers: Int[np.ndarray, " slices"], by_readout: Mapping[str, Shaped[np.ndarray, "slices _features"]]
) -> dict[str, Float[np.ndarray, "rows _features"]]:
    """The mean over the slices of each row; `numbers` are sorted."""
    first = np.flatnonzero(np.diff(numbers // MOST_SLICES, prepend=-1))
    counts = np.diff(first, append=len(numbers))[:, None]
    return {name: np.add.reduceat(values, first) / counts.astype(np.float32) for name, values in by_readout.items()}
