"""Series of exams and of shards behind one interface."""

import pytest

from curia_common.errors import UserError
from curia_jax.predict import inputs
from data_pipeline import workers
from data_pipeline.format.shards import SliceSource
from data_pipeline.stages import exams
from tests.predict.conftest import KEY, inline


@pytest.fixture
def of_exams(study, tmp_path, monkeypatch) -> inputs.Exams:
    monkeypatch.setattr(workers, "run", inline)
    return inputs.Exams([str(study)], exams.Options(tmp_path, KEY.encode()), [])


def test_shards_and_exams_have_the_same_series(of_exams, dataset) -> None:
    of_shards = inputs.Shards(str(dataset))
    assert set(of_shards.series.values()) == set(of_exams.series.values()) and len(of_shards.series) == 8
    assert set(of_exams.files.values()) == {None} and of_shards.files == {}


def test_series_that_are_done_are_not_read(of_exams, dataset) -> None:
    for given in (of_exams, inputs.Shards(str(dataset))):
        done = sorted(given.series)[:5]
        read = {}
        for part in given.read(done):
            read |= part.series
            assert part.slices is not None
            assert set(part.series.values()) <= set(part.slices.index["series"].to_pylist())
        assert read == {identity: series for identity, series in given.series.items() if identity not in done}


def test_paths_and_outcomes_come_with_the_exams(of_exams, study) -> None:
    (part, *_) = of_exams.read(sorted(of_exams.series)[1:])
    assert all(path.startswith(str(study)) for path in part.paths.values()) and set(part.paths) == set(
        part.series.values()
    )
    assert {one.fate for one in part.files.values()} == {"kept"} and len(part.files) == 5


def test_identities_of_shards_change_with_the_dataset(dataset) -> None:
    digest = SliceSource(dataset, "test+train").fingerprint[:16]
    assert all(identity.startswith(f"{digest}/") for identity in inputs.Shards(str(dataset)).series)


def test_folder_without_shards_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no shards in"):
        inputs.Shards(str(tmp_path))
