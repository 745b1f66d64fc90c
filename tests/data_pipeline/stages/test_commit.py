import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common import __version__
from curia_common.errors import DataError, UserError
from data_pipeline.format import shards
from data_pipeline.stages import assignment, card, commit, convert, inventory
from data_pipeline.stages.assignment import Conversion, Plan, StoredPlan

KEY = b"0123456789abcdef"
RNG = np.random.default_rng(3)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out" / commit.BUILD_FOLDER).mkdir(parents=True)
    return tmp_path / "out"


def add(output: Path, paths: list[Path], **changes) -> card.Card:
    """Adds files to the dataset in `output` stage by stage; `changes` are fields of the commit's request."""
    private = output / commit.BUILD_FOLDER
    known = commit.known(output, private)
    entries = inventory.inspect(([str(path) for path in paths], inventory.Options(KEY)), {}, lambda item: None)
    options = assignment.Options(
        KEY, 0.0, 0.0, 10**9, frozenset(), Conversion("x", slices_per_record=2), first=known.first_numbers(),
        splits=known.splits,
    )  # fmt: skip
    named = [entry.patient for entry in entries]
    plan, entries = assignment.make(entries, options)
    stored = convert_all(output, private, known.additions, plan)
    request = commit.Request(output, private, "x", {"size": None}, 0, known, entries, named, frozenset(), None)
    return commit.commit(dataclasses.replace(request, **changes), stored)


def convert_all(output: Path, private: Path, addition: int, plan: Plan) -> StoredPlan:
    own = commit.folder_of(private, addition)
    sidecars = own / "shards"
    if own.exists():  # of an interrupted addition
        shutil.rmtree(own)
    sidecars.mkdir(parents=True)
    stored = assignment.write(own, plan)
    lines = assignment.lines_of(own, plan.hash)
    job = convert.Job(str(output), str(sidecars), None, plan.hash, str(lines), plan.settings.conversion)
    for place in stored.shards:
        name = convert.publish(convert.ShardTask(job, place.at), {}, lambda item: None)
        assert commit.is_finished(sidecars, output / name, plan.hash)
        assert not commit.is_finished(sidecars, output / name, "0" * 64)
    return stored


def index_of(output: Path) -> list[dict]:
    return pq.read_table(output / shards.INDEX).to_pylist()


# ---- known


def test_known_of_empty_folder_has_nothing(output: Path) -> None:
    found = commit.known(output, output / commit.BUILD_FOLDER)
    assert found == commit.Known()
    assert found.slices_of(output, {"a"}) == {}


def test_known_lists_files_instances_splits_and_settings(output: Path, tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "in", 5)
    paths[1].write_bytes(b"noise")
    add(output, paths)
    found = commit.known(output, output / commit.BUILD_FOLDER)
    assert found.additions == 1 and set(found.files) == {str(path) for path in paths}
    assert sorted(row.fate for row in found.files.values()) == ["excluded", *["kept"] * 4]
    assert len(found.instances) == 4 and set(found.splits.values()) == {"train"}
    assert found.settings == assignment.settings(KEY, 0.0, 0.0, Conversion("x", slices_per_record=2))
    assert found.first_numbers() == {"train": len(found.shards)}
    (series,) = {row["series"] for row in index_of(output)}
    assert found.slices_of(output, {series, "other"}) == {series: 4}


@pytest.mark.parametrize("damage", ["truncated table", "no plan", "other version"])
def test_known_names_damage_and_other_versions(output: Path, tmp_path: Path, write_series, damage: str) -> None:
    add(output, write_series(tmp_path / "in", 3))
    private = output / commit.BUILD_FOLDER
    table = output / shards.SHARDS
    if damage == "truncated table":
        table.write_bytes(table.read_bytes()[:50])
    elif damage == "no plan":
        (commit.folder_of(private, 0) / assignment.PLAN).unlink()
    else:
        pq.write_table(pq.read_table(table).replace_schema_metadata(None), table)
    wanted = {
        "truncated table": "is damaged",
        "no plan": "is missing or damaged",
        "other version": "of another version",
    }
    with pytest.raises(DataError, match=wanted[damage]):
        commit.known(output, private)


# ---- exact duplicates


