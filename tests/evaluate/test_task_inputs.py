"""A task that is made of two others, and tasks across a column, through the command."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import task_inputs, tasks
from tests.evaluate import organs, published
from tests.evaluate.test_command import save_checkpoint

NAME = "anatomy-cross-modality"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with run/ and data/, which has anatomy-ct and anatomy-mri."""
    folder = tmp_path_factory.mktemp("across")
    save_checkpoint(folder / "run")
    organs.write(folder / "data")
    return folder


def run(study: Path, output: Path, *words: str) -> int:
    words = ("--floors=histogram", "--heads=ridge", "--features=mean", "--draws=100", *words)
    return evaluate.main([f"--data={study / 'data'}", f"--backbones={study / 'run'}", f"--output={output}", *words])


def opened(data: Path, class_map: str | None = None) -> task_inputs.JoinedData:
    found = task_inputs.open_task(tasks.find(NAME), data, data.with_name("cache"), (), class_map)
    assert isinstance(found, task_inputs.JoinedData)
    return found


def test_shared_organs_of_both_are_the_cases(study) -> None:
    read = opened(study / "data")
    # The lobes of the left lung are one; sternum and discs are in one modality alone.
    assert read.cases.classes == ("liver", "lung_left", "spleen")
    sides = read.sides(task_inputs.Column("modality"))
    for split, patients in (("train", 6), ("validation", 4), ("test", 10)):
        part = read.cases.splits[split]
        ct = sides[split] == "CT"
        assert (ct.sum(), (~ct).sum()) == (4 * patients, 3 * patients)
        assert sorted(part.names[ct][:4]) == ["liver", "lung_left", "lung_left", "spleen"]
        assert part.names[~ct][:3].tolist() == ["lung_left", "liver", "spleen"]
    # Patients of the same name in the two tasks are different ones.
    assert len(np.unique(read.cases.splits["test"].patients)) == 20


def test_pictures_are_those_of_the_rows(study) -> None:
    read = opened(study / "data")
    test, sides = read.cases.splits["test"], read.sides(task_inputs.Column("modality"))["test"]
    chosen = [5, len(test.slices) - 1, 0]
    for picture, case in zip(read.test_pictures(test.slices[chosen].tolist()), chosen, strict=True):
        assert picture.hu == (sides[case] == "CT")
        level = organs.LEVELS.get(str(test.names[case]), 0.0)
        level = 1 - level if sides[case] == "MR" and test.names[case] != "lung_left" else level
        shown = picture.values[picture.mask].mean()
        assert shown == pytest.approx(300 * level + (-40 if sides[case] == "CT" else 10), abs=5)


@pytest.mark.long
def test_command_scores_four_directions_and_what_is_lost(study, tmp_path, capsys) -> None:
    assert run(study, tmp_path, f"--tasks={NAME},anatomy-ct", "--subgroups=patient_id") == 0
    assert f"{NAME} has no subgroups" in capsys.readouterr().err
    rows = [row for row in json.loads((tmp_path / "results.json").read_text()) if row["task"] == NAME]

    def value(trained: str, tested: str, against: str | None = None, name: str = "value") -> float:
        wanted = ("histogram", "accuracy", trained, tested, against)
        keys = ("backbone", "metric", "trained_on", "tested_on", "against")
        (row,) = (row for row in rows if tuple(row[key] for key in keys) == wanted)
        return row[name]

    # Liver and spleen are exchanged in MR: of three organs one at most is left, of four pictures of CT two.
    assert value("CT", "CT") == value("MR", "MR") == 1
    assert value("CT", "MR") <= 1 / 3 + 1e-9 and value("MR", "CT") <= 1 / 2
    assert (
        value("CT", "MR", "trained on MR") == value("CT", "MR", "tested on CT") == pytest.approx(value("CT", "MR") - 1)
    )
    assert value("MR", "CT", "tested on MR") == pytest.approx(value("MR", "CT") - 1)
    assert (value("CT", "MR", name="n"), value("CT", "MR", name="train_n"), value("MR", "CT", name="n")) == (30, 40, 40)
    assert {row["status"] for row in rows} == {"ok"} and len({row["data_sha256"] for row in rows}) == 1

    cases = pq.read_table(tmp_path / NAME / "ours-across-modality-predictions.parquet").to_pylist()
    mine = [c for c in cases if (c["backbone"], c["trained_on"], c["tested_on"]) == ("histogram", "CT", "MR")]
    assert np.mean([c["predicted"] == c["target"] for c in mine]) == pytest.approx(value("CT", "MR"))
    page = (tmp_path / "report.html").read_text()
    assert "what is lost across" in page and f"ROC, reliability and confusion of {NAME}, CT to MR" in page
    assert f"right and wrong cases of {NAME}, MR to CT" in page

    # Features of the organs of CT were computed once for both tasks; nothing is scored again.
    assert run(study, tmp_path, f"--tasks={NAME},anatomy-ct", "--subgroups=patient_id") == 0
    assert capsys.readouterr().err.count("done before") == 2


