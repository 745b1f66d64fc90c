"""The Cox head on real survival tables, beside lifelines on the same split: the table of docs/results.md.

  python benchmarks/cox.py

Tables: those that lifelines ships with several covariates and more than 50 events. 30 % of the rows, each a patient of its own, are the test split.
Our head chooses its penalty by cross-validation on the others; lifelines' CoxPHFitter gets the same features and the same penalty. C is
Harrell's, the interval a bootstrap over the test patients. Exit code 1 where the two fits give another C, or log risks that differ by more
than 1e-6. Needs lifelines: pip install 'curia-jax[test]'.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from curia_common.errors import DataError
from curia_jax.evaluate import metrics, probes, selection
from curia_jax.evaluate.targets import Times

if TYPE_CHECKING:
    import pandas as pd

TEST_SHARE = 0.3
TOLERANCE = 1e-6


class Table(NamedTuple):
    """A survival table of lifelines.

    Attributes:
      name: of its loader, `lifelines.datasets.load_NAME`.
      about: whose time to what.
      time, event: columns; an event is 1, a censored time 0.
      patients, events: that the table is published with.
      unused: columns that are no covariates.
    """

    name: str
    about: str
    time: str
    event: str
    patients: int
    events: int
    unused: tuple[str, ...] = ()


TABLES = (
    Table("rossi", "released convicts, arrest", "week", "arrest", 432, 114),
    Table("gbsg2", "breast cancer, recurrence", "time", "cens", 686, 299),
    Table("lung", "lung cancer, death", "time", "status", 228, 165, unused=("inst",)),
    Table("larynx", "larynx cancer, death", "time", "death", 90, 50),
    Table("kidney_transplant", "kidney transplant, death", "time", "death", 863, 140),
)


class Study(NamedTuple):
    """Training and test cases; features of the training cases have mean 0 and deviation 1."""

    features: Float[np.ndarray, "n d"]
    times: Times
    test_features: Float[np.ndarray, "m d"]
    test_times: Times


class Comparison(NamedTuple):
    """What one table gave.

    Attributes:
      c: Harrell's C of our head, with its interval.
      lifelines_c: of lifelines, by its own function.
      penalty: that our head chose, per case.
      difference: largest one of two log risks of a test case, each relative to their mean.
    """

    study: Study
    c: metrics.Estimate
    lifelines_c: float
    penalty: float
    difference: float

    @property
    def agrees(self) -> bool:
        return abs(self.c.value - self.lifelines_c) < TOLERANCE and self.difference < TOLERANCE


def study_of(table: Table, frame: "pd.DataFrame", seed: int = 0) -> Study:
    """Splits the rows of a table at random. Words become a column for each value but the first, missing numbers the mean of
    the training split.

    Raises:
      DataError: the table has not the patients and events that it is published with.
    """
    import pandas as pd

    found = len(frame), int(frame[table.event].sum())
    if found != (table.patients, table.events):
        raise DataError(
            f"{table.name} has {found[0]} patients and {found[1]} events; published are {table.patients} and {table.events}"
        )
    columns = pd.get_dummies(frame.drop(columns=[table.time, table.event, *table.unused]), drop_first=True)
    x = columns.to_numpy(np.float64)
    times = Times(frame[table.time].to_numpy(np.float64), frame[table.event].to_numpy() == 1)
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [round(TEST_SHARE * len(x))])
    mean = np.nanmean(x[train], axis=0)
    x = np.where(np.isnan(x), mean, x)
    deviation = x[train].std(axis=0)
    x = (x - mean) / deviation
    return Study(x[train], times[train], x[test], times[test])


def compare(study: Study, draws: int = 2000) -> Comparison:
    """Our head and lifelines on one study."""
    ours = probes.cox(
        selection.bank(study.features, study.times, np.arange(len(study.times)), np.zeros(len(study.times), bool)),
        study.test_features,
    )
    penalty = float(ours.chosen["penalty_per_case"])
    theirs, theirs_c = lifelines_risks(study, penalty)
    patients = np.arange(len(study.test_times))
    c = metrics.Bootstrap.over(patients, draws=draws).estimate(metrics.concordance, study.test_times, ours.scores)
    risks = ours.scores[:, 0]
    difference = np.abs((risks - risks.mean()) - (theirs - theirs.mean())).max()
    return Comparison(study, c, theirs_c, penalty, float(difference))


def lifelines_risks(study: Study, penalty: float) -> tuple[Float[np.ndarray, " m"], float]:
    """Log risks of the test cases by CoxPHFitter, and their C.

    Args:
      penalty: for features of deviation 1, per case. lifelines penalises coefficients of features whose sample deviation is 1.
    """
    import pandas as pd
    from lifelines import CoxPHFitter
    from lifelines.utils import concordance_index

    cases = len(study.times)
    frame = pd.DataFrame(study.features).assign(time=study.times.time, event=study.times.event)
    fitter = CoxPHFitter(penalizer=penalty * (cases - 1) / cases)
    fitter.fit(frame, "time", "event", fit_options={"precision": 1e-12})
    risks = study.test_features @ fitter.params_.to_numpy()
    # It takes predicted times: a higher risk is a shorter one.
    return risks, float(concordance_index(study.test_times.time, -risks, study.test_times.event))


def markdown(compared: Sequence[tuple[Table, Comparison]]) -> str:
    """The table of docs/results.md."""
    lines = [
        "| table | patients, events of training | of the test | covariates | penalty | C of the Cox head | C of lifelines | largest difference of log risks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for table, found in compared:
        study, c = found.study, found.c
        counts = [f"{len(times)}, {times.event.sum()}" for times in (study.times, study.test_times)]
        lines.append(
            f"| {table.name}: {table.about} | {counts[0]} | {counts[1]} | {study.features.shape[1]} | {found.penalty:.3g} "
            f"| {c.value:.3f} [{c.low:.3f}, {c.high:.3f}]{'?' if c.doubt else ''} | {found.lifelines_c:.3f} | {found.difference:.1e} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    from lifelines import datasets

    load: dict[str, Callable[[], pd.DataFrame]] = {one.name: getattr(datasets, f"load_{one.name}") for one in TABLES}
    compared = [(table, compare(study_of(table, load[table.name]()))) for table in TABLES]
    print(markdown(compared))
    different = [table.name for table, found in compared if not found.agrees]
    if different:
        print(f"our head and lifelines differ on: {', '.join(different)}", file=sys.stderr)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
