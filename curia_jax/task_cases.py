"""What a run is fine-tuned for: a task with its cases, targets and outputs, from data in the published schema or from shards."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curia_common.errors import DataError, UserError
from curia_jax import json_records
from curia_jax.evaluate import labels, scoring, shard_tasks, suite, task_data, tasks
from curia_jax.evaluate.picture_store import PictureStore, open_store
from curia_jax.evaluate.pictures import TaskPictures
from curia_jax.evaluate.results import SHARDS
from curia_jax.evaluate.targets import Classes, Labels, Times, Values
from curia_jax.examples import Cases, Target
from curia_jax.models.head import HeadConfig
from data_pipeline.format.shards import SliceSource

SLICE, SERIES = "slice", "series"


@dataclasses.dataclass(frozen=True)
class LabelledTask:
    """A task before its images are opened.

    Attributes:
      name: as in results.
      scored: what is scored, each with its rows of results: the task itself, or each of several labels. All have the same cases.
      target: of head.TARGETS.
      names: of the head's outputs.
      unit: what metrics count, "slice" (a row of the task, a slice of shards) or "series" with the mean of its scores.
      bagged: a case of training is a whole series, not a slice or row.
      data_sha256: as in results.
      source: where the images are.
    """

    name: str
    scored: tuple[labels.Task, ...]
    target: str
    names: tuple[str, ...]
    unit: str
    bagged: bool
    data_sha256: str
    source: "shard_tasks.Dataset | Published"

    @property
    def fingerprint(self) -> str:
        """Of the cases, their order and their targets."""
        what = [self.data_sha256, self.name, self.names, self.target, self.bagged]
        if isinstance(self.source, Published):
            what += [self.source.task.form, self.source.task.slices, self.source.task.modality]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def head(self, *, kind: str, pooling: str) -> HeadConfig:
        """The head that learns the task.

        Raises:
          UserError: there is no such head.
        """
        values = self.targets(labels.FIT)
        scaled = {}
        if isinstance(values, Values):
            scaled = {"mean": float(values.values.mean()), "scale": float(values.values.std())}
        try:
            return HeadConfig(kind, pooling, self.target, self.names, **scaled)
        except ValueError as error:
            raise UserError(f"config.finetune: {error}") from error

    def described(self, head: HeadConfig, *, masked: bool, slices: int) -> Mapping[str, Any]:
        """What the config of a checkpoint says of the task and its head.

        Args:
          slices: places for the slices of a case.
        """
        task = {
            "name": self.name, "target": self.target, "data_sha256": self.data_sha256, "masked": masked, "slices": slices,
        }  # fmt: skip
        return {"task": task, "head": {**dataclasses.asdict(head), "names": list(head.names)}}

    def check_head(self, head: HeadConfig, config: Mapping[str, Any]) -> None:
        """Compares a head with that of a checkpoint.

        Args:
          config: of the checkpoint.

        Raises:
          DataError: the checkpoint has other classes or labels.
          UserError: it has another head, or none.
        """
        if "head" not in config:
            raise UserError(
                "--workdir has a pretraining run; name it in --from, and choose another --workdir for its fine-tuning"
            )
        then = json_records.record(HeadConfig, config["head"])
        if (then.target, then.names) != (head.target, head.names):
            raise DataError(
                f"{self.name} has the outputs {_listed(head.names)}, but the checkpoint was trained for {_listed(then.names)}; "
                "bring that data back, or choose another --workdir"
            )
        for field, option in (("kind", "head"), ("pooling", "pooling")):
            if getattr(then, field) != getattr(head, field):
                raise UserError(
                    f"finetune.{option} is {getattr(head, field)}, but the head of the checkpoint is {getattr(then, field)}; set "
                    f"--config.finetune.{option}={getattr(then, field)}, or choose another --workdir"
                )

    @property
    def shards(self) -> SliceSource | None:
        """Whose shards are checked while a run reads them; None where the task's data are no shards."""
        return self.source.sources[labels.FIT] if isinstance(self.source, shard_tasks.Dataset) else None

    def targets(self, split: str) -> Target:
        """Of every case of a split."""
        found = [scoring.Cases.of(one, SERIES if self.bagged else SLICE, split).targets for one in self.scored]
        if self.target == "labels":
            return Labels(np.stack([np.asarray(one) == 1 for one in found], axis=1))
        (only,) = found
        if isinstance(only, Times):
            return only
        return Values(only.astype(np.float64)) if self.target == "value" else Classes(only, len(self.names))

    def open_cases(self, cache: Path) -> dict[str, Cases]:
        """The cases of every split, with their images.

        Args:
          cache: folder for decoded images.

        Raises:
          DataError: an image or mask cannot be used.
        """
        if isinstance(self.source, shard_tasks.Dataset):
            return {split: self._of_source(self.source.sources[split], split) for split in labels.SPLITS}
        stores = {split: open_store(self.source.images(split), cache) for split in labels.SPLITS}
        return {split: self._of_store(store, split) for split, store in stores.items()}

    def _of_source(self, source: SliceSource, split: str) -> Cases:
        slices = self.scored[0].splits[split].slices.astype(np.int64)
        bags = np.split(slices, np.arange(1, len(slices)))
        if self.bagged:
            of = scoring.Cases.of(self.scored[0], SERIES, split).case
            bags = [slices[of == number] for number in range(of.max() + 1)]
        return Cases(source, tuple(bags), self.targets(split))

    def _of_store(self, store: PictureStore, split: str) -> Cases:
        bags = np.split(np.arange(len(store)), np.flatnonzero(np.diff(store.rows)) + 1)  # every row has a picture
        return Cases(store, tuple(bags), self.targets(split), store.masks_into if store.masked else None)