def test_numbers_without_names_need_a_map_of_ones_own(study, tmp_path, capsys) -> None:
    data = tmp_path / "data"
    organs.write(data, names=False)
    assert run(study, tmp_path / "out", f"--tasks={NAME}", f"--data={data}") == 65
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["reason"].startswith(
        "the class map of this package finds 0 classes that anatomy-ct and anatomy-mri share"
    )
    assert (
        "anatomy-ct has 0, 1, 2, 3, 4 (numbers without names)" in row["reason"] and "--class-map=FILE" in row["reason"]
    )
    own = tmp_path / "map.csv"
    own.write_text("class,anatomy-ct,anatomy-mri\nliver,1,1\nlung,2;3,0\nspleen,0,2\n")
    read = opened(data, str(own))
    assert read.cases.classes == ("liver", "lung", "spleen")
    assert read.sha256 != opened(data).sha256
    named = opened(study / "data").cases.splits["test"]
    assert [name.replace("lung_left", "lung") for name in named.names.tolist()] == read.cases.splits[
        "test"
    ].names.tolist()


def test_task_without_one_part_is_not_run_in_a_suite(study, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/anatomy-ct").symlink_to(study / "data/anatomy-ct")
    assert run(study, tmp_path / "out", "--suite=curiabench", f"--data={tmp_path / 'data'}") == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    (row,) = (row for row in rows if row["task"] == NAME)
    assert row["status"] == "not_run" and "has no data of anatomy-mri; get it from: Hugging Face" in row["reason"]


@pytest.mark.long
def test_column_of_a_published_task_is_scored_across(study, tmp_path) -> None:
    splits = published.task(per_patient=1)
    for rows in splits.values():
        for number, row in enumerate(rows):
            row["scanner"] = "AB"[number // 2 % 2]
    published.write(tmp_path / "data/ich", splits)
    words = (f"--data={tmp_path / 'data'}", "--tasks=ich")
    assert run(study, tmp_path / "out", *words, "--across=scanner") == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {(row["trained_on"], row["tested_on"]) for row in rows} == {(a, b) for a in "AB" for b in "AB"}
    assert {row["n"] for row in rows} == {6} and {row["train_n"] for row in rows} == {18}
    assert run(study, tmp_path / "other", *words, "--across=ward") == 65
    (row,) = json.loads((tmp_path / "other/results.json").read_text())
    assert row["reason"] == "--across=ward: ich has no such column"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([f"--tasks={NAME}", "--across=scanner"], f"--across=scanner: {NAME} is across modality already"),
        (
            ["--tasks=anatomy-ct", "--across=modality", "--protocol=both"],
            "--across=modality has no place in the official",
        ),
        (
            ["--tasks=anatomy-ct", "--across=modality", "--subgroups=age"],
            "--across=modality and --subgroups=age do not go together",
        ),
        (["--suite=curiabench", "--across=modality"], "--across=modality and --suite=curiabench do not go together"),
        (["--tasks=anatomy-ct", "--class-map=x.csv"], f"--class-map=x.csv is for {NAME}, which is not among"),
        ([f"--tasks={NAME}", "--class-map=none.csv"], "--class-map=none.csv cannot be read (FileNotFoundError)"),
        (["--tasks=anatomy-ct", "--across=age:0"], "--across=age:0: write a column"),
    ],
)
def test_options_that_do_not_fit_are_refused(study, tmp_path, capsys, words: list[str], line: str) -> None:
    assert run(study, tmp_path, *words) == 2
    shown = capsys.readouterr().err
    assert f"error: {line}" in shown and shown.count("error:") == 1
