"""The benchmark on real slices: its label table and its result table, without running it."""

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pydicom
import pytest

from benchmarks import real_data as benchmark
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate.results import Score
from tests.scores import make_score


@pytest.fixture(scope="module")
def rows(real_data) -> list[dict]:
    return benchmark.label_table(real_data)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_another_file(rows) -> None:
    files = [Path(row["file"]) for row in rows]
    assert all(path.is_file() for path in files)
    assert len(set(files)) == len(files)


def test_no_patient_is_in_two_splits(rows) -> None:
    splits = defaultdict(set)
    for row in rows:
        if row.get("patient"):
            splits[row["patient"]].add(row["split"])
    assert len(splits) > 400
    assert all(len(found) == 1 for found in splits.values())


def test_published_test_splits_are_complete(rows, real_data) -> None:
    tests = {
        label: {row["file"] for row in rows if row.get(label) and row["split"] == "test"}
        for label in ("tumor", "covid")
    }
    for label, folder, column in (("tumor", "mr_brain_tumor", "split"), ("covid", "ct_covid", "official_split")):
        published = read(real_data / "labelled" / folder / "labels.csv")
        wanted = {real_data / "labelled" / folder / line["file"] for line in published if line[column] == "test"}
        assert tests[label] == wanted


def test_unlabelled_files_are_for_training(rows) -> None:
    unlabelled = [row for row in rows if not any(row.get(label) for label in ("tumor", "covid", "contrast"))]
    assert len(unlabelled) > 300
    assert {row["split"] for row in unlabelled} == {"train"}
    assert not any("us_images" in str(row["file"]) for row in rows)
    assert Counter(row["modality"] for row in unlabelled)["MR"] > 100


def test_files_outside_the_table_are_held_out(rows, real_data) -> None:
    unused = benchmark.left_out(real_data)
    used = {Path(row["file"]) for row in rows}
    assert unused and not used & set(unused)
    assert {path.suffix for path in unused} <= {".jpg", ".png", ".gz", ".nii"}
    assert any("us_images" in str(path) for path in unused)
    published = read(real_data / "labelled" / "ct_covid" / "labels.csv")
    covid = {real_data / "labelled" / "ct_covid" / line["file"] for line in published}
    assert covid - used == covid & set(unused)


def test_ages_are_those_of_the_headers(rows) -> None:
    aged = [row for row in rows if row.get("age")]
    assert len(aged) == 36
    for row in aged:
        header = pydicom.dcmread(row["file"], stop_before_pixels=True)
        assert float(row["age"]) == float(header.PatientAge.removesuffix("Y")), "an age differs from its header"


def scores_of(run: str, task: str, head: str, metric: str, **changes: Any) -> list[Score]:
    """Of the run, the floors, and the differences; the interval of the run is doubtful."""
    ends = {"n": 99, "low": 0.25, "high": 0.75, **changes}
    found = [
        make_score(task, backbone, head, metric=metric, value=value, doubt="few" if backbone == run else None, **ends)
        for backbone, value in ((run, 0.625), ("random", 0.5), ("pixels", 0.375), ("histogram", 0.3125))
    ]
    differences = (("random", 0.125), ("pixels", 0.25), ("histogram", 0.3125))
    return found + [
        make_score(task, run, head, metric=metric, against=against, value=value, **ends)
        for against, value in differences
    ]


def test_table_has_a_row_for_each_task_and_head(tmp_path) -> None:
    run = str(tmp_path)
    scores = [
        *scores_of(run, "shards/covid", "ridge", "auroc"),
        *scores_of(run, "shards/covid", "ridge", "accuracy"),
        *scores_of(run, "anatomy-ct", "linear", "auroc", protocol="official"),
    ]
    heading, _, covid, organs = benchmark.table(scores, "auroc", tmp_path).splitlines()
    assert heading.startswith("| auroc | head | checkpoint | random | pixels | histogram | checkpoint - random |")
    assert covid == (
        "| covid | ridge | 0.625 [0.250, 0.750]? | 0.500 [0.250, 0.750] | 0.375 [0.250, 0.750] | 0.312 [0.250, 0.750] "
        "| +0.125 [+0.250, +0.750] | +0.250 [+0.250, +0.750] | +0.312 [+0.250, +0.750] | 99 |"
    )
    assert organs.startswith("| anatomy-ct | linear (official) | 0.625 [0.250, 0.750]?")


def test_loss_is_against_heads_that_learned_from_the_tested_modality(tmp_path) -> None:
    directions = {"trained_on": "CT", "tested_on": "MR"}
    scores = [
        make_score(
            "organ", backbone, "knn", metric="accuracy", against=against, value=value, low=-0.5, high=0.0, **directions
        )
        for against, change in (("trained on MR", 0.0), ("tested on CT", 0.01), ("random", 0.02))
        for backbone, value in zip(
            (str(tmp_path), "random", "pixels", "histogram"), (change - 0.1, -0.2, -0.3, -0.4), strict=True
        )
    ]
    (row,) = benchmark.lost(scores, tmp_path).splitlines()[2:]
    assert row == (
        "| organ, CT to MR | knn | -0.100 [-0.500, +0.000] | -0.200 [-0.500, +0.000] | -0.300 [-0.500, +0.000] | -0.400 [-0.500, +0.000] |"
    )


def test_few_labels_table_shows_mean_and_range_over_subsets(tmp_path) -> None:
    scores = [
        make_score("shards/tumor", backbone, value=value + 0.1 * seed, labels=labels, seed=seed)
        for backbone, value in ((str(tmp_path), 0.6), ("random", 0.5), ("pixels", 0.4), ("histogram", 0.3))
        for labels, seeds in (("5 %", (0, 1, 2)), ("100 %", (0,)))
        for seed in seeds
    ]
    few, whole = benchmark.few_labels(scores, tmp_path).splitlines()[2:]
    assert few.startswith("| tumor | 5 % | 0.700 (0.600 to 0.800) | 0.600 (0.500 to 0.700) |")
    assert whole.startswith("| tumor | 100 % | 0.600 | 0.500 |")


def test_summary_says_what_pretraining_cost(tmp_path) -> None:
    lines = {
        "config.json": {"batch_size": 32, "seed": 7},
        "events.jsonl": {"event": "started", "slices": 5000},
        "metrics.jsonl": {"step": 10, "examples_seen": 320, "loss": 0.5, "baseline_loss": 1.0},
    }
    for name, content in lines.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    studies = benchmark.studies(tmp_path, tmp_path)
    text = benchmark.markdown({one.name: () for one in studies}, tmp_path, {"wall_s": 600, "cpu_s": 1200})
    assert "10 steps of 32, 320 samples of 5,000 slices, seed 7; 10 minutes, 20 core minutes" in text


def test_evaluate_accepts_the_options_of_every_study(tmp_path) -> None:
    for one in benchmark.studies(tmp_path / "shards", tmp_path / "organs"):
        words = [f"--tasks={','.join(one.tasks)}", "--backbones=run", f"--output={one.name}", *one.options]
        evaluate.parser().parse_args(words)
