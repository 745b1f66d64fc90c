"""Jobs of tasks whose data is a folder in the published schema."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

import curia_common
from curia_common.errors import DataError, UserError
from curia_jax.evaluate import corpus, features, labels, runner, scoring, task_data
from curia_jax.evaluate.cache import gather
from curia_jax.evaluate.results import CLINICAL, Score
from curia_jax.evaluate.subgroups import Column
from curia_jax.evaluate.task_data import TaskImages
from curia_jax.evaluate.tasks import Task

OURS = "ours"


def job(
    task: Task,
    folder: Path,
    models: Sequence[features.Backbone],
    settings: runner.Settings,
    cache: Path,
    *,
    named: bool,
) -> runner.Job:
    """A task by the protocol `ours`.

    Args:
      folder: of all tasks' data.
      models: the first is compared with the others.
      cache: folder of features.
      named: the user asked for this very task, so that it fails without data; otherwise it is not run.
    """
    if task.not_run:
        return runner.Job(task.name, OURS, not_run=task.not_run)
    try:
        files = task_data.find(folder, task.name)
    except DataError as error:
        return _failing(task, error)
    if files is None:
        reason = f"{folder} has no data of {task.name}; get it from: {task.access}"
        return _failing(task, UserError(reason)) if named else runner.Job(task.name, OURS, not_run=reason)

    def run() -> tuple[list[Score], pa.Table]:
        cases = task_data.read_cases(task, files)
        images = {split: TaskImages(task, files, split) for split, part in cases.splits.items() if len(part.slices)}
        slices = {split: source.numbers for split, source in images.items()}
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in cases.splits.items())
        kind = f"{len(cases.classes)} classes" if cases.classes else task.target
        runner.log.info(f"{kind}, cases: {counts}; intervals over {cases.groups}")
        by_slice = gather(
            {split: (source, slices[split]) for split, source in images.items()}, models, cache, settings.batch_size
        )
        by_case = {
            split: {model: task_data.pooled(slices[split], values) for model, values in by_model.items()}
            for split, by_model in by_slice.items()
        }
        if task.clinical:
            for split, columns in task_data.clinical(task, files).items():
                by_case[split][CLINICAL] = {"+".join(task.clinical): columns}
        scores, predictions = scoring.score(
            cases, by_case, heads=settings.heads, unit=_unit(cases, settings.cases), draws=settings.draws,
            seed=settings.seed, few=settings.few, data_sha256=files.sha256, groups=_groups(task, files, settings.subgroups),
        )  # fmt: skip
        if settings.corpora:
            sources = {split: (source, slices[split]) for split, source in images.items()}
            seen = corpus.overlap(sources, settings.corpora, settings.batch_size)
            rows = {split: np.unique(numbers // task_data.MOST_SLICES) for split, numbers in seen.items()}
            scores, predictions = corpus.noted(scores, predictions, cases.splits[labels.TEST], rows)
        provenance = {model.name: model.provenance for model in models}
        return [dataclasses.replace(one, provenance=provenance.get(one.backbone)) for one in scores], predictions

    decides = [
        curia_common.__version__, OURS, dataclasses.asdict(task), files.sha256,
        [(model.name, model.digest) for model in models], dataclasses.asdict(settings),
    ]  # fmt: skip
    return runner.Job(task.name, OURS, json.dumps(decides), run)


def _groups(task: Task, files: task_data.Files, columns: Sequence[Column]) -> dict[str, Shaped[np.ndarray, " rows"]]:
    """The group of every test row, by the columns that the task has; tasks of a suite do not have the same."""
    found = {}
    for column in columns:
        values = task_data.column(files, labels.TEST, column.name)
        if values is None:
            runner.log.warning(f"{task.name} has no column {column.name}, so that there are no subgroups by it")
        else:
            found[column.name] = column.groups(values)
    return found


def _failing(task: Task, error: UserError) -> runner.Job:
    def run() -> tuple[list[Score], pa.Table]:
        raise error

    return runner.Job(task.name, OURS, run=run)


def _unit(cases: labels.Task, asked: str) -> str:
    """What a case is: the series, where several rows are of one and agree in their class."""
    test = cases.splits[labels.TEST]
    _, first, of = np.unique(test.series, return_index=True, return_inverse=True)
    agree = bool((test.names == test.names[first][of]).all())
    return "series" if len(first) < len(of) and agree else asked
