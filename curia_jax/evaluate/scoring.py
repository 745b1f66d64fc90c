"""From features to scores: probes are fitted, settings chosen, the test split scored once, intervals bootstrapped."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped

from curia_common import logs
from curia_common.errors import UserError
from curia_jax.evaluate import efficient_probing, labels, metrics, probes, selection, statistics, subgroups, subsets
from curia_jax.evaluate.results import ALL_LABELS, FLOORS, MAJORITY, Fit, Score, Study, labels_text
from curia_jax.evaluate.targets import Classes, Targets, Times, Values
from curia_jax.evaluate.tokens import Tokens

HEADS: Mapping[str, selection.Head] = {
    "knn": probes.knn, "ridge": probes.ridge, "logistic": probes.logistic, "cox": probes.cox,
    "efficient": efficient_probing.efficient,
}  # fmt: skip
# Of HEADS, those that learn each kind of target.
OF_CLASSES, OF_VALUES, OF_TIMES = ("knn", "ridge", "logistic", "efficient"), ("knn", "ridge", "efficient"), ("cox",)
DEFAULT_HEADS = ("knn", "ridge", "logistic", "cox")
OF_TOKENS = ("efficient",)  # that take lists of tokens, not one row of features per case
TOKENS = "tokens"  # their readout
# Split -> backbone -> readout -> one row per labelled slice of the split.
Features = Mapping[str, Mapping[str, Mapping[str, Float[np.ndarray, "_n _d"]]]]  # of different sizes
# Split -> backbone -> one list per labelled slice of the split.
TokenLists = Mapping[str, Mapping[str, Tokens]]

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Cases:
    """What the metrics count: slices, or series with the mean score of their slices.

    Attributes:
      targets: class numbers, values or times.
      patients, series: of each case.
      slices: of each case, its index in the split; the middle slice of a series.
      case: index of the case of each labelled slice.
    """

    targets: Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times
    patients: Shaped[np.ndarray, " n"]
    series: Shaped[np.ndarray, " n"]
    slices: Int[np.ndarray, " n"]
    case: Int[np.ndarray, " slices"]

    @classmethod
    def of(cls, task: labels.Task, unit: str, split: str = labels.TEST) -> "Cases":
        """The cases of a split of a task; `unit` is "slice" or "series".

        Raises:
          UserError: slices of one series differ in their label.
        """
        found = task.splits[split]
        targets = task.targets(split)
        if unit == "slice":
            return cls(targets, found.patients, found.series, found.slices, np.arange(len(targets)))
        series, first, case = np.unique(found.series, return_index=True, return_inverse=True)
        mixed = np.flatnonzero(found.names != found.names[first][case])
        if len(mixed):
            raise UserError(
                f"slices of series {found.series[mixed[0]]} have different values of {task.name!r}, so that the series "
                "has no single one; score it with --cases=slice"
            )
        members = [np.flatnonzero(case == number) for number in range(len(series))]
        middle = np.array([found.slices[of_series[len(of_series) // 2]] for of_series in members])
        return cls(targets[first], found.patients[first], series, middle, case)

    def restricted(self, inside: Bool[np.ndarray, " n"]) -> "Cases":
        """Some of the cases; `case` has no meaning in the result."""
        return Cases(
            self.targets[inside], self.patients[inside], self.series[inside], self.slices[inside], np.zeros(0, np.int64)
        )

    def mean(self, scores: Float[np.ndarray, "slices classes"]) -> Float[np.ndarray, "n classes"]:
        """Mean score over the slices of each case."""
        sums = np.zeros((len(self.targets), scores.shape[1]))
        np.add.at(sums, self.case, scores)
        return sums / np.bincount(self.case)[:, None]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the heads of a task predicted, by backbone and head.

    Attributes:
      scores: mean over the slices of each case.
      decided: probabilities times the weights of the decision.
      fits: how the head was fitted, and the readout that was chosen.
    """

    scores: dict[tuple[str, str], Float[np.ndarray, "n outputs"]]
    decided: dict[tuple[str, str], Float[np.ndarray, "n outputs"]]
    fits: dict[tuple[str, str], tuple[Fit, str]]

    def restricted(self, inside: Bool[np.ndarray, " n"]) -> "Predictions":
        """Of some of the cases."""
        scores, decided = ({of: values[inside] for of, values in by.items()} for by in (self.scores, self.decided))
        return Predictions(scores, decided, self.fits)


