"""Exams that come later, and slices that come twice."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from curia_common.exit_codes import ExitCode
from data_pipeline.format import records, shards
from data_pipeline.sources import geometry
from data_pipeline.stages import assignment, commit, convert, pipeline
from tests.data_pipeline.packing import pack

SPLITS = ("--validation", 0.3, "--test", 0.2)


@pytest.fixture
def exams(tmp_path: Path, write_series) -> Path:
    """Ten patients with a series of five slices each."""
    for patient in range(10):
        write_patient(write_series, tmp_path / "exams" / f"p{patient}", patient)
    return tmp_path / "exams"


def write_patient(write_series, folder: Path, patient: int, count: int = 5, **fields: Any) -> list[Path]:
    named = {
        "PatientID": f"P{patient}",
        "SeriesInstanceUID": f"2.25.{patient + 1}00",
        "StudyInstanceUID": f"2.25.{patient + 1}",
    }
    return write_series(folder, count, **(named | fields))


def shard_state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.glob("*array_record*")
    }


def index_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / shards.INDEX).to_pylist()


def slices_of(folder: Path) -> dict[str, list[np.ndarray]]:
    splits = sorted(set(pq.read_table(folder / shards.SHARDS)["split"].to_pylist()))
    sources = {split: shards.SliceSource(folder, split) for split in splits}
    return {split: [source[n].pixels for n in range(len(source))] for split, source in sources.items()}


def check(folder: Path, run_verify) -> None:
    """Sound for verify, and the same to TFDS as to SliceSource."""
    result = run_verify(folder)
    assert result.code == 0, result.out
    builder = tfds.builder_from_directory(folder)
    for split, pixels in slices_of(folder).items():
        found = [one for record in builder.as_data_source(split=split) for one in record["slices"]]
        assert len(found) == len(pixels)
        for a, b in zip(found, pixels, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- adding


@pytest.mark.parametrize("again", [True, False])
def test_added_exams_become_further_shards(
    tmp_path: Path, exams: Path, run_build, run_verify, write_series, manifest, again: bool
) -> None:
    output = tmp_path / "out"
    assert run_build("--input", exams, "--output", output, *SPLITS).code == 0
    before, rows, slices = shard_state(output), index_of(output), slices_of(output)
    for patient in range(10, 16):
        write_patient(write_series, tmp_path / "later" / f"p{patient}", patient)
    inputs = (exams, tmp_path / "later") if again else (tmp_path / "later",)
    result = run_build("--input", *inputs, "--output", output, *SPLITS)
    assert result.code == 0, result.err
    assert "inventory: 30 files" in result.err and "80 slices of 16 series of 16 patients" in result.err
    after = shard_state(output)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    check(output, run_verify)
    # Slices keep their numbers: further ones come after them.
    for split, pixels in slices_of(output).items():
        for old, new in zip(slices.get(split, []), pixels, strict=False):
            np.testing.assert_array_equal(old, new)
    assert index_of(output)[: len(rows)] == rows
    card = json.loads((output / shards.CARD).read_text())
    assert (card["additions"], card["slices"], card["files"]["kept"]) == (2, 80, 80)
    assert sum(card["intensity"]["HU"]["pixels"]) == 80 * 40 * 44
    assert Counter(row["fate"] for row in manifest(output).values()) == {"kept": 80}
    # Numbers of each split follow one another.
    table = pq.read_table(output / shards.SHARDS).to_pylist()
    for split in {row["split"] for row in table}:
        names = [row["file"] for row in table if row["split"] == split]
        assert names == [shards.file_name("slices", split, n) for n in range(len(names))]


def test_patients_keep_their_split(tmp_path: Path, run_build, write_series) -> None:
    paths = [write_patient(write_series, tmp_path / "a" / f"p{n}", n) for n in range(3)]
    lines = [f"{path.relative_to(tmp_path)},{'test' if n == 1 else 'train'}" for n in range(3) for path in paths[n]]
    (tmp_path / "labels.csv").write_text("\n".join(["file,split", *lines]))
    output = tmp_path / "out"
    words = ("--output", output, "--validation", 0, "--test", 0)
    table = ("--labels", tmp_path / "labels.csv", "--split-column", "split")
    assert run_build("--input", tmp_path / "a", *words, *table).code == 0
    write_patient(write_series, tmp_path / "b", 1, SeriesInstanceUID="2.25.777")
    result = run_build("--input", tmp_path / "a", tmp_path / "b", *words)
    assert result.code == 0, result.err
    splits = {(row["patient"], row["split"]) for row in index_of(output)}
    assert len(splits) == 3 and Counter(row["split"] for row in index_of(output)) == {"train": 10, "test": 10}
    # And a table cannot move the patient.
    write_patient(write_series, tmp_path / "c", 1, SeriesInstanceUID="2.25.778")
    lines = [f"c/{n:03d}.dcm,train" for n in range(5)]
    (tmp_path / "more.csv").write_text("\n".join(["file,split", *lines]))
    more = ("--labels", tmp_path / "more.csv", "--split-column", "split")
    result = run_build("--input", tmp_path / "c", *words, *more)
    assert result.code == 2 and "puts a patient into train who is in test in the dataset already" in result.error
    # Nor say something else of a file of the dataset.
    (tmp_path / "labels.csv").write_text("\n".join(["file,grade", *(f"a/p0/{n:03d}.dcm,3" for n in range(5))]))
    grades = ("--labels", tmp_path / "labels.csv", "--label-columns", "grade")
    result = run_build("--input", tmp_path / "a", tmp_path / "c", *words, *grades)
    assert result.code == 2 and "another patient, split or label than before" in result.error


def test_known_instances_are_not_added_twice(tmp_path: Path, exams: Path, run_build, run_verify, manifest) -> None:
    output = tmp_path / "out"
    assert run_build("--input", exams, "--output", output, *SPLITS).code == 0
    before = shard_state(output)
    shutil.copytree(exams / "p3", tmp_path / "again" / "copy of p3")
    result = run_build("--input", tmp_path / "again", "--output", output, *SPLITS)
    assert result.code == 0, result.err
    assert shard_state(output) == before and len(index_of(output)) == 50
    rows = manifest(output)
    assert len(rows) == 55
    assert Counter((row["fate"], row["reason"]) for row in rows.values()) == {
        ("kept", ""): 50, ("duplicate", "the same instance is in the dataset already"): 5,
    }  # fmt: skip
    assert json.loads((output / shards.CARD).read_text())["additions"] == 2
    check(output, run_verify)


def test_added_slices_of_a_series_continue_its_numbers(
    tmp_path: Path, run_build, run_verify, write_series, manifest
) -> None:
    paths = write_patient(write_series, tmp_path / "in", 1, 9)
    waiting = [path.rename(tmp_path / path.name) for path in paths[5:]]
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    assert run_build(*words).code == 0
    for path in waiting:
        path.rename(tmp_path / "in" / path.name)
    assert run_build(*words).code == 0
    assert [row["index"] for row in index_of(tmp_path / "out")] == list(range(9))
    problems = Counter(row["problems"] for row in manifest(tmp_path / "out").values())
    assert problems == {"": 5, f"{geometry.FEW}; {assignment.CONTINUED}": 4}
    check(tmp_path / "out", run_verify)


def test_fixed_file_is_added_and_changed_file_is_rejected(tmp_path: Path, run_build, write_series, manifest) -> None:
    paths = write_patient(write_series, tmp_path / "in", 1, 6)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-500])
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    assert run_build(*words).code == 0
    assert manifest(tmp_path / "out")[str(paths[2])]["fate"] == "quarantined"
    paths[2].write_bytes(whole)
    assert run_build(*words).code == 0
    rows = manifest(tmp_path / "out")
    assert len(rows) == 6 and {row["fate"] for row in rows.values()} == {"kept"}
    os.utime(paths[0], ns=(1, 1))
    result = run_build(*words)
    assert result.code == ExitCode.DATA and "a file that is in the dataset already has changed since" in result.error
    assert "000.dcm" not in result.err


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_addition_resumes_and_leaves_dataset_readable(
    tmp_path: Path, exams: Path, start_build, run_build, run_verify, write_series, contents, number: int
) -> None:
    words = ("--output", tmp_path / "out", "--validation", 0, "--test", 0)
    assert run_build("--input", exams, *words).code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "straight")
    before, slices = shard_state(tmp_path / "out"), slices_of(tmp_path / "out")
    for patient in range(10, 18):
        write_patient(write_series, tmp_path / "later" / f"p{patient}", patient)
    words = ("--input", exams, tmp_path / "later", *words)
    running = start_build(*words, "--workers", 1, trouble={"*": 0.05})
    running.wait_for_shards(len(before) + 1)
    # In the middle of it.
    for split, pixels in slices_of(tmp_path / "out").items():
        np.testing.assert_array_equal(slices[split], pixels)
    assert len(shards.SliceSource(tmp_path / "out", "train").index) == 50
    assert sum(s.num_examples for s in tfds.builder_from_directory(tmp_path / "out").info.splits.values()) == 50
    running.stop(number)
    assert len(shard_state(tmp_path / "out")) > len(before)
    result = run_verify(tmp_path / "out")
    assert result.code == 0 and "an addition is not finished" in result.err
    result = run_build(*words)
    assert result.code == 0 and "shards are finished already" in result.err
    after = shard_state(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    check(tmp_path / "out", run_verify)
    # As if nothing had happened.
    straight = [tmp_path / "straight" if word == tmp_path / "out" else word for word in words]
    assert run_build(*straight).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.long
@pytest.mark.parametrize("where", ["index.parquet", "manifest.parquet", "card.json", "shards.parquet"])
def test_interrupted_commit_leaves_old_or_new_dataset(
    tmp_path: Path, exams: Path, run_build, run_verify, write_series, contents, monkeypatch, where: str
) -> None:
    words = ("--output", tmp_path / "out", "--validation", 0, "--test", 0)
    assert run_build("--input", exams, *words).code == 0
    slices = slices_of(tmp_path / "out")
    write_patient(write_series, tmp_path / "later", 20)
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out" / where:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(commit.os, "replace", fail)
        assert run_build("--input", tmp_path / "later", *words).code == ExitCode.RESTART
    np.testing.assert_array_equal(slices_of(tmp_path / "out")["train"], slices["train"])
    assert len(shards.SliceSource(tmp_path / "out", "train").index) == 50
    # Abandoned: the same inputs as before make it the dataset that it was.
    copy = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert run_build("--input", exams, "--output", copy, "--validation", 0, "--test", 0).code == 0
    check(copy, run_verify)
    assert len(index_of(copy)) == 50 and not (copy / ".build" / "addition-00001").exists()
    # Resumed.
    assert run_build("--input", tmp_path / "later", *words).code == 0
    check(tmp_path / "out", run_verify)
    assert len(index_of(tmp_path / "out")) == 55


def test_abandoned_addition_leaves_nothing(
    tmp_path: Path, exams: Path, run_build, run_verify, write_series, monkeypatch, manifest
) -> None:
    words = ("--output", tmp_path / "out", "--validation", 0, "--test", 0)
    assert run_build("--input", exams, *words).code == 0
    for patient in (20, 21):
        write_patient(write_series, tmp_path / f"later{patient}", patient)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "commit", lambda *unused: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run_build("--input", tmp_path / "later20", *words).code == ExitCode.RESTART
    assert run_build("--input", tmp_path / "later21", *words).code == 0
    check(tmp_path / "out", run_verify)
    assert not [path for path in manifest(tmp_path / "out") if "later20" in path]


def test_label_column_of_other_type_is_one_line(tmp_path: Path, run_build, write_series) -> None:
    for n, grade in ((1, "3"), (2, "high")):
        write_patient(write_series, tmp_path / f"{n}", n)
        (tmp_path / f"{n}.csv").write_text("\n".join(["file,grade", *(f"{n}/{k:03d}.dcm,{grade}" for k in range(5))]))
    words = ("--output", tmp_path / "out", "--validation", 0, "--test", 0)
    grades = ("--label-columns", "grade", "--labels")
    assert run_build("--input", tmp_path / "1", *words, *grades, tmp_path / "1.csv").code == 0
    before = shard_state(tmp_path / "out")
    result = run_build("--input", tmp_path / "2", *words, *grades, tmp_path / "2.csv")
    assert result.code == 2 and "a label column holds numbers in one addition and text in another" in result.error
    assert len(shards.SliceSource(tmp_path / "out", "train")) == 5
    # Without the labels the addition works.
    assert run_build("--input", tmp_path / "2", *words).code == 0
    assert [row["label_grade"] for row in index_of(tmp_path / "out")] == [3] * 5 + [None] * 5
    after = shard_state(tmp_path / "out")
    assert {name: after[name] for name in before} == before


# ---- hold-outs


def test_holdout_rejects_patient_of_the_dataset(tmp_path: Path, exams: Path, run_build) -> None:
    assert run_build("--input", exams, "--output", tmp_path / "out", *SPLITS).code == 0
    (tmp_path / "holdout.txt").write_text("P4\nP99\n")
    result = run_build("--input", exams, "--output", tmp_path / "out", *SPLITS, "--holdout", tmp_path / "holdout.txt")
    assert result.code == 2 and "1 held-out patients with 5 files are in" in result.error


def test_held_out_patient_stays_out_of_additions(
    tmp_path: Path, exams: Path, run_build, write_series, manifest
) -> None:
    (tmp_path / "holdout.txt").write_text("P4\n")
    words = ("--output", tmp_path / "out", *SPLITS)
    assert run_build("--input", exams, *words, "--holdout", tmp_path / "holdout.txt").code == 0
    write_patient(write_series, tmp_path / "later", 4, SeriesInstanceUID="2.25.99")
    assert run_build("--input", tmp_path / "later", *words).code == 0
    reasons = {row["reason"] for path, row in manifest(tmp_path / "out").items() if "later" in path or "/p4/" in path}
    assert reasons == {assignment.HELD_OUT}


def test_holdout_takes_archives_and_places_in_them(
    tmp_path: Path, exams: Path, run_build, run_verify, key_file: Path, manifest
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for name, patients in (("a.zip", (1, 2)), ("b.tar.gz", (3,)), ("c.tar", (4, 5))):
        paths = [path for n in patients for path in sorted((exams / f"p{n}").iterdir())]
        pack(packed / name, {f"in/{path.parent.name}/{path.name}": path.read_bytes() for path in paths})
    (tmp_path / "holdout.txt").write_text(
        f"{packed / 'a.zip'}!/in/p2\n{packed / 'b.tar.gz'}\n{packed / 'c.tar'}!/in/p5/000.dcm\n{packed / 'a.zip'}!/in/p\n"
    )
    more = ("--holdout", tmp_path / "holdout.txt")
    result = run_build("--input", packed, "--output", tmp_path / "out", *SPLITS, *more)
    assert result.code == 0, result.err
    assert "held out: 3 of 4 lines name a patient" in result.err and "nothing matches line 4 of" in result.err
    rows = manifest(tmp_path / "out")
    assert {path.split("/")[-2] for path, row in rows.items() if row["fate"] == "kept"} == {"p1", "p4"}
    (tmp_path / "holdout.txt").write_text("\n".join((tmp_path / "holdout.txt").read_text().splitlines()[:3]))
    more = (*more, "--key-file", key_file)
    assert run_verify(tmp_path / "out", *more).code == 0
    (tmp_path / "holdout.txt").write_text(f"{packed / 'b.tar.gz'}\n{packed / 'c.tar'}!/in/p4\n")
    result = run_verify(tmp_path / "out", *more)
    assert result.code == ExitCode.DATA and "slices are of 1 patients of" in result.out


# ---- instances by UID and by pixels


def ct_images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(7).integers(0, 1900, (count, 40, 44)))


def pixels_by_position(folder: Path) -> dict[float, np.ndarray]:
    return {
        row["position"]: one for row, one in zip(index_of(folder), slices_of(folder)["train"], strict=True)
    }  # fmt: skip


def write_constant_uid(write_series, folder: Path, images: list[np.ndarray], **fields: Any) -> None:
    """A series as careless anonymisers leave it: each slice has the same SOPInstanceUID."""
    for n, one in enumerate(images):
        place = {"positions": [2.0 * n], "ImagePositionPatient": [0, 0, 2.0 * n]}
        write_series(folder / str(n), pixels=one, **(place | {"SOPInstanceUID": "2.25.9"} | fields))


ALL_TRAIN = ("--validation", 0, "--test", 0)


def test_constant_instance_uid_keeps_all_slices_in_order(
    tmp_path: Path, run_build, run_verify, write_series, manifest
) -> None:
    images = ct_images(6)
    write_constant_uid(write_series, tmp_path / "in", images)
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out", *ALL_TRAIN).code == 0
    check(tmp_path / "out", run_verify)
    found = pixels_by_position(tmp_path / "out")
    assert list(found) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    for one, wanted in zip(found.values(), images, strict=True):
        np.testing.assert_array_equal(one, wanted)
    assert [(row["index"], row["flags"]) for row in index_of(tmp_path / "out")] == [(n, 0) for n in range(6)]
    assert Counter((row["fate"], row["problems"]) for row in manifest(tmp_path / "out").values()) == {
        ("kept", commit.REUSED_UID): 6
    }


@pytest.mark.parametrize("place", [{"ImagePositionPatient": [0, 0, 3]}, {"ImagePositionPatient": None}])
def test_constant_instance_uid_without_positions_keeps_all_slices(
    tmp_path: Path, run_build, run_verify, write_series, manifest, place: dict
) -> None:
    images = ct_images(6)
    write_constant_uid(write_series, tmp_path / "in", images, **place)
    words = ("--output", tmp_path / "out", "--planes", "coronal", *ALL_TRAIN)
    assert run_build("--input", tmp_path / "in", *words).code == 0
    check(tmp_path / "out", run_verify)
    found = {one.tobytes() for one in slices_of(tmp_path / "out")["train"]}
    assert found == {one.astype(np.uint16).tobytes() for one in images}
    assert [row["index"] for row in index_of(tmp_path / "out")] == list(range(6))
    assert {row["flags"] for row in index_of(tmp_path / "out")} == {records.IRREGULAR}
    for row in manifest(tmp_path / "out").values():
        assert {geometry.REPEATED_POSITION, commit.REUSED_UID} <= set(row["problems"].split("; "))


@pytest.mark.parametrize("later", [False, True])
def test_two_patients_with_the_same_instance_uids_are_both_kept(
    tmp_path: Path, run_build, run_verify, write_series, manifest, later: bool
) -> None:
    for patient, images in enumerate((ct_images(10)[:5], ct_images(10)[5:])):
        for n, one in enumerate(images):
            write_patient(
                write_series, tmp_path / f"p{patient}" / str(n), patient, pixels=one, SOPInstanceUID=f"2.25.9{n}",
                positions=[2.0 * n], ImagePositionPatient=[0, 0, 2.0 * n],
            )  # fmt: skip
    words = ("--output", tmp_path / "out", *ALL_TRAIN)
    if later:
        assert run_build("--input", tmp_path / "p0", *words).code == 0
        assert run_build("--input", tmp_path / "p1", *words).code == 0
    else:
        assert run_build("--input", tmp_path / "p0", tmp_path / "p1", *words).code == 0
    check(tmp_path / "out", run_verify)
    assert Counter(row["patient"] for row in index_of(tmp_path / "out")).most_common(3) == [
        (patient, 5) for patient in dict.fromkeys(row["patient"] for row in index_of(tmp_path / "out"))
    ]
    found = {one.tobytes() for one in slices_of(tmp_path / "out")["train"]}
    assert found == {one.astype(np.uint16).tobytes() for one in ct_images(10)}
    rows = manifest(tmp_path / "out")
    reported = [path for path, row in rows.items() if commit.REUSED_UID in row["problems"]]
    # Rows of a finished addition never change.
    assert len(rows) == 10 and len(reported) == (5 if later else 10)


@pytest.mark.parametrize("larger", [False, True])
def test_intact_copy_is_kept_beside_a_damaged_one(
    tmp_path: Path, run_build, run_verify, write_series, manifest, larger: bool
) -> None:
    images = ct_images(5)
    for n, one in enumerate(images):
        fields = {"positions": [2.0 * n], "ImagePositionPatient": [0, 0, 2.0 * n], "SOPInstanceUID": f"2.25.9{n}"}
        write_series(tmp_path / "in" / str(n), pixels=one, **fields)
    text = "x" * 4000 if larger else None
    fields = {"ImagePositionPatient": [0, 0, 4], "SOPInstanceUID": "2.25.92", "ImageComments": text}
    (damaged,) = write_series(tmp_path / "in" / "again", 1, pixels=images[2], **fields)
    damaged.write_bytes(damaged.read_bytes()[:-700])
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out", *ALL_TRAIN).code == 0
    check(tmp_path / "out", run_verify)
    for one, wanted in zip(slices_of(tmp_path / "out")["train"], images, strict=True):
        np.testing.assert_array_equal(one, wanted)
    assert [row["index"] for row in index_of(tmp_path / "out")] == list(range(5))
    rows = manifest(tmp_path / "out")
    assert rows[str(damaged)]["fate"] == "quarantined" and "truncated" in rows[str(damaged)]["reason"]
    assert Counter((row["fate"], row["problems"]) for row in rows.values()) == {("kept", ""): 5, ("quarantined", ""): 1}


def test_series_sent_twice_gives_the_slices_of_one_copy(
    tmp_path: Path, run_build, run_verify, write_series, manifest
) -> None:
    write_series(tmp_path / "once", 20)
    shutil.copytree(tmp_path / "once", tmp_path / "twice" / "a")
    shutil.copytree(tmp_path / "once", tmp_path / "twice" / "b")
    for name in ("once", "twice"):
        words = ("--output", tmp_path / f"out_{name}", "--planes", "coronal", *ALL_TRAIN)
        assert run_build("--input", tmp_path / name, *words).code == 0
        check(tmp_path / f"out_{name}", run_verify)
    once, twice = index_of(tmp_path / "out_once"), index_of(tmp_path / "out_twice")
    assert once == twice and {row["plane"] for row in twice} == {"axial", "coronal"}
    assert Counter((row["fate"], row["reason"]) for row in manifest(tmp_path / "out_twice").values()) == {
        ("kept", ""): 20, ("duplicate", convert.REPEATED_INSTANCE): 20,
    }  # fmt: skip


# ---- digests


@pytest.mark.parametrize("older", [True, False])
def test_additions_keep_the_digests_of_their_dataset(
    tmp_path: Path, run_build, run_verify, write_series, older: bool, monkeypatch
) -> None:
    output, words = tmp_path / "out", ("--output", tmp_path / "out", *ALL_TRAIN)
    first = write_patient(write_series, tmp_path / "a", 1)
    with monkeypatch.context() as patch:
        if older:
            now = pipeline.Options.conversion.fget
            patch.setattr(
                pipeline.Options, "conversion", property(lambda self: dataclasses.replace(now(self), digest="int64"))
            )
        assert run_build("--input", tmp_path / "a", *words).code == 0
    if older:  # as version 0.2.0 wrote it
        plan = output / ".build" / "addition-00000" / assignment.PLAN
        value = json.loads(plan.read_text())
        del value["settings"]["digest"], value["conversion"]["digest"]
        plan.write_text(json.dumps(value))
    write_patient(write_series, tmp_path / "b", 2)
    shutil.copy(first[0], tmp_path / "b" / "again.dcm")
    assert run_build("--input", tmp_path / "b", *words).code == 0
    rows = index_of(output)
    wide = "<i8" if older else "<u2"
    found = {hashlib.sha256(one.astype(wide).tobytes()).hexdigest()[:16] for one in slices_of(output)["train"]}
    assert len(rows) == 10 and {row["source"] for row in rows} == found  # the copy is recognised
    text = json.loads((output / shards.CARD).read_text())["settings"]["stored_sha256"]
    assert ("as int64" in text) == older and ("smallest" in text) == (not older)
    check(output, run_verify)


# ---- duplicates by pixels


def test_series_sent_again_under_other_names_is_removed(
    tmp_path: Path, run_build, run_verify, write_series, manifest
) -> None:
    rng = np.random.default_rng(5)
    pixels = [rng.integers(0, 1900, (40, 44)) for _ in range(6)]
    for patient in range(3):
        write_patient(write_series, tmp_path / "in" / f"p{patient}", patient)
    for name, uid in (("a", "2.25.5"), ("b", "2.25.6")):
        for n, one in enumerate(pixels):
            place = {"positions": [2.0 * n], "pixels": one if n < 5 or name == "a" else one + 1}
            write_series(
                tmp_path / "in" / name / str(n), PatientID=f"Q{name}", SeriesInstanceUID=uid, ImagePositionPatient=[0, 0, 2.0 * n], **place,
            )  # fmt: skip
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--slices-per-record", 4)
    result = run_build(*words, "--validation", 0.4, "--test", 0)
    assert result.code == 0, result.err
    check(tmp_path / "out", run_verify)
    rows = manifest(tmp_path / "out")
    twice = {path: row for path, row in rows.items() if "/in/a/" in path or "/in/b/" in path}
    assert Counter(row["fate"] for row in twice.values()) == {"kept": 7, "duplicate": 5}
    assert {row["reason"] for row in twice.values() if row["fate"] == "duplicate"} == {commit.SAME_PIXELS}
    sources = [row["source"] for row in index_of(tmp_path / "out")]
    assert len(sources) == len(set(sources)) == 22
    card = json.loads((tmp_path / "out" / shards.CARD).read_text())
    assert card["slices_left_out"] == {commit.SAME_PIXELS: 5}
    assert sum(card["intensity"]["HU"]["pixels"]) == 22 * 40 * 44
    # And in a later addition: what is in stays.
    before = shard_state(tmp_path / "out")
    for n, one in enumerate(pixels[:3]):
        write_series(tmp_path / "later" / str(n), PatientID="Z", SeriesInstanceUID="2.25.7", positions=[n], pixels=one)
    words = ("--input", tmp_path / "later", *words[2:], "--validation", 0.4, "--test", 0)
    assert run_build(*words).code == 0
    assert shard_state(tmp_path / "out") == before and len(index_of(tmp_path / "out")) == 22
    assert Counter(row["fate"] for row in manifest(tmp_path / "out").values())["duplicate"] == 8
    check(tmp_path / "out", run_verify)


def test_of_two_copies_the_training_one_is_removed(tmp_path: Path, run_build, write_series) -> None:
    rng = np.random.default_rng(6)
    for patient in range(2):
        write_patient(write_series, tmp_path / f"p{patient}", patient, 6)
    shared = rng.integers(0, 1900, (40, 44))
    for patient, z in ((0, 40.0), (1, 40.0)):
        write_series(
            tmp_path / f"p{patient}" / "x", positions=[z], pixels=shared, PatientID=f"P{patient}", SeriesInstanceUID=f"2.25.{patient + 1}00",
            StudyInstanceUID=f"2.25.{patient + 1}", ImagePositionPatient=[0, 0, z],
        )  # fmt: skip
    lines = [
        f"{p.relative_to(tmp_path)},{'test' if 'p1' in str(p) else 'train'}" for p in sorted(tmp_path.rglob("*.dcm"))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,split", *lines]))
    words = (
        "--input",
        tmp_path / "p0",
        tmp_path / "p1",
        "--output",
        tmp_path / "out",
        "--labels",
        tmp_path / "labels.csv",
    )
    assert run_build(*words, "--split-column", "split").code == 0
    assert Counter(row["split"] for row in index_of(tmp_path / "out")) == {"train": 6, "test": 7}


@pytest.mark.long
def test_near_duplicate_series_are_reported_and_kept(
    tmp_path: Path, run_build, run_verify, manifest, study: Path
) -> None:
    import pydicom

    source = sorted((study / "dicom").rglob("*.dcm"))
    by_series: dict[str, list[Path]] = {}
    for path in source:
        by_series.setdefault(str(path.parent), []).append(path)
    folder = min(by_series)
    rng = np.random.default_rng(0)
    for path in by_series[folder]:
        data = pydicom.dcmread(path)
        noise = rng.normal(0, 20, data.pixel_array.shape)  # as another kernel makes it
        data.PixelData = np.clip(data.pixel_array + noise, 0, 4000).astype(data.pixel_array.dtype).tobytes()
        data.SeriesInstanceUID, data.SOPInstanceUID = "2.25.123456789", f"2.25.1234{path.stem[-3:]}1"
        data.PatientID = "OTHER"
        (tmp_path / "again").mkdir(exist_ok=True)
        data.save_as(tmp_path / "again" / path.name)
    words = (
        "--input",
        study / "dicom",
        tmp_path / "again",
        "--output",
        tmp_path / "out",
        "--validation",
        0.3,
        "--test",
        0,
    )
    assert run_build(*words).code == 0
    near = {row["series"]: row["near_duplicate_of"] for row in index_of(tmp_path / "out") if row["near_duplicate_of"]}
    rows = manifest(tmp_path / "out")
    pair = {row["series"] for path, row in rows.items() if path.startswith((folder, str(tmp_path / "again")))}
    assert len(pair) == 2
    assert [{a, b} for a, b in near.items()] == [pair]  # nothing else of 32 series looks like another
    flagged = {row["series"] for row in rows.values() if commit.NEAR in row["problems"]}
    assert flagged == set(near) and {row["fate"] for row in rows.values()} == {"kept"}
    card = json.loads((tmp_path / "out" / shards.CARD).read_text())
    assert card["near_duplicates"]["series"] == 1 and card["near_duplicates"]["of another patient"] == 1
    assert "Series that look like another one (reported, kept): 1" in (tmp_path / "out" / shards.PAGE).read_text()
    check(tmp_path / "out", run_verify)