def index_table(*sources: str) -> pa.Table:
    """Index rows of slices of one size, two slices a record."""
    count = len(sources)
    return pa.table({
        "source": list(sources), "height": [4] * count, "width": [4] * count,
        "record": [n // 2 for n in range(count)], "slot": [n % 2 for n in range(count)],
    })  # fmt: skip


def test_duplicates_keeps_test_before_validation_before_train() -> None:
    parts = [("a", "train", index_table("01", "02", "03")), ("b", "test", index_table("02")),
             ("c", "validation", index_table("03", "02"))]  # fmt: skip
    assert commit.duplicates([], parts) == {"a": {(0, 1), (1, 0)}, "c": {(0, 1)}}


def test_duplicates_keeps_slices_of_the_dataset() -> None:
    before = commit.duplicates([], [("a", "train", index_table("01"))])
    assert before == {} and commit.duplicates([], []) == {}
    keys = [commit.pixel_keys(index_table("01", "02"))]
    assert commit.duplicates(keys, [("b", "test", index_table("03", "02"))]) == {"b": {(0, 1)}}


def test_equal_pixels_of_other_size_are_no_duplicates() -> None:
    wide = index_table("01").set_column(1, "height", [[2]]).set_column(2, "width", [[8]])
    assert commit.duplicates([], [("a", "train", index_table("01")), ("b", "train", wide)]) == {}


def test_commit_removes_slices_that_are_in_the_dataset(output: Path, tmp_path: Path, write_series) -> None:
    pixels = [RNG.integers(0, 1900, (40, 44)) for _ in range(4)]

    def write(name: str, uid: str, several: list[np.ndarray]) -> list[Path]:
        return [
            path
            for n, one in enumerate(several)
            for path in write_series(
                tmp_path / name / str(n), positions=[2.0 * n], ImagePositionPatient=[0, 0, 2.0 * n], pixels=one,
                SeriesInstanceUID=uid, PatientID=name,
            )
        ]  # fmt: skip

    add(output, write("a", "2.25.5", pixels[:3]))
    made = add(output, write("b", "2.25.6", pixels[1:]))
    assert (made["slices"], made["additions"], made["slices_left_out"]) == (4, 2, {commit.SAME_PIXELS: 2})
    assert made["files"] == {"kept": 4, "excluded": 0, "duplicate": 2, "quarantined": 0}
    assert len({row["source"] for row in index_of(output)}) == 4
    assert sum(made["intensity"]["HU"]["pixels"]) == 4 * 40 * 44
    source = shards.SliceSource(output, "train")
    found = sorted(source[n].pixels.tobytes() for n in range(len(source)))
    assert found == sorted(one.astype(np.uint16).tobytes() for one in pixels)


# ---- what a commit writes


def test_card_is_written_as_returned_with_the_version(output: Path, tmp_path: Path, write_series) -> None:
    made = add(output, write_series(tmp_path / "in", 3))
    assert made == json.loads((output / shards.CARD).read_text())
    assert made["version"] == __version__


def test_held_out_patient_in_the_dataset_is_an_error(output: Path, tmp_path: Path, write_series) -> None:
    add(output, write_series(tmp_path / "in", 3))
    (patient,) = {row["patient"] for row in index_of(output)}
    before = (output / shards.SHARDS).read_bytes()
    with pytest.raises(DataError, match="3 slices of held-out patients are in the dataset"):
        add(
            output,
            write_series(tmp_path / "b", 3, PatientID="B", SeriesInstanceUID="2.25.9"),
            held_out=frozenset({patient}),
        )
    assert (output / shards.SHARDS).read_bytes() == before


def test_nothing_left_writes_manifest_and_names_reasons(output: Path, tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "in", 3, pixels=np.full((40, 40), 300))
    with pytest.raises(
        DataError, match="none of the 3 files is a usable slice: 3 x constant; .*has the reason of each file"
    ):
        add(output, paths)
    rows = pq.read_table(output / shards.MANIFEST).to_pylist()
    assert [(row["fate"], row["reason"]) for row in rows] == [("excluded", "constant")] * 3
    assert not (output / shards.SHARDS).exists()


def test_index_rejects_label_column_of_other_type(output: Path, tmp_path: Path, write_series) -> None:
    add(output, write_series(tmp_path / "in", 3))
    index = pq.read_table(output / shards.INDEX)
    pq.write_table(index.append_column("label_a", pa.array([1] * len(index))), output / shards.INDEX)
    known = commit.known(output, output / commit.BUILD_FOLDER)
    request = commit.Request(output, output / commit.BUILD_FOLDER, "x", {}, 0, known, [], [], frozenset(), None)
    with pytest.raises(UserError, match="a label column holds numbers in one addition and text in another"):
        commit.publish(request, known.shards, {"y": pa.table({"label_a": ["text"]})}, {}, 1)
