"""Exams read without a dataset: the slices, facts and outcomes of a build."""

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.format import shards
from data_pipeline.format.shards import SliceSource
from data_pipeline.stages import exams

KEY = b"a key that everybody may know"  # of the tests' builds
SPLITS = "train+validation+test"


@pytest.fixture
def options(tmp_path, inline_workers) -> exams.Options:
    folder = tmp_path / "work"
    folder.mkdir()
    return exams.Options(folder, KEY)


def slices_of(source: SliceSource) -> dict[tuple[str, int], tuple]:
    """By series and number within it: pixels, slope, intercept, percentiles, units, patient."""
    rows = source.index.to_pylist()
    found = {}
    for number, row in enumerate(rows):
        one = source[number]
        found[row["series"], row["index"]] = (one.pixels.tolist(), *one.facts, one.patient)
    return found


def read_all(
    found: exams.Found, options: exams.Options
) -> tuple[dict[tuple[str, int], tuple], dict[str, exams.FileOutcome]]:
    slices, outcomes = {}, {}
    for group in exams.read(found.exams, options):
        outcomes |= group.files
        slices |= slices_of(group.slices) if group.slices else {}
    return slices, outcomes


def test_exams_have_the_slices_of_a_build(study: Path, dataset: Path, options) -> None:
    found = exams.find([str(study / "dicom")], options)
    slices, outcomes = read_all(found, options)
    assert slices == slices_of(SliceSource(dataset, SPLITS))
    manifest = {row["path"]: row["fate"] for row in pq.read_table(dataset / shards.MANIFEST).to_pylist()}
    fates = {path: one or outcomes[path] for path, one in found.files.items()}
    assert {path: one.fate for path, one in fates.items()} == manifest
    assert {exam.series for exam in found.exams} == {series for series, _ in slices}
    assert list(options.folder.glob("group-*")) == []


def test_only_exams_that_are_asked_for_are_read(study: Path, options) -> None:
    found = exams.find([str(study / "dicom")], options)
    chosen = found.exams[3:5]
    slices, outcomes = read_all(exams.Found(chosen, found.files), options)
    assert {series for series, _ in slices} == {exam.series for exam in chosen}
    assert set(outcomes) == {file.path for exam in chosen for part in exam.parts for file in part.files}


def test_slices_of_a_group_are_removed_when_the_next_is_asked_for(study: Path, options) -> None:
    found = exams.find([str(study / "dicom")], options)
    groups = exams.read(found.exams, options)
    first = next(groups)
    assert first.slices is not None
    folder = first.slices.folder
    assert folder.is_dir() and (folder.stat().st_mode & 0o777) == 0o700
    second = next(groups)
    assert not folder.exists()
    assert not {exam.series for exam in first.exams} & {exam.series for exam in second.exams}


def test_files_that_no_exam_has_keep_their_reason(tmp_path, write_dicom, options) -> None:
    write_dicom(tmp_path / "in/a.dcm")
    (tmp_path / "in/notes.txt").write_text("nothing")
    (tmp_path / "in/broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    found = exams.find([str(tmp_path / "in")], options)
    _, outcomes = read_all(found, options)
    fates = {Path(path).name: one or outcomes[path] for path, one in found.files.items()}
    assert fates["notes.txt"].fate == "excluded" and "not a medical image" in fates["notes.txt"].reason
    assert fates["broken.nii.gz"].fate == "quarantined"
    assert fates["a.dcm"].fate == "kept"


def test_identity_of_an_exam_changes_with_its_files(tmp_path, write_dicom, options) -> None:
    for number in range(3):
        write_dicom(tmp_path / f"in/{number}.dcm", ImagePositionPatient=[0, 0, number])
    (before,) = exams.find([str(tmp_path / "in")], options).exams
    (again,) = exams.find([str(tmp_path / "in")], options).exams
    assert before == again and before.path == str(tmp_path / "in")
    write_dicom(tmp_path / "in/3.dcm", ImagePositionPatient=[0, 0, 3])
    (after,) = exams.find([str(tmp_path / "in")], options).exams
    assert after.identity != before.identity and after.series == before.series


def test_archives_and_orientations_of_one_series_are_one_exam(tmp_path, write_dicom, options) -> None:
    axial, coronal = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]
    with zipfile.ZipFile(tmp_path / "exams.zip", "w") as archive:
        for plane, place in itertools.product((axial, coronal), range(6)):
            position = [0, 0, place] if plane == axial else [0, place, 0]
            path = tmp_path / f"{plane == axial}{place}.dcm"
            pixels = np.random.default_rng(place + 10 * (plane == axial)).integers(0, 1900, (40, 44))
            write_dicom(path, pixels, ImageOrientationPatient=plane, ImagePositionPatient=position)
            archive.write(path, f"study/{path.name}")
    found = exams.find([str(tmp_path / "exams.zip")], options)
    (exam,) = found.exams
    assert len(exam.parts) == 2 and exam.path == f"{tmp_path / 'exams.zip'}!/study"
    slices, _ = read_all(found, options)
    assert sorted(slices) == [(exam.series, index) for index in range(12)]