def score(
    task: labels.Task,
    features: Features,
    *,
    heads: Sequence[str] = DEFAULT_HEADS,
    unit: str = "slice",
    draws: int = 2000,
    seed: int = 0,
    few: Sequence[int | float] = (1.0,),
    data_sha256: str = "",
    groups: Mapping[str, Shaped[np.ndarray, " slices"]] | None = None,
    readouts: Sequence[str] = (),
    tokens: TokenLists | None = None,
) -> tuple[list[Score], pa.Table]:
    """Scores of a task, and the prediction of every test case.

    Args:
      task: labelled slices.
      features: of every backbone, the first being the one that is compared with the others; a split without any slice may be
        missing. Of several readouts, the one with the smallest loss on the held-out cases is used.
      heads: of HEADS; those that cannot learn this kind of target are left out.
      unit: "slice" or "series".
      draws, seed: of the bootstrap; the seed also decides the folds.
      few: how many labels heads learn from: shares of the patients of each class, or numbers of cases of each class. Less than
        all is repeated with subsets.SEEDS seeds from `seed` on, each with subsets of its own that are the same for every backbone.
      data_sha256: for the results.
      groups: by the name of a column, the group of each test slice. Heads that learn from all labels are scored on each, too.
      readouts: of those of `features`, the ones that may be chosen; all unless given, and of backbones that have none of these.
      tokens: for the heads of OF_TOKENS.

    Returns:
      Scores: first those of each backbone, then the first minus each other, then the class frequencies. And a table with
      task, backbone, head, labels, seed, series, slice (index in the test split; of a series its middle one), patient, target, predicted
      (the likeliest class, the value, or the log risk), decided (the class at the thresholds that were chosen on the held-out cases) and scores (one
      per class, or the value).

    Raises:
      UserError: a probe cannot be fitted, or `unit` does not fit the labels.
    """
    heads = learners(task, heads)
    cases = Cases.of(task, unit)
    results, tables = [], []
    for amount, own in repeats(few, seed):
        study, predicted = learn(
            task, features, cases, heads=heads, unit=unit, draws=draws, seed=own, amount=amount, data_sha256=data_sha256,
            readouts=readouts, tokens=tokens,
        )  # fmt: skip
        bootstrap = metrics.Bootstrap.over(cases.patients, draws=draws, seed=own)
        of = metrics_of(cases, study.classes)
        results += measure(study, cases, bootstrap, predicted, list(features[labels.TEST]), heads, of)
        if groups and is_everything(amount):
            results += measure_groups(study, cases, predicted, groups, of)
        tables += [
            table(task, backbone, head, study.labels, own, cases, predicted) for backbone, head in predicted.fits
        ]
    return results, pa.concat_tables(tables)


def repeats(few: Sequence[int | float], seed: int) -> list[tuple[int | float, int]]:
    """Each amount of labels with its seeds: all labels once, less with subsets.SEEDS seeds."""
    return [
        (amount, own)
        for amount in few
        for own in ((seed,) if is_everything(amount) else range(seed, seed + subsets.SEEDS))
    ]


def takes_tokens(task: labels.Task, heads: Sequence[str]) -> bool:
    """Whether one of the heads that learn this label takes lists of tokens."""
    return any(head in OF_TOKENS for head in learners(task, heads))


def learners(task: labels.Task, heads: Sequence[str]) -> list[str]:
    """Those of the heads that learn what the label is."""
    if reason := obstacle(heads, is_value=task.is_value, is_time=task.is_time):
        raise UserError(f"{task.name} is {reason}")
    return [head for head in heads if head in _able(is_value=task.is_value, is_time=task.is_time)[1]]


def obstacle(heads: Sequence[str], *, is_value: bool, is_time: bool) -> str | None:
    """Why none of the heads learns a kind of label; None if one does."""
    kind, able = _able(is_value=is_value, is_time=is_time)
    if set(able) & set(heads):
        return None
    return f"{kind}, which {', '.join(able)} can learn; name one in --heads"


def _able(*, is_value: bool, is_time: bool) -> tuple[str, tuple[str, ...]]:
    """What a label is, in words, and the heads that learn it."""
    if is_time:
        return "a time to an event", OF_TIMES
    return ("a value", OF_VALUES) if is_value else ("a class", OF_CLASSES)


