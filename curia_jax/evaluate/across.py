"""Scores across a column of the data: heads learn from the cases of one value of it and are scored on those of each.

The column may be the modality, the scanner or the site. Features, settings and thresholds of a head are chosen on the validation
cases of the value that it learns from. A figure across values is compared with two others of the same backbone and head: that of a
head that learned from the value that is tested, on the same cases; and that of the same head, on cases of the value that it learned from.

All intervals come from one bootstrap over the patients of the test split: draws are paired where a patient has cases of two
values, and independent otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Shaped

from curia_common import logs
from curia_common.errors import UserError
from curia_jax.evaluate import labels, metrics, scoring, subgroups
from curia_jax.evaluate.results import TESTED_ON, TRAINED_ON, Score, Study
from curia_jax.evaluate.scoring import Cases, Features, Predictions, TokenLists

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What heads learn from and are scored on.

    Attributes:
      task: labelled slices.
      features, tokens: of each of them; see `scoring.score`.
      sides: split -> the value of the column of each.
    """

    task: labels.Task
    features: Features
    tokens: TokenLists | None
    sides: Mapping[str, Shaped[np.ndarray, " _n"]]

    def restricted(self, inside: Mapping[str, Bool[np.ndarray, " _n"]]) -> "Inputs":
        """Some of the slices of each split."""
        task = dataclasses.replace(
            self.task, splits={split: part.restricted(inside[split]) for split, part in self.task.splits.items()}
        )
        features = {
            split: {
                backbone: {name: values[inside[split]] for name, values in by_readout.items()}
                for backbone, by_readout in by_backbone.items()
            }
            for split, by_backbone in self.features.items()
        }
        tokens = self.tokens and {
            split: {backbone: lists[inside[split]] for backbone, lists in by_backbone.items()}
            for split, by_backbone in self.tokens.items()
        }
        return Inputs(
            task, features, tokens, {split: values[inside[split]] for split, values in self.sides.items()}
        )  # fmt: skip

    def of(self, side: str, *, test: bool = False) -> "Inputs":
        """The slices of one value of the column to learn from, and all test slices; with `test` those of the value alone."""
        whole = () if test else (labels.TEST,)
        return self.restricted({split: (of == side) | (split in whole) for split, of in self.sides.items()})


def score(
    inputs: Inputs, column: str, *, heads: Sequence[str], unit: str, draws: int, seed: int, few: Sequence[int | float],
    data_sha256: str, readouts: Sequence[str],
) -> tuple[list[Score], pa.Table]:  # fmt: skip
    """Scores of heads that learned from each value of the column, on the test cases of each; see `scoring.score`.

    Only what is comparable is scored, see `comparable`.

    Returns:
      Scores: for each value that heads learned from and each that is tested, those of `scoring.measure`; then the differences
      across values. And the table of `scoring.score` with the columns trained_on and tested_on.

    Raises:
      UserError: fewer than two values or classes are left, or a probe cannot be fitted.
    """
    heads = scoring.learners(inputs.task, heads)
    inputs, sides = comparable(inputs, column)
    task, cases = inputs.task, Cases.of(inputs.task, unit)
    first = np.unique(cases.case, return_index=True)[1]
    side_of_case = inputs.sides[labels.TEST][first]
    results: list[Score] = []
    tables: list[pa.Table] = []
    for amount, own in scoring.repeats(few, seed):
        bootstrap = metrics.Bootstrap.over(cases.patients, draws=draws, seed=own)
        found: dict[tuple[str, str], _Measured] = {}
        for trained in sides:
            log.info(f"  learning from {column} {trained}")
            part = inputs.of(trained)
            study, predicted = scoring.learn(
                part.task, part.features, cases, heads=heads, unit=unit, draws=draws, seed=own, amount=amount,
                data_sha256=data_sha256, readouts=readouts, tokens=part.tokens,
            )  # fmt: skip
            for tested in sides:
                inside = side_of_case == tested
                shown = cases.restricted(inside)
                of_direction = scoring.study_of_part(study, shown, across=column, trained_on=trained, tested_on=tested)
                found[trained, tested] = _Measured(
                    of_direction, shown, bootstrap.restricted(inside), predicted.restricted(inside)
                )
            for backbone, head in predicted.fits:
                made = scoring.table(task, backbone, head, study.labels, own, cases, predicted)
                made = made.append_column("trained_on", pa.array([trained] * len(side_of_case)))
                tables.append(made.append_column("tested_on", pa.array(side_of_case.tolist())))
        backbones = list(inputs.features[labels.TEST])
        for one in found.values():
            results += scoring.measure(
                one.study, one.cases, one.bootstrap, one.predicted, backbones, heads, one.by_name
            )
        for (trained, tested), one in found.items():
            if trained != tested:
                results += _differences(one, found[tested, tested], f"{TRAINED_ON}{tested}")
                results += _differences(one, found[trained, trained], f"{TESTED_ON}{trained}")
    return results, pa.concat_tables(tables)


