"""The benchmark of intervals: simulated studies have the true values that their formulas say, and misses are counted."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import intervals
from benchmarks.intervals import Kind


@pytest.mark.parametrize(
    ("kind", "true"),
    [
        (Kind("auroc", 0.0, 0.2), 0.5),
        (Kind("auroc", 1.2, 0.2), scipy.stats.norm.cdf(1.2 / 2**0.5)),  # two normal distributions
        (Kind("accuracy", 1.2), scipy.stats.norm.cdf(0.6)),  # threshold half way
        (Kind("c_index", 0.0, 0.7), 0.5),
        (Kind("r2", 0.7), 0.49),
    ],
)
def test_studies_have_the_value_that_the_formula_says(kind: Kind, true: float) -> None:
    targets, scores = kind.draw(4000, np.random.default_rng(0))
    assert kind.function(targets, scores, np.ones((1, 4000)))[0] == pytest.approx(true, abs=0.03)


def test_times_are_censored_as_often_as_asked() -> None:
    targets, scores = Kind("c_index", 1.0, 0.7).draw(4000, np.random.default_rng(0))
    assert targets.event.mean() == pytest.approx(0.7, abs=0.03)
    # Proportional hazards with coefficient 1: the risk of two cases is ordered as the scores more often than not.
    assert 0.6 < Kind("c_index", 1.0).function(targets, scores, np.ones((1, 4000)))[0] < 0.8


def test_coverage_counts_misses_of_undoubted_intervals_alone(monkeypatch) -> None:
    found = intervals.coverage(Kind("accuracy", 1.2), 40, studies=100, draws=200)
    assert 0 < found.below + found.above < 0.15 and found.doubted == 0
    assert intervals.coverage(Kind("auroc", 1.2), 8, studies=20, draws=50).text == "all doubted"
    # Intervals of another quantity miss.
    intervals.true_value.cache_clear()
    monkeypatch.setattr(
        Kind, "function", property(lambda kind: lambda t, s, w: np.arange(len(w)) / len(w) + 2.0 * (len(t) > 100))
    )
    wrong = intervals.coverage(Kind("accuracy", 1.2), 40, studies=10, draws=50)
    intervals.true_value.cache_clear()
    assert (wrong.true, wrong.below, wrong.above) == (2.0, 1.0, 0.0)


def test_table_has_a_line_for_each_kind(capsys, monkeypatch) -> None:
    monkeypatch.setattr(intervals, "true_value", lambda kind: 0.5)
    assert intervals.main(["--patients=12", "--studies=5", "--draws=50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(intervals.KINDS) and lines[0] == "| metric | true value | 12 patients |"