def _learning(
    task: labels.Task, amount: int | float, seed: int
) -> tuple[Int[np.ndarray, " m"], Shaped[np.ndarray, " m"]]:
    """Numbers of the slices that heads learn from, training and validation together, and which are of validation.

    A share is taken of both splits; a number of cases of the training split, which leaves nothing to validate on.
    """
    count = len(task.splits[labels.FIT].slices)
    parts = [
        np.arange(len(task.splits[split].slices)) if is_everything(amount)
        else _subset(targets_of(task, split), task.splits[split].patients, amount, seed)
        for split in (labels.FIT, labels.HELD_OUT)
        if len(task.splits[split].slices) and (split == labels.FIT or isinstance(amount, float))
    ]  # fmt: skip
    rows = np.concatenate([part + count * number for number, part in enumerate(parts)])
    return rows, rows >= count


def is_everything(amount: int | float) -> bool:
    """The share 1.0, and not one case of each class."""
    return isinstance(amount, float) and amount == 1


def _subset(
    targets: Targets, patients: Shaped[np.ndarray, " n"], amount: int | float, seed: int
) -> Int[np.ndarray, " m"]:
    if isinstance(amount, float):
        return subsets.fraction(targets, patients, amount, seed)
    if not isinstance(targets, Classes):
        raise UserError(f"{amount} cases of every class: the label has no classes; write a share instead, such as 0.1")
    return subsets.shots(targets, patients, amount, seed)


def targets_of(task: labels.Task, *splits: str) -> Targets:
    parts = [task.targets(split) for split in splits]
    if task.is_time:
        times = [part for part in parts if isinstance(part, Times)]
        return Times(np.concatenate([part.time for part in times]), np.concatenate([part.event for part in times]))
    values = np.concatenate([part for part in parts if not isinstance(part, Times)])
    return Values(values) if task.is_value else Classes(values, len(task.classes))


def learn(
    task: labels.Task, features: Features, cases: Cases, *, heads: Sequence[str], unit: str, draws: int, seed: int,
    amount: int | float, data_sha256: str, readouts: Sequence[str], tokens: TokenLists | None,
) -> tuple[Study, Predictions]:  # fmt: skip
    """Predictions of heads that learn from some of the slices, and what their rows share; see `score`.

    Args:
      cases: of the test split.
      heads: that learn this kind of target.
      seed: of the subset, the folds and the bootstrap.
    """
    rows, is_held_out = _learning(task, amount, seed)
    splits = (labels.FIT, labels.HELD_OUT)
    learned = targets_of(task, *splits)[rows]
    patients = np.concatenate([task.splits[split].patients for split in splits])[rows]
    series = np.concatenate([task.splits[split].series for split in splits])[rows]
    units = np.unique(series, return_inverse=True)[1] if unit == "series" else None
    study = study_of(
        task, cases, patients, unit=unit, draws=draws, seed=seed, labels=labels_text(amount), data_sha256=data_sha256
    )
    predicted = Predictions({}, {}, {})
    for backbone in features[labels.TEST]:
        offered = features[labels.TEST][backbone]
        offered = {name: values for name, values in offered.items() if name in readouts} or offered

        def bank(inputs: Float[np.ndarray, "n d"] | Tokens) -> selection.Bank:
            return selection.bank(
                inputs[rows], learned, patients, is_held_out, seed=seed, groups=task.groups, units=units
            )

        banks = {
            name: bank(np.concatenate([features[split][backbone][name] for split in splits if split in features]))
            for name in offered
        }
        for head in heads:
            began = time.monotonic()
            if head in OF_TOKENS:
                assert tokens is not None
                lists = [tokens[split][backbone] for split in splits if split in tokens]
                readout, queries = TOKENS, tokens[labels.TEST][backbone]
                chosen = bank(functools.reduce(Tokens.followed_by, lists))
                prediction, width = HEADS[head](chosen, queries), queries.width
            else:
                tried = {name: HEADS[head](banks[name], queries) for name, queries in offered.items()}
                # Of equally good ones, or where nothing can be chosen, the first.
                readout = min(tried, key=lambda name: _or_highest(tried[name].selection_loss))
                chosen, prediction, width = banks[readout], tried[readout], offered[readout].shape[1]
            log.info(f"  {backbone}, {head}: {readout}, {time.monotonic() - began:.1f} s")
            of = backbone, head
            predicted.scores[of] = cases.mean(prediction.scores)
            predicted.decided[of] = predicted.scores[of] * prediction.decision
            held_out = finite(prediction.selection_loss), finite(prediction.selection_score)
            predicted.fits[of] = Fit(width, chosen.selection, *held_out, prediction.chosen), readout
    floor = MAJORITY, "none"
    predicted.scores[floor] = predicted.decided[floor] = probes.floor(learned, len(cases.targets))
    return study, predicted


