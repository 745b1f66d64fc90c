"""Jobs of tasks whose data is a folder in the published schema."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

import curia_common
from curia_common.errors import DataError, UserError
from curia_jax.evaluate import corpus, features, labels, official_protocol, runner, scoring, task_data, token_store
from curia_jax.evaluate.cache import gather
from curia_jax.evaluate.results import CLINICAL, Score
from curia_jax.evaluate.subgroups import Column
from curia_jax.evaluate.task_data import MOST_SLICES, Files, Picture, TaskImages
from curia_jax.evaluate.tasks import TIME, VALUE, Task
from curia_jax.evaluate.tokens import Tokens

OURS, OFFICIAL = "ours", official_protocol.NAME
PROTOCOLS = {OURS: (OURS,), OFFICIAL: (OFFICIAL,), "both": (OURS, OFFICIAL)}


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a task, read once for all protocols, when it is first needed."""

    task: Task
    files: Files
    columns: tuple[Column, ...] = ()  # that subgroups are made by

    @functools.cached_property
    def cases(self) -> labels.Task:
        found = task_data.read_cases(self.task, self.files)
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in found.splits.items())
        kind = f"{len(found.classes)} classes" if found.classes else self.task.target
        runner.log.info(f"{kind}, cases: {counts}; intervals over {found.groups}")
        return found

    @functools.cached_property
    def images(self) -> dict[str, TaskImages]:
        """Of every split that has rows."""
        splits = self.cases.splits.items()
        return {split: TaskImages(self.task, self.files, split) for split, part in splits if len(part.slices)}

    @functools.cached_property
    def groups(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """The group of every test row, by the columns that the task has; tasks of a suite do not have the same."""
        found = {}
        for column in self.columns:
            values = task_data.column(self.files, labels.TEST, column.name)
            if values is None:
                runner.log.warning(
                    f"{self.task.name} has no column {column.name}, so that there are no subgroups by it"
                )
            else:
                found[column.name] = column.groups(values)
        return found

    def test_pictures(self, rows: Sequence[int]) -> list[Picture]:
        """See `TaskImages.of_rows`."""
        return TaskImages(self.task, self.files, labels.TEST).of_rows(rows)


def jobs(
    task: Task,
    folder: Path,
    models: Sequence[features.Backbone],
    settings: runner.Settings,
    cache: Path,
    *,
    protocols: Sequence[str],
    named: bool,
) -> list[runner.Job]:
    """A task by one or both protocols.

    Args:
      folder: of all tasks' data.
      models: the first is compared with the others.
      cache: folder of features.
      named: the user asked for this very task, so that it fails without data; otherwise it is not run.
    """
    without_head = scoring.obstacle(settings.heads, is_value=task.target == VALUE, is_time=task.target == TIME)
    # Of a whole suite, the tasks that the heads of the command do not learn are left out.
    left_out = None if named or without_head is None else f"its target is {without_head}"
    reasons = {OURS: task.not_run or left_out, OFFICIAL: task.not_run or official_protocol.obstacle(task)}
    not_run = [
        runner.Job(task.name, protocol, not_run=reasons[protocol]) for protocol in protocols if reasons[protocol]
    ]
    protocols = [protocol for protocol in protocols if not reasons[protocol]]
    if not protocols:
        return not_run
    return _with_data(task, folder, models, settings, cache, protocols, named=named) + not_run


def _with_data(
    task: Task, folder: Path, models: Sequence[features.Backbone], settings: runner.Settings, cache: Path,
    protocols: Sequence[str], *, named: bool,
) -> list[runner.Job]:  # fmt: skip
    try:
        files = task_data.find(folder, task.name)
    except DataError as error:
        return [_failing(task, protocol, error) for protocol in protocols]
    if files is None:
        reason = f"{folder} has no data of {task.name}; get it from: {task.access}"
        return [
            _failing(task, protocol, UserError(reason)) if named else runner.Job(task.name, protocol, not_run=reason)
            for protocol in protocols
        ]
    read = TaskData(task, files, settings.subgroups)
    return [
        (_ours if protocol == OURS else _official)(read, models, settings, cache) for protocol in protocols
    ]  # fmt: skip


def _ours(read: TaskData, models: Sequence[features.Backbone], settings: runner.Settings, cache: Path) -> runner.Job:
    task, files = read.task, read.files

    def run() -> tuple[list[Score], pa.Table]:
        cases, images = read.cases, read.images
        slices = {split: source.numbers for split, source in images.items()}
        wanted = {split: (source, slices[split]) for split, source in images.items()}
        by_slice = gather(wanted, models, cache, settings.batch_size)
        by_case = {
            split: {model: task_data.pooled(slices[split], values) for model, values in by_model.items()}
            for split, by_model in by_slice.items()
        }
        if task.clinical:
            for split, columns in task_data.clinical(task, files).items():
                by_case[split][CLINICAL] = {"+".join(task.clinical): columns}
        tokens = None
        if scoring.takes_tokens(cases, settings.heads):
            found = token_store.gather_tokens(wanted, models, cache, settings.batch_size, kind="float16")
            tokens = {
                split: {
                    model: Tokens.of_slices(some.values, some.inside, slices[split] // MOST_SLICES)
                    for model, some in by_model.items()
                }
                for split, by_model in found.items()
            }
        scores, predictions = scoring.score(
            cases, by_case, heads=settings.heads, unit=unit_of(cases, settings.cases), draws=settings.draws,
            seed=settings.seed, few=settings.few, data_sha256=files.sha256, readouts=settings.readouts, tokens=tokens,
            groups=read.groups,
        )  # fmt: skip
        return _noted(read, settings, _with_provenance(scores, models), predictions)

    decides = [
        curia_common.__version__, OURS, dataclasses.asdict(task), files.sha256,
        [(model.name, model.digest) for model in models], dataclasses.asdict(settings),
    ]  # fmt: skip
    return runner.Job(task.name, OURS, json.dumps(decides), run, pictures=read.test_pictures)


def _official(
    read: TaskData, models: Sequence[features.Backbone], settings: runner.Settings, cache: Path
) -> runner.Job:
    task = read.task

    def run() -> tuple[list[Score], pa.Table]:
        scores, predictions = official_protocol.score(
            task, read.cases, read.images, models, cache, draws=settings.draws, seed=settings.seed,
            batch_size=settings.batch_size, data_sha256=read.files.sha256, groups=read.groups,
        )  # fmt: skip
        return _noted(read, settings, _with_provenance(scores, models), predictions)

    decides = [
        curia_common.__version__, OFFICIAL, dataclasses.asdict(task), read.files.sha256,
        [(model.name, model.digest) for model in models], settings.draws, settings.seed,
        [dataclasses.asdict(one) for one in settings.corpora], [dataclasses.asdict(one) for one in settings.subgroups],
    ]  # fmt: skip
    return runner.Job(task.name, OFFICIAL, json.dumps(decides), run, pictures=read.test_pictures)


def _noted(
    read: TaskData, settings: runner.Settings, scores: list[Score], predictions: pa.Table
) -> tuple[list[Score], pa.Table]:
    """With the rows of each split that are in one of the corpora."""
    if not settings.corpora:
        return scores, predictions
    sources = {split: (source, source.numbers) for split, source in read.images.items()}
    seen = corpus.overlap(sources, settings.corpora, settings.batch_size)
    rows = {split: np.unique(numbers // MOST_SLICES) for split, numbers in seen.items()}
    return corpus.noted(scores, predictions, read.cases.splits[labels.TEST], rows)


def _with_provenance(scores: Sequence[Score], models: Sequence[features.Backbone]) -> list[Score]:
    provenance = {model.name: model.provenance for model in models}
    return [dataclasses.replace(one, provenance=provenance.get(one.backbone)) for one in scores]


def _failing(task: Task, protocol: str, error: UserError) -> runner.Job:
    def run() -> tuple[list[Score], pa.Table]:
        raise error

    return runner.Job(task.name, protocol, run=run)


def unit_of(cases: labels.Task, asked: str) -> str:
    """What metrics count: the series, where several rows are of one and agree in their class."""
    test = cases.splits[labels.TEST]
    _, first, of = np.unique(test.series, return_index=True, return_inverse=True)
    agree = bool((test.names == test.names[first][of]).all())
    return "series" if len(first) < len(of) and agree else asked
