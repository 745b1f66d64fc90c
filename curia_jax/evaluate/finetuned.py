"""Scores of a fine-tuned run in the form of the suite: its rows, its predictions, and its differences to other runs of the task."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float

from curia_common.errors import DataError, UserError
from curia_jax import json_records, storage
from curia_jax import workdir as workdirs
from curia_jax.evaluate import labels, metrics, probes, runner, scoring, selection
from curia_jax.evaluate.results import (
    ALL_LABELS,
    MAJORITY,
    RESULTS,
    TABLE,
    Fit,
    Provenance,
    Row,
    Score,
    read_rows,
    rows,
    to_csv,
)
from curia_jax.evaluate.targets import Classes

PREDICTIONS = "test-predictions.parquet"  # in the work directory
_DECISION = b"decision"  # metadata of that table: task -> weights of the classes

Outputs = Float[np.ndarray, "_cases _outputs"]  # class probabilities, a value or a log risk of every case


@dataclasses.dataclass(frozen=True)
class Model:
    """What is scored.

    Attributes:
      backbone, head, features: as in results.
      fit: as in results; of the chosen weights.
    """

    backbone: str
    head: str
    features: str
    fit: Fit
    provenance: Provenance


@dataclasses.dataclass(frozen=True)
class Finished:
    """A fine-tuned run that has scored its test split.

    Attributes:
      place: its work directory, as the user names it.
      rows: of its results.json.
      tables: task -> predictions, and the weights of the classes in the decision.
    """

    place: str
    rows: tuple[Row, ...]
    tables: Mapping[str, tuple[pa.Table, Float[np.ndarray, " _outputs"]]]

    @property
    def own(self) -> list[Row]:
        """Rows of its model, without differences."""
        return [row for row in self.rows if row["against"] is None and row["backbone"] != MAJORITY]

    @property
    def backbone(self) -> str:
        """Its name in results."""
        return self.own[0]["backbone"]

    @property
    def data_sha256(self) -> str:
        return self.own[0]["data_sha256"]


def score(
    task: labels.Task, model: Model, *, held_out: Outputs, test: Outputs, unit: str, bagged: bool, draws: int, seed: int,
    data_sha256: str, others: Sequence[Finished] = (),
) -> tuple[list[Score], pa.Table, Float[np.ndarray, " outputs"]]:  # fmt: skip
    """Scores of a task: of the model, of its differences to other runs, and of the class frequencies.

    Args:
      held_out, test: of the validation and the test cases, in the order of the task.
      unit: what metrics count.
      bagged: the outputs are of series; else of slices or rows, whose mean a series gets.
      others: earlier runs of the task, to be compared with.

    Returns:
      The scores, the predictions as scoring.score gives them, and the weights of the classes in the decision, chosen on the
      validation cases.

    Raises:
      DataError: another run scored other cases.
    """
    cases = scoring.Cases.of(task, unit)
    bootstrap = metrics.Bootstrap.over(cases.patients, draws=draws, seed=seed)
    decision = np.ones(test.shape[1])
    if task.classes:
        decision = _decision(task, held_out, unit=unit, bagged=bagged)
    scores = test if bagged else cases.mean(test)
    of, floor = (model.backbone, model.head), (MAJORITY, "none")
    predicted = scoring.Predictions({of: scores}, {of: scores * decision}, {of: (model.fit, model.features)})
    predicted.scores[floor] = predicted.decided[floor] = probes.floor(
        scoring.targets_of(task, labels.FIT), len(cases.targets)
    )
    own = scoring.table(task, *of, ALL_LABELS, seed, cases, predicted)
    for other in others:
        against, weights = _aligned(other, task.name, own, data_sha256)
        predicted.scores[other.backbone, model.head] = against
        predicted.decided[other.backbone, model.head] = against * weights
    study = scoring.study_of(
        task, cases, task.splits[labels.FIT].patients, unit=unit, draws=draws, seed=seed, data_sha256=data_sha256
    )
    backbones = [model.backbone, *(other.backbone for other in others)]
    found = scoring.measure(
        study, cases, bootstrap, predicted, backbones, [model.head], scoring.metrics_of(cases, study.classes)
    )
    kept = [one for one in found if one.backbone in (model.backbone, MAJORITY)]
    stated = [
        dataclasses.replace(one, provenance=model.provenance if one.backbone == model.backbone else None)
        for one in kept
    ]
    return stated, own, decision


def _decision(task: labels.Task, held_out: Outputs, *, unit: str, bagged: bool) -> Float[np.ndarray, " outputs"]:
    """Weights of the classes that balance recalls on the validation cases."""
    targets = Classes(np.asarray(task.targets(labels.HELD_OUT)), len(task.classes))
    part = task.splits[labels.HELD_OUT]
    if bagged:
        return selection.decision_weights(targets[np.unique(part.series, return_index=True)[1]], held_out)
    if unit == "slice":
        return selection.decision_weights(targets, held_out)
    return selection.decision_weights(
        *selection.by_unit(targets, held_out, np.unique(part.series, return_inverse=True)[1])
    )


def _aligned(
    other: Finished, task: str, own: pa.Table, data_sha256: str
) -> tuple[Outputs, Float[np.ndarray, " outputs"]]:
    """The outputs of another run, of the same cases in the same order."""
    table, weights = other.tables.get(task, (None, None))
    if table is None or weights is None:
        raise UserError(
            f"--against={other.place}: it was fine-tuned for {', '.join(other.tables)}, not for {task}; name a run of the same task"
        )
    same = ("series", "slice", "patient", "target")
    if other.data_sha256 != data_sha256 or table.select(same).to_pydict() != own.select(same).to_pydict():
        raise DataError(
            f"--against={other.place}: it scored other test cases of {task}; fine-tune it on the same data, with the same --cases"
        )
    return np.stack(table.column("scores").to_pylist()).astype(np.float64), weights


# ---- files in the work directory


def write(
    workdir: str, scores: Sequence[Score], predictions: Sequence[pa.Table], decisions: Mapping[str, Float[np.ndarray, " _outputs"]]
) -> list[Row]:  # fmt: skip
    """Writes PREDICTIONS, results.json and results.csv, and returns the rows.

    Args:
      decisions: by task.
    """
    folder = storage.root(workdir)
    table = pa.concat_tables(predictions)
    weights = {task: decision.tolist() for task, decision in decisions.items()}
    table = table.replace_schema_metadata({_DECISION: json.dumps(weights).encode()})
    content = io.BytesIO()
    pq.write_table(table, content)
    storage.write_bytes(folder / PREDICTIONS, content.getvalue())
    made = rows(scores)
    publish(folder, made)
    return made


def publish(folder: epath.Path, made: Sequence[Row]) -> None:
    """Writes results.json and results.csv."""
    corrected = runner.with_holm(made)
    storage.write_text(folder / TABLE, to_csv(corrected))
    storage.write_text(folder / RESULTS, json.dumps(corrected, indent=2) + "\n")


def read(place: str) -> Finished:
    """A fine-tuned run that has finished.

    Raises:
      UserError: there is none.
      DataError: a file of it is damaged.
    """
    folder = storage.root(place)
    if not (folder / RESULTS).exists() or not (folder / PREDICTIONS).exists():
        raise UserError(
            f"{place} has no {RESULTS} and {PREDICTIONS}: it is not the work directory of a fine-tuned run that has finished"
        )
    try:
        found = tuple(row for row in read_rows(folder / RESULTS) if Score.from_row(row))
        table = pq.read_table(io.BytesIO((folder / PREDICTIONS).read_bytes()))
        weights = json_records.loads((table.schema.metadata or {})[_DECISION])
        tables = {
            task: (
                table.filter(pa.array([one == task for one in table.column("task").to_pylist()])),
                np.array(of_task, np.float64),
            )
            for task, of_task in weights.items()
        }
        made = Finished(place, found, tables)
        if not made.own:
            raise ValueError("no rows")
        return made
    except (pa.ArrowException, KeyError, ValueError, AttributeError) as error:
        raise DataError(
            f"the results of {place} are damaged ({type(error).__name__}); delete {workdirs.SELECTED} and rerun curia_jax.finetune"
        ) from error


# ---- beside frozen features


def beside(job: runner.Job, runs: Sequence[Finished]) -> runner.Job:
    """The job with the rows and predictions of the fine-tuned runs of its task behind its own.

    Args:
      runs: of any tasks.
    """
    own = [
        one
        for one in runs
        if one.rows[0]["protocol"] == job.protocol and any(row["task"] == job.task for row in one.rows)
    ]
    score_frozen = job.run
    if not own or score_frozen is None:
        return job

    def run() -> tuple[list[Score], pa.Table]:
        scores, predictions = score_frozen()
        data = scores[0].study.data_sha256
        for one in own:
            if one.data_sha256 != data:
                raise DataError(
                    f"--finetuned={one.place}: it was fine-tuned on other data of {job.task} ({one.data_sha256[:12]}) than is scored here "
                    f"({data[:12]}); name the same --data"
                )
            scores += [
                Score.from_row(row) for row in one.rows if row["task"] == job.task and row["backbone"] != MAJORITY
            ]
            predictions = pa.concat_tables([predictions, one.tables[job.task][0].replace_schema_metadata(None)])
        return scores, predictions

    decides = [job.key, [[one.place, list(one.rows)] for one in own]]
    return dataclasses.replace(job, key=json.dumps(decides), run=run)


def check_names(runs: Sequence[Finished], tasks: Sequence[str]) -> None:
    """Raises UserError where two runs of a task have the same name in results, or one is of no task that is scored."""
    seen: dict[tuple[str, str, str], str] = {}
    for one in runs:
        if not set(one.tables) & set(tasks):
            raise UserError(
                f"--finetuned={one.place}: it was fine-tuned for {', '.join(one.tables)}, which is not among the tasks to score"
            )
        for row in one.own:
            name = row["task"], row["backbone"], row["head"]
            other = seen.setdefault(name, one.place)
            if other != one.place:
                raise UserError(
                    f"--finetuned: {one.place} and {other} are both {row['backbone']!r} for {row['task']}; name one of them"
                )
