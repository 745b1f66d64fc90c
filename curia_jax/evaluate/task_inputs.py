"""What is read of a task in the published schema: its cases, and the features, tokens and columns of each of them."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Shaped

from curia_common import logs
from curia_common.errors import DataError, UserError
from curia_jax.evaluate import corpus, features, labels, task_data, tasks, token_store
from curia_jax.evaluate.cache import gather
from curia_jax.evaluate.class_map import ClassMap
from curia_jax.evaluate.picture_store import PictureStore, open_store
from curia_jax.evaluate.pictures import MOST_SLICES, Picture, TaskPictures, pooled
from curia_jax.evaluate.results import CLINICAL, MODALITY
from curia_jax.evaluate.scoring import Features, TokenLists
from curia_jax.evaluate.subgroups import Column
from curia_jax.evaluate.task_data import Files
from curia_jax.evaluate.tasks import Task
from curia_jax.evaluate.tokens import Tokens

Of = TypeVar("Of")

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a task, read once for all protocols, when it is first needed.

    Attributes:
      cache: folder of features and of decoded images.
    """

    task: Task
    files: Files
    cache: Path
    columns: tuple[Column, ...] = ()  # that subgroups are made by

    @functools.cached_property
    def cases(self) -> labels.Task:
        found = task_data.read_cases(self.task, self.files)
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in found.splits.items())
        kind = f"{len(found.classes)} classes" if found.classes else self.task.target
        log.info(f"{kind}, cases: {counts}; intervals over {found.groups}")
        return found

    @functools.cached_property
    def images(self) -> dict[str, PictureStore]:
        """Of every split that has rows."""
        return {
            split: open_store(TaskPictures(self.task, self.files, split), self.cache)
            for split, part in self.cases.splits.items()
            if len(part.slices)
        }

    @functools.cached_property
    def groups(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """The group of every test row, by the columns that the task has; tasks of a suite do not have the same."""
        found = {}
        for column in self.columns:
            values = task_data.column(self.files, labels.TEST, column.name)
            if values is None:
                log.warning(f"{self.task.name} has no column {column.name}, so that there are no subgroups by it")
            else:
                found[column.name] = column.groups(values)
        return found

    @property
    def sha256(self) -> str:
        """Hex digest of everything that is read."""
        return self.files.sha256

    @functools.cached_property
    def class_names(self) -> dict[str, str]:
        """Of each class of the cases, its name as the data states it; a number where it states none.

        Raises:
          DataError: the data states fewer names than it has classes.
        """
        stated = task_data.class_names(self.files)
        if stated is None:
            return {name: name for name in self.cases.classes}
        found = {}
        for name in self.cases.classes:
            if not name.isdecimal() or int(name) >= len(stated):
                raise DataError(
                    f"{self.task.name}: a target is {name}, but the data states names of {len(stated)} classes, from number 0; save it again"
                )
            found[name] = stated[int(name)]
        return found

    def by_case(self, models: Sequence[features.Backbone], batch_size: int) -> Features:
        """Features of all cases; computed where the cache does not have them.

        Raises:
          DataError: an image cannot be used.
        """
        slices, wanted = self._slices
        found = {
            split: {model: pooled(slices[split], values) for model, values in by_model.items()}
            for split, by_model in gather(wanted, models, self.cache, batch_size).items()
        }
        if self.task.clinical:
            for split, columns in task_data.clinical(self.task, self.files).items():
                found[split][CLINICAL] = {"+".join(self.task.clinical): columns}
        return found

    def tokens(self, models: Sequence[features.Backbone], batch_size: int) -> TokenLists:
        """Tokens of all cases; see `by_case`."""
        slices, wanted = self._slices
        return {
            split: {
                model: Tokens.of_slices(some.values, some.inside, slices[split] // MOST_SLICES)
                for model, some in by_model.items()
            }
            for split, by_model in token_store.gather_tokens(
                wanted, models, self.cache, batch_size, kind="float16"
            ).items()
        }

    @property
    def _slices(
        self,
    ) -> tuple[dict[str, Int[np.ndarray, " _n"]], dict[str, tuple[PictureStore, Int[np.ndarray, " _n"]]]]:
        """Of every split, the numbers of its slices, alone and with the images."""
        numbers = {split: source.numbers for split, source in self.images.items()}
        return numbers, {split: (source, numbers[split]) for split, source in self.images.items()}

    def across(self, asked: Column | None) -> Column | None:
        """The column that heads are scored across: the one that the user names."""
        return asked

    def sides(self, column: Column) -> dict[str, Shaped[np.ndarray, " _n"]]:
        """The value of a column in every row of each split.

        Raises:
          UserError: there is no such column.
        """
        found = {}
        for split, part in self.cases.splits.items():
            values = task_data.column(self.files, split, column.name) if len(part.slices) else []
            if values is None:
                raise UserError(f"--across={column}: {self.task.name} has no such column")
            found[split] = column.groups(values)
        return found

    def in_corpora(self, corpora: Sequence[corpus.Corpus], batch_size: int) -> dict[str, Int[np.ndarray, " _m"]]:
        """The rows of each split that are in one of the corpora."""
        seen = corpus.overlap(self._slices[1], corpora, batch_size)
        return {split: np.unique(numbers // MOST_SLICES) for split, numbers in seen.items()}

    def test_pictures(self, rows: Sequence[int]) -> list[Picture]:
        """See `TaskPictures.of_rows`."""
        return TaskPictures(self.task, self.files, labels.TEST).of_rows(rows)


@dataclasses.dataclass(frozen=True)
class JoinedData:
    """A task that is made of others, each of one modality: the cases of the classes that they share, after each other.

    The row number of a case is that of its part, after all rows of the parts before. Patients and series of different parts
    are different ones, whatever they are called.
    """

    task: Task
    parts: tuple[TaskData, ...]
    class_map: ClassMap
    groups: Mapping[str, Shaped[np.ndarray, " rows"]] = dataclasses.field(default_factory=dict)  # no subgroups

    @property
    def sha256(self) -> str:
        """Hex digest of everything that is read."""
        return hashlib.sha256(
            " ".join([*(part.sha256 for part in self.parts), self.class_map.sha256]).encode()
        ).hexdigest()

    @functools.cached_property
    def _shared(self) -> tuple[dict[str, str], ...]:
        """Of each part, its classes that are shared, and their names in the task."""
        found = self.class_map.shared({part.task.name: list(part.class_names.values()) for part in self.parts})
        return tuple(
            {name: found[part.task.name][stated] for name, stated in part.class_names.items() if stated in found[part.task.name]}
            for part in self.parts
        )  # fmt: skip

    @functools.cached_property
    def _rows(self) -> dict[str, tuple[Int[np.ndarray, " _n"], ...]]:
        """Of every split and part, the rows of shared classes."""
        return {
            split: tuple(
                np.flatnonzero(np.isin(part.cases.splits[split].names, list(shared)))
                for part, shared in zip(self.parts, self._shared, strict=True)
            )
            for split in labels.SPLITS
        }

    def _first_rows(self, split: str) -> list[int]:
        """The row number of the first case of each part."""
        counts = [len(part.cases.splits[split].slices) for part in self.parts]
        return [sum(counts[:number]) for number in range(len(counts))]

    @functools.cached_property
    def cases(self) -> labels.Task:
        shared = [set(of.values()) for of in self._shared]
        for part, of in zip(self.parts, self._shared, strict=True):
            left = [stated for name, stated in part.class_names.items() if name not in of]
            log.info(
                f"{len(set(of.values()))} classes are shared by {self.class_map.source}; of {part.task.name} it leaves out "
                f"{len(left)} of {len(part.class_names)}: {', '.join(left) or 'none'}"
            )
        splits = {}
        for split, rows in self._rows.items():
            members = []
            for part, of, own, first in zip(self.parts, self._shared, rows, self._first_rows(split), strict=True):
                found = part.cases.splits[split].restricted(own)
                names = np.array([of[name] for name in found.names.tolist()], np.str_)
                who = [
                    np.array([f"{part.task.modality} {name}" for name in column.tolist()], np.str_)
                    for column in (found.patients, found.series)
                ]
                members.append(labels.Labelled(found.slices + first, names, *who))
            fields = ("slices", "names", "patients", "series")
            splits[split] = labels.Labelled(
                *(np.concatenate([getattr(one, field) for one in members]) for field in fields)
            )
        groups = " and ".join(dict.fromkeys(part.cases.groups for part in self.parts))
        return labels.Task(self.task.name, tuple(sorted(set.intersection(*shared))), (), splits, groups)

    def by_case(self, models: Sequence[features.Backbone], batch_size: int) -> Features:
        """Features of all cases: those of the parts, which the cache may have from tasks of their own."""
        return {
            split: {
                model: {name: np.concatenate([one[model][name][own] for one, own in there]) for name in by_name}
                for model, by_name in there[0][0].items()
            }
            for split, there in self._of_splits([part.by_case(models, batch_size) for part in self.parts]).items()
        }

    def tokens(self, models: Sequence[features.Backbone], batch_size: int) -> TokenLists:
        """Tokens of all cases; see `by_case`."""
        return {
            split: {
                model: functools.reduce(Tokens.followed_by, [one[model][own] for one, own in there])
                for model in there[0][0]
            }
            for split, there in self._of_splits([part.tokens(models, batch_size) for part in self.parts]).items()
        }

    def _of_splits(self, found: Sequence[Mapping[str, Of]]) -> dict[str, list[tuple[Of, Int[np.ndarray, " _n"]]]]:
        """For each split, what the parts have of it, and which rows of that are of this task."""
        pairs = {
            split: [(one[split], own) for one, own in zip(found, rows, strict=True) if split in one]
            for split, rows in self._rows.items()
        }
        return {split: there for split, there in pairs.items() if there}

    def across(self, asked: Column | None) -> Column:
        """The column that heads are scored across: always the modality."""
        return Column(MODALITY)

    def sides(self, column: Column) -> dict[str, Shaped[np.ndarray, " _n"]]:
        """The modality of every case of each split."""
        modalities = [part.task.modality for part in self.parts]
        return {split: np.repeat(modalities, [len(own) for own in rows]) for split, rows in self._rows.items()}

    def in_corpora(self, corpora: Sequence[corpus.Corpus], batch_size: int) -> dict[str, Int[np.ndarray, " _m"]]:
        """The rows of each split that are in one of the corpora."""
        found = [part.in_corpora(corpora, batch_size) for part in self.parts]
        return {
            split: np.concatenate(
                [
                    np.intersect1d(one.get(split, np.zeros(0, np.int64)), own) + first
                    for one, own, first in zip(found, rows, self._first_rows(split), strict=True)
                ]
            )
            for split, rows in self._rows.items()
        }

    def test_pictures(self, rows: Sequence[int]) -> list[Picture]:
        """One slice of each of these rows of the test split; see `TaskPictures.of_rows`."""
        first = self._first_rows(labels.TEST)
        part_of_row = [int(np.searchsorted(first, row, side="right")) - 1 for row in rows]
        by_row: dict[int, Picture] = {}
        for number, part in enumerate(self.parts):
            own = [row for row, of in zip(rows, part_of_row, strict=True) if of == number]
            if own:
                by_row |= dict(zip(own, part.test_pictures([row - first[number] for row in own]), strict=True))
        return [by_row[row] for row in rows]


@dataclasses.dataclass(frozen=True)
class Missing:
    """A task without data."""

    task: Task


def open_task(
    task: Task, folder: Path, cache: Path, columns: Sequence[Column], class_map: str | None
) -> TaskData | JoinedData | Missing:
    """What is read of a task; nothing is read yet but the names and digests of the files.

    Args:
      folder: of all tasks' data.
      cache: folder of features and of decoded images.
      columns: that subgroups are made by.
      class_map: file of the map that a task is made by of others; None takes that of this package.

    Raises:
      DataError: files are missing.
      UserError: the map cannot be read.
    """
    if not task.parts:
        files = task_data.find(folder, task.name)
        return Missing(task) if files is None else TaskData(task, files, cache, tuple(columns))
    parts = []
    for part in map(tasks.find, task.parts):
        files = task_data.find(folder, part.name)
        if files is None:
            return Missing(part)
        parts.append(TaskData(part, files, cache))
    if columns:
        log.warning(f"{task.name} has no subgroups: its cases are scored by modality")
    return JoinedData(task, tuple(parts), ClassMap.read(class_map, task.parts))
