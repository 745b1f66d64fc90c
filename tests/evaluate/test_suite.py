"""Tasks of CuriaBench, and one of one's own, through the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import tasks
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint

OWN = """
from curia_jax.evaluate.tasks import IMAGE, MR, Task

TASK = Task(
    name="contrast", title="contrast agent", origin="our hospital", licence="ours", access="the archive",
    modality=MR, form=IMAGE, classes=2,
)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with run/ and data/, which has an image task, a masked one with several slices per series, a masked volume."""
    folder = tmp_path_factory.mktemp("suite")
    save_checkpoint(folder / "run")
    data = folder / "data"
    published.write(data / "ich", published.task())
    published.write(data / "kits", published.task(masked=True))
    for split in published.SPLITS:
        rows = published.rows(split, masked=True, per_patient=3)
        for n, row in enumerate(rows):
            row["series_id"] = f"{split} {n // 3}"
            del row["patient"]
        published.write(data / "kits", {split: rows})
    published.write(data / "luna16-3D", published.task(slices=4, masked=True, seed=2))
    published.write(data / "contrast", published.task(seed=3))
    return folder


def run(study: Path, output: Path, *words: str) -> int:
    words = ("--floors=pixels,histogram", "--heads=ridge", "--features=mean", *words)
    return evaluate.main([f"--data={study / 'data'}", f"--backbones={study / 'run'}", f"--output={output}", *words])


def read(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())


@pytest.mark.long
def test_suite_scores_tasks_with_data_and_says_why_the_others_are_not_run(study, tmp_path, capsys) -> None:
    assert run(study, tmp_path, "--suite=curiabench") == 0
    rows = read(tmp_path)
    assert {row["task"] for row in rows} == {task.name for task in tasks.CURIABENCH}
    by_status = {
        status: {row["task"] for row in rows if row["status"] == status} for status in ("ok", "not_run", "failed")
    }
    assert by_status["ok"] == {"ich", "kits", "luna16-3D"} and not by_status["failed"]
    reasons = {row["task"]: row["reason"] for row in rows if row["status"] == "not_run"}
    assert "dense features" in reasons["registration"]
    assert reasons["tcia-survival"] == "its target is a time to an event, which cox can learn; name one in --heads"
    assert "has no data of oasis; get it from: Hugging Face: raidium/CuriaBench, config oasis" in reasons["oasis"]

    def auroc(task: str, backbone: str) -> dict:
        wanted = (task, backbone, "auroc", None)
        return next(r for r in rows if (r["task"], r["backbone"], r["metric"], r["against"]) == wanted)

    # What tells the classes is how bright the region is: the histogram sees it where it looks inside the mask.
    for task in ("ich", "kits", "luna16-3D"):
        assert auroc(task, "histogram")["value"] == 1
        assert auroc(task, str(study / "run"))["data_sha256"] == auroc(task, "pixels")["data_sha256"]
    assert (auroc("ich", "pixels")["n"], auroc("ich", "pixels")["patients"]) == (12, 6)
    kits = auroc("kits", "pixels")
    assert (kits["n"], kits["unit"], kits["groups"]) == (4, "series", "series (patients unknown)")
    assert auroc("luna16-3D", "pixels")["n"] == 12
    # The report shows cases of every task.
    page = (tmp_path / "report.html").read_text()
    assert all(f'alt="right and wrong cases of {task}"' in page for task in ("ich", "kits", "luna16-3D"))
    assert "done before" not in capsys.readouterr().err

    before = (tmp_path / "results.json").read_bytes()
    assert run(study, tmp_path, "--suite=curiabench") == 0
    assert capsys.readouterr().err.count("done before") == 3 and (tmp_path / "results.json").read_bytes() == before


def test_task_of_ones_own_is_a_file_of_ten_lines(study, tmp_path) -> None:
    (tmp_path / "contrast.py").write_text(OWN)
    assert len(OWN.splitlines()) <= 10
    assert run(study, tmp_path / "out", f"--tasks={tmp_path / 'contrast.py'}") == 0
    rows = read(tmp_path / "out")
    assert {(row["task"], row["status"]) for row in rows} == {("contrast", "ok")}
    found = next(r for r in rows if (r["backbone"], r["metric"], r["against"]) == ("pixels", "auroc", None))
    assert found["n"] == 12 and found["events"] == 6


@pytest.mark.long
def test_age_and_survival_are_scored_against_their_floors(study, tmp_path) -> None:
    data = tmp_path / "data"
    # MR is shown between percentiles: a quarter of the image is brighter, not all of it.
    ages, survival = published.task(masked=True), published.task(masked=True)
    for split in published.SPLITS:
        for n, (age, case) in enumerate(zip(ages[split], survival[split], strict=True)):
            bright = age["target"]  # the class that the image shows
            age["target"] = 30.0 + 20 * bright + n % 3
            case.update(target=2.0 + 20 * (1 - bright) + n % 3, event=int(n % 4 > 0))
            case.update(age=60 + (n * 7) % 20, sex="fm"[n % 2], stage=1 + n % 4)
    published.write(data / "ixi", ages)
    published.write(data / "tcia-survival", survival)
    words = (f"--data={data}", "--tasks=ixi,tcia-survival", "--heads=knn,ridge,logistic,cox")
    assert run(study, tmp_path / "out", *words) == 0
    rows = read(tmp_path / "out")
    assert all(row["status"] == "ok" for row in rows)

    def value(task: str, backbone: str, metric: str, head: str) -> float:
        wanted = (task, backbone, metric, head, None)
        (found,) = (r for r in rows if (r["task"], r["backbone"], r["metric"], r["head"], r["against"]) == wanted)
        return found["value"]

    # Brightness tells 20 years apart and one year not at all; the floor is the mean of the training cases.
    assert value("ixi", "histogram", "rmse", "ridge") < 1.5 < 9 < value("ixi", "majority", "rmse", "none")
    assert {row["head"] for row in rows if row["task"] == "ixi"} == {"knn", "ridge", "none"}
    assert value("tcia-survival", "histogram", "c_index", "cox") > 0.8
    assert value("tcia-survival", "majority", "c_index", "none") == 0.5
    clinical = next(r for r in rows if r["backbone"] == "clinical" and r["against"] is None)
    assert (clinical["head"], clinical["features"], clinical["events"]) == ("cox", "age+sex+stage", 9)
    assert any(row["against"] == "clinical" for row in rows)
    assert "clinical variables" in (tmp_path / "out" / "report.html").read_text()


def test_damaged_task_is_a_row_and_the_others_finish(study, tmp_path) -> None:
    data = tmp_path / "data"
    splits = published.task()
    splits["val"][4]["image"] = np.zeros((1, 1), np.float32)
    published.write(data / "ich", splits)
    published.write(data / "covidx-ct", published.task())
    words = (f"--data={data}", "--tasks=ich,covidx-ct,oasis")
    assert run(study, tmp_path / "out", *words) == 65
    rows = read(tmp_path / "out")
    failed = {row["task"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed["ich"].startswith("ich: row 4 of validation has an image of 1x1 px")
    assert "has no data of oasis" in failed["oasis"]
    assert {row["task"] for row in rows if row["status"] == "ok"} == {"covidx-ct"}


def test_list_shows_the_19_tasks_and_where_their_data_comes_from(capsys) -> None:
    assert evaluate.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert len(tasks.CURIABENCH) == 19 and len({task.name for task in tasks.CURIABENCH}) == 19
    assert all(task.name in shown and task.origin in shown and task.licence in shown for task in tasks.CURIABENCH)
    assert "linear, 1500 epochs, rate 0.002, batch 64" in shown and "raidium/CuriaBench, config kneeMRI" in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks=ihc"], "error: no task 'ihc'; --list shows those of CuriaBench"),
        (["--tasks=none.py"], "error: no file none.py; a task of your own is a Python file that sets TASK"),
        ([], "error: nothing to score; give --tasks=TASK,… or --suite=curiabench"),
        (["--tasks=ich", "--data=nowhere"], "error: --data=nowhere is not a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(study, tmp_path, capsys, words: list[str], line: str) -> None:
    assert run(study, tmp_path, *words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_file_without_a_task_is_refused(study, tmp_path, capsys) -> None:
    (tmp_path / "empty.py").write_text("TASK = 3\n")
    assert run(study, tmp_path / "out", f"--tasks={tmp_path / 'empty.py'}") == 2
    assert "sets no TASK of type curia_jax.evaluate.tasks.Task" in capsys.readouterr().err


def test_missing_options_are_named(tmp_path, capsys) -> None:
    assert evaluate.main([f"--data={tmp_path}", "--tasks=ich", f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == "error: --backbones is missing; see --help\n"
