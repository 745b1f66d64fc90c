"""From features to scores: probes are fitted, settings chosen, the test split scored once, intervals bootstrapped."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Shaped

from curia_common import logs
from curia_common.errors import UserError
from curia_jax.evaluate import labels, metrics, probes, selection
from curia_jax.evaluate.results import FLOORS, MAJORITY, Fit, Score, Study
from curia_jax.evaluate.targets import Classes

HEADS: Mapping[str, selection.Head] = {"knn": probes.knn, "ridge": probes.ridge, "logistic": probes.logistic}
# Split -> backbone -> readout -> one row per labelled slice of the split.
Features = Mapping[str, Mapping[str, Mapping[str, Float[np.ndarray, "_n _d"]]]]  # of different sizes

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Cases:
    """What the metrics count: slices, or series with the mean score of their slices.

    Attributes:
      targets, patients, series: of each case.
      case: index of the case of each test slice.
    """

    targets: Int[np.ndarray, " n"]
    patients: Shaped[np.ndarray, " n"]
    series: Shaped[np.ndarray, " n"]
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
                "has no single one; score it with --cases=slice"
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
    data_sha256: str = "",
) -> tuple[list[Score], pa.Table]:
    """Scores of a task, and the prediction of every test case.

    Args:
      task: labelled slices.
      features: of every backbone, the first being the one that is compared with the others; a split without any slice may be
        missing. Of several readouts, the one with the smallest loss on the held-out cases is used.
      heads: of HEADS.
      unit: "slice" or "series".
      draws, seed: of the bootstrap; the seed also decides the folds.
      data_sha256: for the results.

    Returns:
      Scores: first those of each backbone, then the first minus each other, then the class frequencies. And a table with
      task, backbone, head, series, patient, target, predicted (the likeliest class), decided (at the thresholds that were chosen on
      the held-out cases) and scores (one per class).

    Raises:
      UserError: a probe cannot be fitted, or `unit` does not fit the labels.
    """
    cases = Cases.of(task, unit)
    bootstrap = metrics.Bootstrap.over(cases.patients, draws=draws, seed=seed)
    fit, held_out = (task.splits[split] for split in (labels.FIT, labels.HELD_OUT))
    learned = Classes(np.concatenate([task.targets(labels.FIT), task.targets(labels.HELD_OUT)]), len(task.classes))
    patients = np.concatenate([fit.patients, held_out.patients])
    is_held_out = np.arange(len(learned)) >= len(fit.slices)
    study = Study(
        task=task.name, n=len(cases.targets), patients=len(np.unique(cases.patients)), unit=unit, classes=task.classes,
        classes_not_learned=task.unseen, draws=draws, seed=seed, train_n=len(learned),
        train_patients=len(np.unique(patients)), groups=task.groups,
        events=int(np.sum(cases.targets == 1)) if len(task.classes) == 2 else None, data_sha256=data_sha256,
    )  # fmt: skip

    def measure(backbone: str, head: str, against: str | None = None) -> list[Score]:
        fit, readout = fits.get((backbone, head), (None, None))
        scores = []
        for name, metric in metrics.METRICS.items():
            # Balanced accuracy is that of the decisions that balance recalls, accuracy that of the likeliest class.
            scores_of = decided if metric is metrics.balanced_accuracy else predicted
            found = bootstrap.estimate(
                metric, cases.targets, scores_of[backbone, head], None if against is None else scores_of[against, head]
            )
            value, low, high = map(_finite, (found.value, found.low, found.high))
            scores.append(
                Score(
                    study, backbone, head, name, value, low, high, found.degenerate, found.partial, against, readout,
                    None if against else fit,
                )
            )  # fmt: skip
        return scores

    results: list[Score] = []
    predicted: dict[tuple[str, str], Float[np.ndarray, "n classes"]] = {}
    decided: dict[tuple[str, str], Float[np.ndarray, "n classes"]] = {}
    fits: dict[tuple[str, str], tuple[Fit, str]] = {}  # with the readout
    backbones = list(features[labels.TEST])
    for backbone in backbones:
        banks = {}
        for readout in features[labels.TEST][backbone]:
            inputs = np.concatenate(
                [features[split][backbone][readout] for split in (labels.FIT, labels.HELD_OUT) if split in features]
            )
            banks[readout] = selection.bank(inputs, learned, patients, is_held_out, seed=seed, groups=task.groups)
        for head in heads:
            began = time.monotonic()
            tried = {
                readout: HEADS[head](bank, features[labels.TEST][backbone][readout]) for readout, bank in banks.items()
            }
            readout = min(tried, key=lambda name: tried[name].selection_loss)  # of equally good ones the first
            bank, prediction = banks[readout], tried[readout]
            log.info(f"  {backbone}, {head}: {readout}, {time.monotonic() - began:.1f} s")
            predicted[backbone, head] = cases.mean(prediction.scores)
            decided[backbone, head] = predicted[backbone, head] * prediction.decision
            score = _finite(prediction.selection_score)
            fits[backbone, head] = Fit(bank.features.shape[1], bank.selection, score, prediction.chosen), readout
            results += measure(backbone, head)
    names = np.array(task.classes + task.unseen)
    table = pa.concat_tables(
        _predictions(task.name, backbone, head, cases, names, values, decided[backbone, head])
        for (backbone, head), values in predicted.items()
    )
    for other in backbones[1:] if backbones[0] not in FLOORS else ():
        for head in heads:
            results += measure(backbones[0], head, other)
    predicted[MAJORITY, "none"] = decided[MAJORITY, "none"] = probes.floor(learned, len(cases.targets))
    return results + measure(MAJORITY, "none"), table


def _predictions(
    task: str, backbone: str, head: str, cases: Cases, names: Shaped[np.ndarray, " names"],
    scores: Float[np.ndarray, "n classes"], decided: Float[np.ndarray, "n classes"],
) -> pa.Table:  # fmt: skip
    count = len(cases.targets)
    return pa.table(
        {
            "task": [task] * count,
            "backbone": [backbone] * count,
            "head": [head] * count,
            "series": cases.series,
            "patient": cases.patients,
            "target": names[cases.targets],
            "predicted": names[scores.argmax(axis=1)],
            "decided": names[decided.argmax(axis=1)],
            "scores": list(scores),
        }
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