def study_of(
    task: labels.Task, cases: Cases, learned: Shaped[np.ndarray, " m"], *, unit: str, draws: int, seed: int, data_sha256: str,
    labels: str = ALL_LABELS, protocol: str = "ours",
) -> Study:  # fmt: skip
    """What the rows of a task share.

    Args:
      learned: patients of the slices that heads learn from.
    """
    return Study(
        task=task.name, n=len(cases.targets), patients=len(np.unique(cases.patients)), unit=unit, classes=task.classes,
        classes_not_learned=task.unseen, draws=draws, seed=seed, train_n=len(learned),
        train_patients=len(np.unique(learned)), groups=task.groups, protocol=protocol, labels=labels,
        events=_events(task, cases.targets), data_sha256=data_sha256, near_duplicates=task.near_duplicates,
    )  # fmt: skip


def study_of_part(study: Study, cases: Cases, **changes: str) -> Study:
    """Of some of the test cases; `changes` are fields that say which."""
    events = None if study.events is None else _positive(cases.targets)
    patients = len(np.unique(cases.patients))
    return dataclasses.replace(study, n=len(cases.targets), patients=patients, events=events, **changes)


def measure(
    study: Study, cases: Cases, bootstrap: metrics.Bootstrap, predicted: Predictions, backbones: Sequence[str],
    heads: Sequence[str], of: Mapping[str, metrics.Metric],
) -> list[Score]:  # fmt: skip
    """The metrics `of` every backbone and head, of the first backbone minus each other, and of the class frequencies."""
    results: list[Score] = []

    draws = draws_of(cases, bootstrap, predicted, of)
    compared = [(backbone, None) for backbone in backbones]
    compared += [(backbones[0], other) for other in backbones[1:] if backbones[0] not in FLOORS]
    for backbone, other in compared:
        for head in heads:
            against = None if other is None else (other, head)
            results += _measure(study, cases, bootstrap, predicted, (backbone, head), against, of, draws)
    return results + _measure(study, cases, bootstrap, predicted, (MAJORITY, "none"), None, of, draws)


def draws_of(
    cases: Cases, bootstrap: metrics.Bootstrap, predicted: Predictions, of: Mapping[str, metrics.Metric]
) -> Callable[[str, tuple[str, str]], Float[np.ndarray, " draws_and_one"]]:
    """From a metric and a backbone and head to the metric in every draw; computed once for the value and the differences."""

    @functools.cache
    def draws(name: str, of_head: tuple[str, str]) -> Float[np.ndarray, " draws_and_one"]:
        # Balanced accuracy is that of the decisions that balance recalls, accuracy that of the likeliest class.
        by_head = predicted.decided if of[name] is metrics.balanced_accuracy else predicted.scores
        return bootstrap.values(of[name], cases.targets, by_head[of_head])

    return draws


def measure_groups(
    study: Study, cases: Cases, predicted: Predictions, groups: Mapping[str, Shaped[np.ndarray, " slices"]],
    of: Mapping[str, metrics.Metric],
) -> list[Score]:  # fmt: skip
    """The metrics `of` every head in every group of test cases; a series belongs to the group of its first slice.

    Args:
      study, cases: of all test cases.
      groups: by the name of a column, the group of each test slice.
    """
    first = np.unique(cases.case, return_index=True)[1]
    bootstrap = metrics.Bootstrap.over(cases.patients, draws=study.draws, seed=study.seed)
    results: list[Score] = []
    for column, by_slice in groups.items():
        by_case = by_slice[first]
        for name in subgroups.in_order(by_case):
            inside = by_case == name
            own = cases.restricted(inside)
            of_group = study_of_part(study, own, subgroup=f"{column}={name}")
            shown = predicted.restricted(inside)
            draws = draws_of(own, bootstrap.restricted(inside), shown, of)
            for head in shown.scores:
                results += _measure(of_group, own, bootstrap.restricted(inside), shown, head, None, of, draws)
    return results


