"""The benchmark on real slices: its label table and its result table, without running it."""

import csv
import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from tests.scores import make_score

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "real_data.py"


@pytest.fixture(scope="module")
def benchmark_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_data_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(benchmark_script, real_data) -> list[dict]:
    return benchmark_script.label_table(real_data)


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


def test_published_test_splits_are_complete(rows, benchmark_script, real_data) -> None:
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


def test_files_outside_the_table_are_held_out(rows, benchmark_script, real_data) -> None:
    unused = benchmark_script.left_out(real_data)
    used = {Path(row["file"]) for row in rows}
    assert unused and not used & set(unused)
    assert {path.suffix for path in unused} <= {".jpg", ".png", ".gz", ".nii"}
    assert any("us_images" in str(path) for path in unused)
    published = read(real_data / "labelled" / "ct_covid" / "labels.csv")
    covid = {real_data / "labelled" / "ct_covid" / line["file"] for line in published}
    assert covid - used == covid & set(unused)


def test_table_shows_every_score(benchmark_script, tmp_path) -> None:
    lines = {
        "config.json": {"batch_size": 32, "seed": 7},
        "events.jsonl": {"event": "started", "slices": 5000},
        "metrics.jsonl": {"step": 10, "examples_seen": 320, "loss": 0.5, "baseline_loss": 1.0},
    }
    for name, content in lines.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    scores, run = [], str(tmp_path)
    for task in benchmark_script.LABELS:
        for head in benchmark_script.HEADS:
            ends = {"n": 99, "low": 0.25, "high": 0.75}
            for metric in ("auroc", "accuracy"):
                for backbone, value in ((run, 0.625), ("random", 0.5), ("pixels", 0.375), ("histogram", 0.3125)):
                    scores.append(make_score(task, backbone, head, metric=metric, value=value, **ends))
                for against, value in (("random", 0.125), ("pixels", 0.25), ("histogram", 0.3125)):
                    scores.append(make_score(task, run, head, metric=metric, against=against, value=value, **ends))
    text = benchmark_script.markdown(scores, tmp_path, {"wall_s": 600, "cpu_s": 1200})
    assert "10 steps of 32, 320 samples of 5,000 slices, seed 7; 10 minutes, 20 core minutes" in text
    assert (
        "| covid | logistic | 0.625 [0.250, 0.750] | 0.500 [0.250, 0.750] | 0.375 [0.250, 0.750] | 0.312 [0.250, 0.750] "
        "| +0.125 [+0.250, +0.750] | +0.250 [+0.250, +0.750] | +0.312 [+0.250, +0.750] | 99 |" in text
    )
    assert text.count("| tumor |") == 2 * len(benchmark_script.HEADS)