def comparable(inputs: Inputs, column: str) -> tuple[Inputs, list[str]]:
    """The slices that can be scored across the column, and its values, in order.

    Values that nothing can be learned from or tested on are left out, and classes that the training or validation cases of one of the others
    lack; which ones is logged.

    Raises:
      UserError: fewer than two values or classes are left.
    """
    task, every = inputs.task, np.concatenate(list(inputs.sides.values()))
    sides, obstacles = [], []
    for side in subgroups.in_order(every):
        reason = "no value" if side == subgroups.UNKNOWN else labels.obstacle_of(inputs.of(side, test=True).task)
        if reason:
            obstacles.append(f"{side} ({reason})")
        else:
            sides.append(side)
    if len(sides) < 2:
        raise UserError(
            f"{task.name} cannot be scored across {column}, which takes two values with cases to learn from and to test on; "
            f"found: {', '.join([*sides, *obstacles]) or 'none'}"
        )
    if obstacles:
        log.warning(f"{task.name} across {column}: left out are {', '.join(obstacles)}")
    inside = {split: np.isin(of, sides) for split, of in inputs.sides.items()}
    if not task.classes:
        return inputs.restricted(inside), sides
    learned = [
        {name for split in (labels.FIT, labels.HELD_OUT) for name in inputs.of(side).task.splits[split].names.tolist()}
        for side in sides
    ]
    classes = tuple(name for name in task.classes if all(name in names for names in learned))
    if len(classes) < 2:
        raise UserError(
            f"{task.name} cannot be scored across {column}: {' and '.join(sides)} share {len(classes)} classes to learn; 2 are needed"
        )
    if dropped := [name for name in (*task.classes, *task.unseen) if name not in classes]:
        log.warning(
            f"{task.name} across {column}: {len(classes)} classes are shared; left out are {', '.join(dropped)}"
        )
    inside = {split: inside[split] & np.isin(part.names, classes) for split, part in task.splits.items()}
    found = inputs.restricted(inside)
    found = dataclasses.replace(found, task=dataclasses.replace(found.task, classes=classes, unseen=()))
    for side in sides:
        if reason := labels.obstacle_of(found.of(side, test=True).task):
            raise UserError(f"{task.name} cannot be scored across {column}: of {side}, {reason}")
    return found, sides


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Predictions of heads that learned from one value of the column, for the test cases of one."""

    study: Study
    cases: Cases
    bootstrap: metrics.Bootstrap
    predicted: Predictions

    @property
    def by_name(self) -> Mapping[str, metrics.Metric]:
        return scoring.metrics_of(self.cases, self.study.classes)

    @property
    def draws(self) -> Callable[[str, tuple[str, str]], Float[np.ndarray, " draws_and_one"]]:
        return scoring.draws_of(self.cases, self.bootstrap, self.predicted, self.by_name)


def _differences(one: _Measured, other: _Measured, against: str) -> list[Score]:
    """Every metric of every backbone and head minus that of the other, whose draws are of the same patients."""
    results, draws, other_draws = [], one.draws, other.draws
    for of, (_, readout) in one.predicted.fits.items():
        for name in one.by_name:
            found = one.bootstrap.interval(one.cases.targets, draws(name, of), other_draws(name, of))
            alone = other.bootstrap.interval(other.cases.targets, other_draws(name, of))
            value, low, high = map(scoring.finite, (found.value, found.low, found.high))
            results.append(
                Score(
                    one.study, *of, name, value, low, high, found.degenerate, found.partial, against, readout,
                    p=scoring.finite(found.p), doubt=found.doubt or alone.doubt,
                )
            )  # fmt: skip
    return results