@dataclasses.dataclass(frozen=True)
class Published:
    """A task whose data is in the published schema."""

    task: tasks.Task
    files: task_data.Files

    def images(self, split: str) -> TaskPictures:
        return TaskPictures(self.task, self.files, split)


def open_task(word: str, folder: str | Path, *, cases: str = SLICE) -> LabelledTask:
    """The task that a user names. Reads its targets, and no image.

    Args:
      word: a name of CuriaBench's tasks, FILE.py, shards/LABEL, or shards/A+B for several labels of two classes each.
      folder: with a folder for each task, or that data_pipeline.build wrote.
      cases: of shards, "slice", or "series" for bags of the slices of a series.

    Raises:
      UserError: there is no such task, label or split, or nothing can be learned from it.
      DataError: the data is damaged.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data={folder} is not a folder")
    if word.startswith(SHARDS):
        found = _of_shards(word, folder, cases)
    else:
        if cases != SLICE:
            raise UserError(f"--cases={cases} is of shards; a case of {word} is a row of its table")
        found = _published(tasks.find(word), Path(folder))
    for one in found.scored:
        _check_splits(one)
    return found


def _published(task: tasks.Task, folder: Path) -> LabelledTask:
    if task.not_run:
        raise UserError(f"{task.name} cannot be learned: {task.not_run}")
    if task.parts:
        raise UserError(
            f"{task.name} is scored with frozen features alone; fine-tune for one of the tasks that it is made of: {', '.join(task.parts)}"
        )
    files = task_data.find(folder, task.name)
    if files is None:
        raise UserError(f"{folder} has no data of {task.name}; get it from: {task.access}")
    read = task_data.read_cases(task, files)
    target = {tasks.CLASSES: "classes", tasks.VALUE: "value", tasks.TIME: "time"}[task.target]
    names = read.classes or (task.name,)
    unit = suite.unit_of(read, SLICE)
    return LabelledTask(
        task.name, (read,), target, names, unit, bagged=False, data_sha256=files.sha256, source=Published(task, files)
    )


def _of_shards(word: str, folder: str | Path, cases: str) -> LabelledTask:
    dataset = shard_tasks.open_dataset(folder)
    names = word.removeprefix(SHARDS).split("+")
    dataset.check(names)
    found = [labels.task(dataset.index, name, f"{SHARDS}{name}") for name in names]
    if len(found) > 1:
        found, target, outputs = _together(found), "labels", tuple(names)
    else:
        target, outputs = ("value", (names[0],)) if found[0].is_value else ("classes", found[0].classes)
    bagged = cases == SERIES
    return LabelledTask(
        word, tuple(found), target, outputs, cases, bagged=bagged, data_sha256=dataset.sha256, source=dataset
    )


def _together(found: Sequence[labels.Task]) -> list[labels.Task]:
    """The labels, of the slices that have a value of each."""
    for one in found:
        if one.is_value or len(one.classes) + len(one.unseen) != 2:
            kind = "a number" if one.is_value else f"of {len(one.classes) + len(one.unseen)} classes"
            raise UserError(f"{one.name} is {kind}; several labels that are learned together have two classes each")
    splits: list[Mapping[str, labels.Labelled]] = [one.splits for one in found]
    common = {
        split: functools.reduce(np.intersect1d, [of_label[split].slices for of_label in splits])
        for split in labels.SPLITS
    }
    return [
        dataclasses.replace(
            one, splits={split: _only(part, common[split]) for split, part in one.splits.items()}
        )
        for one in found
    ]  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _only(part: labels.Labelled, slices: np.ndarray) -> labels.Labelled:
    """The labelled slices that are among these."""
    return part.restricted(np.isin(part.slices, slices))


def _check_splits(task: labels.Task) -> None:
    """Raises UserError or DataError where nothing can be learned, no weights chosen or nothing scored."""
    fit, held_out = task.splits[labels.FIT], task.splits[labels.HELD_OUT]
    if not len(held_out.slices):
        remedy = "build the shards with --validation above 0" if task.name.startswith(SHARDS) else "give it one (val)"
        raise UserError(
            f"{task.name} has no validation split, on which the weights are chosen; {remedy}, of other patients"
        )
    if reason := labels.obstacle_of(task):
        raise UserError(f"{task.name} cannot be learned: {reason}")
    learned = sorted({*fit.names.tolist()})
    if len(learned) < 2:
        raise UserError(
            f"{task.name} cannot be learned: "
            + (f"every case of the training split is {learned[0]!r}" if learned else "the training split has no case")
        )
    if task.is_value or task.is_time:
        return
    if alone := sorted(set(held_out.names.tolist()) - set(learned)):
        raise DataError(f"{task.name}: class {alone[0]!r} is in the validation split, and no case of training has it")
