"""The Cox head beside lifelines on a real survival table."""

import numpy as np
import pytest

from benchmarks import cox
from curia_common.errors import DataError

pandas = pytest.importorskip("pandas", reason="pandas is not installed; it comes with lifelines")
LARYNX = next(table for table in cox.TABLES if table.name == "larynx")


@pytest.fixture(scope="module")
def larynx():
    datasets = pytest.importorskip("lifelines.datasets", reason="lifelines is not installed")
    return cox.study_of(LARYNX, datasets.load_larynx())


def test_cox_head_equals_lifelines_on_larynx(larynx) -> None:
    found = cox.compare(larynx, draws=200)
    assert found.agrees
    assert (len(larynx.times), len(larynx.test_times)) == (63, 27)
    assert 0 <= found.c.low < found.c.value < found.c.high <= 1
    assert "| larynx: larynx cancer, death | 63, 34 | 27, 16 | 4 |" in cox.markdown([(LARYNX, found)])


def test_another_penalty_is_no_agreement(larynx, monkeypatch) -> None:
    fit = cox.lifelines_risks
    monkeypatch.setattr(cox, "lifelines_risks", lambda study, penalty: fit(study, 1.01 * penalty))
    assert not cox.compare(larynx, draws=20).agrees


def a_frame(rows: int = 40):
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "time": rng.integers(1, 90, rows),
            "event": 1,
            "age": rng.normal(60, 9, rows),
            "kind": ["a", "b"] * (rows // 2),
        }
    )
    frame.loc[:9, "age"] = np.nan
    return frame


def test_covariates_are_standardised_by_training_cases() -> None:
    study = cox.study_of(cox.Table("own", "", "time", "event", 40, 40), a_frame())
    assert study.features.shape == (28, 2) and study.test_features.shape == (12, 2)
    np.testing.assert_allclose(study.features.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(study.features.std(axis=0), 1, atol=1e-12)
    # A missing age is the mean age; the kind has two values.
    assert (study.features[:, 0] == 0).sum() + (study.test_features[:, 0] == 0).sum() == 10
    assert len(np.unique(np.round(np.concatenate([study.features[:, 1], study.test_features[:, 1]]), 9))) == 2


def test_table_with_other_counts_is_refused() -> None:
    with pytest.raises(DataError, match="own has 40 patients and 40 events; published are 40 and 39"):
        cox.study_of(cox.Table("own", "", "time", "event", 40, 39), a_frame())
