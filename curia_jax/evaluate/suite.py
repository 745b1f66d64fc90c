"""Jobs of tasks whose data is a folder in the published schema."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

import curia_common
from curia_common.errors import DataError, UserError
from curia_jax.evaluate import across, corpus, features, labels, official_protocol, runner, scoring
from curia_jax.evaluate.results import MODALITY, Score
from curia_jax.evaluate.subgroups import Column
from curia_jax.evaluate.task_inputs import JoinedData, Missing, TaskData, open_task
from curia_jax.evaluate.tasks import TIME, VALUE, Task

OURS, OFFICIAL = "ours", official_protocol.NAME
PROTOCOLS = {OURS: (OURS,), OFFICIAL: (OFFICIAL,), "both": (OURS, OFFICIAL)}


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
      cache: folder of features and of decoded images.
      named: the user asked for this very task, so that it fails without data; otherwise it is not run.

    Raises:
      UserError: the task is across modalities, and --across names a column.
    """
    if task.parts and settings.across:
        raise UserError(
            f"--across={settings.across}: {task.name} is across {MODALITY} already; score it in a command of its own"
        )
    without_head = scoring.obstacle(settings.heads, is_value=task.target == VALUE, is_time=task.target == TIME)
    # Of a whole suite, the tasks that the heads of the command do not learn are left out.
    left_out = None if named or without_head is None else f"its target is {without_head}"
    reasons = {OURS: task.not_run or left_out, OFFICIAL: task.not_run or official_protocol.obstacle(task)}
    not_run = [
        runner.Job(task.name, protocol, not_run=reasons[protocol]) for protocol in protocols if reasons[protocol]
    ]
    protocols = [protocol for protocol in protocols if not reasons[protocol]]
    made = _with_data(task, folder, models, settings, cache, protocols, named=named) if protocols else []
    column = Column(MODALITY) if task.parts else settings.across
    name = None if column is None else str(column)
    return [dataclasses.replace(one, across=name) if one.protocol == OURS else one for one in made + not_run]


def _with_data(
    task: Task, folder: Path, models: Sequence[features.Backbone], settings: runner.Settings, cache: Path,
    protocols: Sequence[str], *, named: bool,
) -> list[runner.Job]:  # fmt: skip
    try:
        read = open_task(task, folder, cache, settings.subgroups, settings.class_map)
    except DataError as error:
        return [_failing(task, protocol, error) for protocol in protocols]
    if isinstance(read, Missing):
        reason = f"{folder} has no data of {read.task.name}; get it from: {read.task.access}"
        return [
            _failing(task, protocol, UserError(reason)) if named else runner.Job(task.name, protocol, not_run=reason)
            for protocol in protocols
        ]
    found = [_ours(read, models, settings)] if OURS in protocols else []
    if OFFICIAL in protocols:
        assert isinstance(read, TaskData)  # tasks that are made of others have no official settings
        found.append(_official(read, models, settings))
    return found


def _ours(read: TaskData | JoinedData, models: Sequence[features.Backbone], settings: runner.Settings) -> runner.Job:
    def run() -> tuple[list[Score], pa.Table]:
        cases = read.cases
        by_case = read.by_case(models, settings.batch_size)
        tokens = None
        if scoring.takes_tokens(cases, settings.heads):
            tokens = read.tokens(models, settings.batch_size)
        unit = unit_of(cases, settings.cases)
        if column := read.across(settings.across):
            scores, predictions = across.score(
                across.Inputs(cases, by_case, tokens, read.sides(column)), str(column), heads=settings.heads,
                unit=unit, draws=settings.draws, seed=settings.seed, few=settings.few, data_sha256=read.sha256,
                readouts=settings.readouts,
            )  # fmt: skip
        else:
            scores, predictions = scoring.score(
                cases, by_case, heads=settings.heads, unit=unit, draws=settings.draws, seed=settings.seed, few=settings.few,
                data_sha256=read.sha256, readouts=settings.readouts, tokens=tokens, groups=read.groups,
            )  # fmt: skip
        return _noted(read, settings, _with_provenance(scores, models), predictions)

    decides = [
        curia_common.__version__, OURS, dataclasses.asdict(read.task), read.sha256,
        [(model.name, model.digest) for model in models], dataclasses.asdict(settings),
    ]  # fmt: skip
    return runner.Job(read.task.name, OURS, json.dumps(decides), run, pictures=read.test_pictures)


def _official(read: TaskData, models: Sequence[features.Backbone], settings: runner.Settings) -> runner.Job:
    task = read.task

    def run() -> tuple[list[Score], pa.Table]:
        scores, predictions = official_protocol.score(
            task, read.cases, read.images, models, read.cache, draws=settings.draws, seed=settings.seed,
            batch_size=settings.batch_size, data_sha256=read.sha256, groups=read.groups,
        )  # fmt: skip
        return _noted(read, settings, _with_provenance(scores, models), predictions)

    decides = [
        curia_common.__version__, OFFICIAL, dataclasses.asdict(task), read.sha256,
        [(model.name, model.digest) for model in models], settings.draws, settings.seed,
        [dataclasses.asdict(one) for one in settings.corpora], [dataclasses.asdict(one) for one in settings.subgroups],
    ]  # fmt: skip
    return runner.Job(task.name, OFFICIAL, json.dumps(decides), run, pictures=read.test_pictures)


def _noted(
    read: TaskData | JoinedData, settings: runner.Settings, scores: list[Score], predictions: pa.Table
) -> tuple[list[Score], pa.Table]:
    """With the rows of each split that are in one of the corpora."""
    if not settings.corpora:
        return scores, predictions
    rows = read.in_corpora(settings.corpora, settings.batch_size)
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
