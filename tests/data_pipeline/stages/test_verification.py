"""Everything that is wrong with a finished dataset is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from curia_common.errors import UserError
from data_pipeline.format import codec, shards
from data_pipeline.stages import pseudonyms, verification


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def shard_of(folder: Path, split: str = "train") -> Path:
    return sorted(folder.glob(f"*-{split}.array_record-*"))[0]


def change(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path)


def put(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))


def problems(folder: Path) -> list[str]:
    report = verification.verify(folder)
    assert report.sound == (not report.problems)
    return list(report.problems)


def test_dataset_without_manifest_is_sound(copy: Path, inline_workers: None) -> None:
    (copy / shards.MANIFEST).unlink()  # as it is when a dataset is given away
    assert problems(copy) == []


def test_missing_and_truncated_shards_are_named(copy: Path, inline_workers: None) -> None:
    first, second = shard_of(copy), shard_of(copy, "test")
    size = second.stat().st_size
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    found = problems(copy)
    assert f"{first.name} is missing" in found
    assert f"{second.name} has {size - 100:,} bytes, published with {size:,}" in found


def test_every_flipped_bit_is_detected(copy: Path, inline_workers: None) -> None:
    shard = shard_of(copy)
    data = shard.read_bytes()
    used = len(data.rstrip(b"\0"))
    places = [*np.random.default_rng(1).integers(0, used, 6), len(data) - 1]  # in the padding too
    for at in places:
        flipped = bytearray(data)
        flipped[at] ^= 16
        shard.write_bytes(flipped)
        found = problems(copy)
        assert any(line.startswith(f"{shard.name} has SHA-256 ") for line in found)


def test_damaged_records_are_counted(copy: Path, inline_workers: None) -> None:
    shard = shard_of(copy)
    count = len(shards.SliceSource(copy, "train").index.filter(pc.field("shard") == shard.name)["record"].unique())
    shards.write(shard, [b"no record"] * count)
    found = problems(copy)
    assert [line for line in found if line.startswith(f"{shard.name}, record ")] == [
        f"{shard.name}, record {n}: is damaged" for n in range(3)
    ]
    assert f"{shard.name}: {count - 3:,} more damaged records" in found


def test_pixels_that_contradict_statistics_are_detected(copy: Path, inline_workers: None, monkeypatch) -> None:
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda data: decode(data) + np.uint16(1))
    found = problems(copy)
    assert sum("record 0: its mean is not that of its pixels" in line for line in found) == 12


def test_stray_and_unlisted_shards_are_named(copy: Path, inline_workers: None) -> None:
    shutil.copy(shard_of(copy), copy / "slices-train.array_record-00099")
    assert problems(copy) == [f"slices-train.array_record-00099 is not in {shards.SHARDS}"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mean", 1.0, "index.parquet has another mean than {shard} for 1 slices, the first in record 0"),
        ("source", "0" * 16, "index.parquet has another source than {shard} for 1 slices, the first in record 0"),
        ("height", 41, "index.parquet has another height than {shard} for 1 slices, the first in record 0"),
        ("split", "test", "index.parquet has 1 rows for {shard} in split test, which is not a shard of the dataset"),
        ("record", 99, "index.parquet has another record than {shard} for "),
    ],
)
def test_index_that_contradicts_records_is_detected(
    copy: Path, inline_workers: None, name: str, value: object, text: str
) -> None:
    row = pq.read_table(copy / shards.INDEX)["split"].to_pylist().index("train")
    change(copy / shards.INDEX, lambda table: put(table, name, row, value))
    wanted = text.format(shard=shard_of(copy).name)
    assert any(line.startswith(wanted) for line in problems(copy))


def test_patient_in_two_splits_and_missing_rows_are_detected(copy: Path, inline_workers: None) -> None:
    patients = pq.read_table(copy / shards.INDEX, filters=[("split", "=", "test")])["patient"]
    change(copy / shards.INDEX, lambda table: put(table, "patient", 0, patients[0].as_py()))
    found = problems(copy)
    assert f"1 patients are in several splits, {patients[0].as_py()} in test and train" in found
    change(copy / shards.INDEX, lambda table: table.slice(1))
    shard = shard_of(copy)
    rows = pq.read_table(copy / shards.SHARDS, filters=[("file", "=", shard.name)])["slices"][0].as_py()
    wanted = f"index.parquet has {rows - 1:,} rows for {shard.name}, shards.parquet {rows:,} slices"
    assert wanted in problems(copy)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("sha256", "0" * 64, "card.json and shards.parquet differ in the shards or their checksums"),
        ("slices", 1, "shards.parquet is damaged: the numbers of "),
        ("largest_width", 41, "its largest slice is 40x40 px, shards.parquet says 40x41"),
        ("records", -1, "shards.parquet is damaged: the numbers of "),
        ("split", "dev", "is of split 'dev', which does not exist"),
        ("file", "../x", "shards.parquet is damaged: '../x' is not a file of this folder; copy it again"),
    ],
)
def test_shard_table_that_contradicts_shards_is_detected(
    copy: Path, inline_workers: None, name: str, value: object, text: str
) -> None:
    row = pq.read_table(copy / shards.SHARDS)["split"].to_pylist().index("test")
    change(copy / shards.SHARDS, lambda table: put(table, name, row, value))
    assert any(text in line for line in problems(copy))


def test_metadata_and_card_that_contradict_are_detected(copy: Path, inline_workers: None) -> None:
    card = json.loads((copy / shards.CARD).read_text())
    card["patients"] += 1
    card["files"]["excluded"] = 4
    (copy / shards.CARD).write_text(json.dumps(card))
    features = json.loads((copy / "features.json").read_text())
    del features["featuresDict"]["features"]["plane"]
    (copy / "features.json").write_text(json.dumps(features))
    assert problems(copy) == [
        "features.json describes other records than this version writes and reads",
        "card.json counts 9 patients, the dataset has 8",
        "card.json counts 4 files excluded, manifest.parquet 0",
    ]


@pytest.mark.parametrize("name", [shards.SHARDS, shards.INDEX, shards.CARD, "dataset_info.json", shards.MANIFEST])
def test_damaged_tables_are_problems(copy: Path, inline_workers: None, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:50])
    assert any(
        name in line and any(words in line for words in ("cannot be read", "cannot read", "is damaged"))
        for line in problems(copy)
    )


# ---- hold-outs


def test_held_out_patients_in_the_index_are_counted(study: Path, dataset: Path, tmp_path: Path, key_file: Path) -> None:
    """By patient ID and by folder; a patient who is not in the dataset is named, but not found."""
    (tmp_path / "holdout.txt").write_text(f"PHANTOM-0001\n\n{study / 'dicom' / 'PHANTOM-0002'}\nPHANTOM-9999\n")
    found = verification.held_out(dataset, str(tmp_path / "holdout.txt"), str(key_file))
    assert found == verification.HeldOut(lines=3, patients=3, patients_found=2, slices_found=40)


def test_held_out_patient_in_the_index_is_a_problem(
    dataset: Path, tmp_path: Path, key_file: Path, inline_workers: None
) -> None:
    holdout = tmp_path / "holdout.txt"
    for names, wanted in (
        ("PHANTOM-9999\n", ()),
        ("PHANTOM-9999\nPHANTOM-0003\n", (f"20 slices are of 1 patients of {holdout}",)),
    ):
        holdout.write_text(names)
        report = verification.verify(dataset, holdout=str(holdout), key_file=str(key_file))
        assert report.problems == wanted and report.sound == (not wanted)
        assert report.to_json()["held_out"]["patients_found"] == len(wanted)


def test_other_or_missing_key_proves_nothing(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "holdout.txt").write_text("PHANTOM-0001\n")
    (tmp_path / "other.key").write_text("another key that everybody may know")
    monkeypatch.delenv(pseudonyms.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match="the key is not the one that .* was built with, so nobody would be found"):
        verification.held_out(dataset, str(tmp_path / "holdout.txt"), str(tmp_path / "other.key"))
    with pytest.raises(UserError, match="--holdout needs the key of the dataset: .*; name it with --key-file"):
        verification.held_out(dataset, str(tmp_path / "holdout.txt"), None)
    assert not dataset.with_name(f"{dataset.name}.key").exists()
