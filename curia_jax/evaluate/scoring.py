"""From features to result rows: probes fitted, settings chosen, the test split met once, intervals and differences."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Shaped

from curia_common.errors import UserError
from curia_jax.evaluate import labels, metrics, probes

HEADS: dict[str, probes.Probe] = {"knn": probes.knn, "ridge": probes.ridge, "logistic": probes.logistic}
INTERVAL = "95 % percentile bootstrap over patients"
# The backbone whose differences to the others are of interest.
OURS = "checkpoint"

Row = dict[str, Any]
Features = Mapping[str, Mapping[str, Float[np.ndarray, "n d"]]]


@dataclasses.dataclass(frozen=True)
class Cases:
    """What the metrics count: slices, or series with the mean score of their slices."""

    targets: Int[np.ndarray, " n"]
    patients: Shaped[np.ndarray, " n"]
    series: Shaped[np.ndarray, " n"]
    # Row of the case for each test slice.
    case: Int[np.ndarray, " slices"]

    @classmethod
    def of(cls, task: labels.Task, unit: str) -> "Cases":
        """The test cases of a task; `unit` is "slice" or "series".

        Raises:
          UserError: slices of one series differ in their label.
        """
        test = task.splits[labels.TEST]
        targets = task.targets(labels.TEST)
        if unit == "slice":
            return cls(targets, test.patients, test.series, np.arange(len(targets)))
        series, first, case = np.unique(test.series, return_index=True, return_inverse=True)
        mixed = np.flatnonzero(targets != targets[first][case])
        if len(mixed):
            raise UserError(
                f"slices of series {test.series[mixed[0]]} have different values of {task.name!r}, so that the series "
                "has none of its own; score it with --cases=slice"
            )
        return cls(targets[first], test.patients[first], series, case)

    def mean(self, scores: Float[np.ndarray, "slices classes"]) -> Float[np.ndarray, "n classes"]:
        """Mean score over the slices of each case."""
        sums = np.zeros((len(self.targets), scores.shape[1]))
        np.add.at(sums, self.case, scores)
        return sums / np.bincount(self.case)[:, None]


def score(
    task: labels.Task,
    features: Features,
    *,
    heads: Sequence[str] = tuple(HEADS),
    unit: str = "slice",
    draws: int = 2000,
    seed: int = 0,
) -> tuple[list[Row], pa.Table]:
    """Rows of results and the scores of every test case.

    Args:
      task: labelled slices.
      features: split -> backbone -> one row per labelled slice of that split; a split without any may be missing.
      heads: of HEADS.
      unit: "slice" or "series".

    Returns:
      Rows with task, backbone, head, metric, value, low, high, n and how they came about (None stands for undefined);
      first those of each backbone, then OURS minus each other backbone (`against`), then the majority class. And a
      table with task, backbone, head, series, patient, target, predicted and scores (one per class).

    Raises:
      UserError: a probe cannot be fitted, or `unit` does not fit the labels.
    """
    cases = Cases.of(task, unit)
    bootstrap = metrics.Bootstrap.over(cases.patients, draws=draws, seed=seed)
    common = {
        "task": task.name, "n": len(cases.targets), "patients": len(np.unique(cases.patients)), "unit": unit,
        "classes": list(task.classes), "classes_not_learned": list(task.unseen),
        "interval": INTERVAL, "draws": draws, "seed": seed,
    }  # fmt: skip

    def rows(kind: Row, scores: Any, against: Any = None) -> list[Row]:
        suffix = "" if against is None else "_difference"
        return [
            {**kind, "metric": name + suffix, **_numbers(bootstrap.estimate(metric, cases.targets, scores, against))}
            for name, metric in metrics.METRICS.items()
        ]

    fit, held_out = (task.splits[split] for split in (labels.FIT, labels.HELD_OUT))
    targets = np.concatenate([task.targets(labels.FIT), task.targets(labels.HELD_OUT)])
    patients = np.concatenate([fit.patients, held_out.patients])
    is_held_out = np.arange(len(targets)) >= len(fit.slices)
    common["train_n"], common["train_patients"] = len(targets), len(np.unique(patients))

    results: list[Row] = []
    scores: dict[tuple[str, str], np.ndarray] = {}
    for backbone in features[labels.TEST]:
        learned = np.concatenate(
            [features[split][backbone] for split in (labels.FIT, labels.HELD_OUT) if split in features]
        )
        bank = probes.bank(learned, targets, patients, is_held_out, classes=len(task.classes), seed=seed)
        for head in heads:
            began = time.monotonic()
            prediction = HEADS[head](bank, features[labels.TEST][backbone])
            print(f"  {backbone}, {head}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
            scores[backbone, head] = cases.mean(prediction.scores)
            kind = {
                "backbone": backbone, "head": head, "dimension": learned.shape[1], "selection": bank.selection,
                "selection_auroc": _number(prediction.selection_score), "chosen": prediction.chosen,
            }  # fmt: skip
            results += rows(kind, scores[backbone, head])
    others = [backbone for backbone in features[labels.TEST] if backbone != OURS]
    for other in others if OURS in features[labels.TEST] else ():
        for head in heads:
            kind = {"backbone": OURS, "against": other, "head": head}
            results += rows(kind, scores[OURS, head], scores[other, head])
    majority = probes.majority(targets, len(task.classes), len(cases.targets))
    results += rows({"backbone": "none", "head": "majority"}, majority)

    names = np.array(task.classes + task.unseen)
    table = pa.concat_tables(
        pa.table(
            {
                "task": [task.name] * len(cases.targets),
                "backbone": [backbone] * len(cases.targets),
                "head": [head] * len(cases.targets),
                "series": cases.series,
                "patient": cases.patients,
                "target": names[cases.targets],
                "predicted": names[values.argmax(axis=1)],
                "scores": list(values),
            }  # fmt: skip
        )
        for (backbone, head), values in scores.items()
    )
    return [{**_ordered(row), **common, **row} for row in results], table


def _ordered(row: Row) -> Row:
    """The fields that every reader wants, first."""
    return {name: row.get(name) for name in ("task", "backbone", "head", "metric", "value", "low", "high", "n")}


def _numbers(estimate: metrics.Estimate) -> Row:
    return {
        "value": _number(estimate.value), "low": _number(estimate.low), "high": _number(estimate.high),
        "degenerate_draws": estimate.degenerate, "draws_without_a_class": estimate.partial,
    }  # fmt: skip


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