def _positive(targets: Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times) -> int:
    """Cases of the second class, or with an event."""
    return int(targets.event.sum() if isinstance(targets, Times) else np.sum(targets == 1))


def _events(task: labels.Task, targets: Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times) -> int | None:
    """Cases of the positive one of two classes, or with an event."""
    return _positive(targets) if isinstance(targets, Times) or len(task.classes) == 2 else None


def metrics_of(cases: Cases, classes: Sequence[str]) -> Mapping[str, metrics.Metric]:
    """The metrics of classes, values or times, by name."""
    if isinstance(cases.targets, Times):
        return metrics.TIME_METRICS
    return metrics.METRICS if classes else metrics.VALUE_METRICS


def _measure(
    study: Study, cases: Cases, bootstrap: metrics.Bootstrap, predicted: Predictions, of: tuple[str, str],
    against: tuple[str, str] | None, metrics_of: Mapping[str, metrics.Metric],
    draws: Callable[[str, tuple[str, str]], Float[np.ndarray, " draws_and_one"]],
) -> list[Score]:  # fmt: skip
    """Every metric of a head, or its difference to the same head on another backbone."""
    fit, readout = predicted.fits.get(of, (None, None))
    scores = []
    for name, metric in metrics_of.items():
        found = bootstrap.interval(cases.targets, draws(name, of), None if against is None else draws(name, against))
        value, low, high = map(finite, (found.value, found.low, found.high))
        p = None
        if against is not None and low is not None:
            p = found.p
            if metric is metrics.auroc and _independent(cases) and study.classes and predicted.scores[of].shape[1] == 2:
                p = _delong(cases, predicted.scores[of], predicted.scores[against], p)
        scores.append(
            Score(
                study, of[0], of[1], name, value, low, high, found.degenerate, found.partial,
                None if against is None else against[0], readout, None if against else fit, p=p, doubt=found.doubt,
            )
        )  # fmt: skip
    return scores


def _independent(cases: Cases) -> bool:
    """Whether no patient has two cases."""
    return len(np.unique(cases.patients)) == len(cases.patients)


def _delong(
    cases: Cases, scores: Float[np.ndarray, "n 2"], against: Float[np.ndarray, "n 2"], otherwise: float
) -> float:
    """DeLong's p-value of two classes; `otherwise` where a class has fewer than two cases or is not one of the two."""
    assert not isinstance(cases.targets, Times)
    positive = cases.targets == 1
    if cases.targets.max() > 1 or min(positive.sum(), (~positive).sum()) < 2:
        return otherwise
    return statistics.delong(positive, scores[:, 1] - scores[:, 0], against[:, 1] - against[:, 0]).p


def table(
    task: labels.Task, backbone: str, head: str, amount: str, seed: int, cases: Cases, predicted: Predictions
) -> pa.Table:
    """The predictions of a head; see `score`.

    Args:
      amount: of labels, as rows say it.
    """
    count, scores = len(cases.targets), predicted.scores[backbone, head]
    if isinstance(cases.targets, Times) or task.is_value:
        likeliest = decided = scores[:, 0].astype(str)
        target = _times(cases.targets) if isinstance(cases.targets, Times) else cases.targets.astype(str)
    else:
        names = np.array(task.classes + task.unseen)
        decided = names[predicted.decided[backbone, head].argmax(axis=1)]
        target, likeliest = names[cases.targets], names[scores.argmax(axis=1)]
    return pa.table(
        {
            "task": [task.name] * count,
            "backbone": [backbone] * count,
            "head": [head] * count,
            "labels": [amount] * count,
            "seed": [seed] * count,
            "series": cases.series,
            "slice": cases.slices,
            "patient": cases.patients,
            "target": target,
            "predicted": likeliest,
            "decided": decided,
            "scores": list(scores),
        }
    )


def _times(times: Times) -> list[str]:
    """As survival tables write them: "12.5", and "12.5+" where follow-up ended without the event."""
    return [f"{time}{'' if event else '+'}" for time, event in zip(times.time.tolist(), times.event, strict=True)]


def _or_highest(loss: float) -> float:
    """An undefined loss is worse than any."""
    return loss if math.isfinite(loss) else math.inf


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
