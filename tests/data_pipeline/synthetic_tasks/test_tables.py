"""The files of the suite: what a reader of CuriaBench's schema finds."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

SPLITS = ("train", "val", "test")
# CuriaBench: numbers of classes (None: values), form of the images, masks.
PUBLISHED = {
    "anatomy-ct": (54, "2D", True), "anatomy-mri": (56, "2D", True), "ixi": (None, "2D", False), "luna16": (2, "2D", True),
    "luna16-3D": (2, "3D", True), "kits": (2, "2D", True), "deep-lesion-site": (8, "2D", True),
    "tcia-survival": (None, "2D", True), "neural_foraminal_narrowing": (3, "2D", True),
    "subarticular_stenosis": (3, "2D", True), "spinal_canal_stenosis": (3, "2D", True), "kneeMRI": (3, "3D", True),
    "ich": (2, "2D", False), "emidec-classification-mask": (2, "2D", True), "abdominal-trauma": (2, "2D", False),
    "atlas-stroke": (2, "3D", False), "covidx-ct": (3, "2D", False), "oasis": (2, "3D", False),
}  # fmt: skip
CT = {
    "anatomy-ct",
    "luna16",
    "luna16-3D",
    "kits",
    "deep-lesion-site",
    "tcia-survival",
    "ich",
    "abdominal-trauma",
    "covidx-ct",
}


def rows(suite: Path, task: str, split: str) -> pa.Table:
    return pq.read_table(suite / task / f"{split}.parquet")


def arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [np.array(value) for value in column.to_pylist()]


def header(card: Path) -> dict:
    """The YAML at the head of a card."""
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])


def test_every_task_of_curiabench_has_a_folder(suite: Path) -> None:
    assert {path.name for path in suite.iterdir()} == {*PUBLISHED, "README.md"}


@pytest.mark.parametrize("task", PUBLISHED)
def test_rows_have_the_published_schema(suite: Path, task: str) -> None:
    classes, form, masked = PUBLISHED[task]
    for split in SPLITS:
        table = rows(suite, task, split)
        nested = pa.list_(pa.list_(pa.list_(pa.float32()))) if form == "3D" else pa.list_(pa.list_(pa.float32()))
        assert table.schema.field("image").type == nested
        assert table.schema.field("target").type == (pa.float64() if classes is None else pa.int64())
        assert len(set(table.column("filename").to_pylist())) == table.num_rows
        images, masks = arrays(table.column("image")), table.column("mask").to_pylist()
        shapes = {image.shape for image in images}
        assert len(shapes) == 1 and next(iter(shapes))[:2] == (32, 32)
        assert len(next(iter(shapes))) == (3 if form == "3D" else 2)
        if not masked:
            assert set(masks) == {None}
            continue
        for image, mask in zip(images, map(np.array, masks), strict=True):
            assert mask.shape == image.shape and set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize("task", PUBLISHED)
def test_targets_are_all_classes_in_training(suite: Path, task: str) -> None:
    classes = PUBLISHED[task][0]
    found = rows(suite, task, "train").column("target").to_pylist()
    if classes is None:
        assert len(set(found)) > 5 and np.isfinite(found).all()
    else:
        assert set(found) == set(range(classes))
        assert {*rows(suite, task, "test").column("target").to_pylist()} <= set(range(classes))


@pytest.mark.parametrize("task", PUBLISHED)
def test_values_are_hu_or_mr_signal(suite: Path, task: str) -> None:
    images = np.stack(arrays(rows(suite, task, "test").column("image")))
    assert (images == np.rint(images)).all()
    if task in CT:
        assert (images.min(axis=tuple(range(1, images.ndim))) < -700).all()  # air, in every picture
        assert ((images > 0) & (images < 100)).mean() > 0.03  # soft tissue
        assert images.min() >= -1024
    else:
        assert images.min() >= 0 and 300 < images.max() < 2000


@pytest.mark.parametrize("task", PUBLISHED)
def test_no_patient_is_in_two_splits(suite: Path, task: str) -> None:
    patients = {split: set(rows(suite, task, split).column("patient_id").to_pylist()) for split in SPLITS}
    assert len(patients["train"]) == 3 * len(patients["test"]) and len(patients["val"]) == len(patients["test"]) >= 3
    assert all(not patients[a] & patients[b] for a, b in itertools.combinations(SPLITS, 2))


def test_series_are_one_patient_and_one_target(suite: Path) -> None:
    several = 0
    for task in PUBLISHED:
        seen: dict[str, tuple] = {}
        for row in rows(suite, task, "train").select(["series_id", "patient_id", "target"]).to_pylist():
            several += row["series_id"] in seen
            assert seen.setdefault(row["series_id"], (row["patient_id"], row["target"])) == (
                row["patient_id"],
                row["target"],
            )
    assert several > 100  # slices beyond the first of a case


def test_survival_has_times_events_and_clinical_variables(suite: Path) -> None:
    table = rows(suite, "tcia-survival", "train")
    assert set(table.column("event").to_pylist()) == {0, 1}
    assert table.column("time").to_pylist() == table.column("target").to_pylist()
    assert min(table.column("time").to_pylist()) > 0
    assert {"age", "sex", "stage"} <= set(table.column_names)


def test_cards_list_files_that_exist(suite: Path) -> None:
    configs = header(suite / "README.md")["configs"]
    assert [config["config_name"] for config in configs] == list(PUBLISHED)
    for config in configs:
        own = header(suite / config["config_name"] / "README.md")["configs"]
        assert [entry["config_name"] for entry in own] == [config["config_name"]]
        for place, entries in ((suite, config["data_files"]), (suite / config["config_name"], own[0]["data_files"])):
            assert [entry["split"] for entry in entries] == list(SPLITS)
            assert all((place / entry["path"]).is_file() for entry in entries)


def test_card_counts_equal_the_rows(suite: Path) -> None:
    card = (suite / "kits" / "README.md").read_text(encoding="utf-8")
    counts = []
    for name in ("benign", "malignant"):
        line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        counts.append([int(cell) for cell in line.split("|")[2:5]])
    for number, expected in enumerate(counts):
        found = [rows(suite, "kits", split).column("target").to_pylist().count(number) for split in SPLITS]
        assert found == expected
    assert "synthetic" in card and "2, as in CuriaBench" in card


def test_files_name_the_class_numbers_as_datasets_does(suite: Path) -> None:
    for split in SPLITS:
        stated = json.loads(rows(suite, "anatomy-mri", split).schema.metadata[b"huggingface"])["info"]["features"][
            "target"
        ]
        assert stated["_type"] == "ClassLabel" and len(stated["names"]) == 56
        organs = rows(suite, "anatomy-mri", split).select(["target", "organ"]).to_pylist()
        assert all(stated["names"][row["target"]] == row["organ"] for row in organs)
    assert b"huggingface" not in (rows(suite, "ixi", "train").schema.metadata or {})


def test_tasks_without_a_folder_are_named(suite: Path) -> None:
    text = (suite / "README.md").read_text(encoding="utf-8")
    assert "registration: the schema of its pairs is not published" in text
    assert "anatomy-cross-modality: it is made of anatomy-ct and anatomy-mri" in text
