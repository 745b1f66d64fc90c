"""Data of tasks in the published schema: the files are found, and cases checked row by row."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import task_data, tasks
from curia_jax.evaluate.targets import Times
from curia_jax.evaluate.tasks import Task
from tests.evaluate import published

PLAIN = Task("ich", "", "", "", "", tasks.CT, tasks.IMAGE, classes=2)
MASKED = dataclasses.replace(PLAIN, form=tasks.MASKED_IMAGE)
VOLUME = dataclasses.replace(PLAIN, form=tasks.VOLUME, slices=3, modality=tasks.MR)


def opened(folder, task: Task, splits) -> task_data.Files:
    published.write(folder / task.name, splits)
    files = task_data.find(folder, task.name)
    assert files is not None
    return files


# ---- files


@pytest.mark.parametrize("layout", ["names", "readme", "readme of all", "saved by datasets"])
def test_files_are_found_in_every_layout(tmp_path, layout: str) -> None:
    published.write(tmp_path / "ich", published.task())
    config = "  data_files:\n" + "".join(
        f"  - split: {s}\n    path: {{0}}{s}-*.parquet\n" for s in ("train", "val", "test")
    )
    if layout == "readme":
        (tmp_path / "ich/README.md").write_text("---\nconfigs:\n- config_name: default\n" + config.format("") + "---\n")
    if layout == "readme of all":
        other = "- config_name: kits\n  data_files:\n  - split: train\n    path: none.parquet\n"
        text = "---\nconfigs:\n" + other + "- config_name: ich\n" + config.format("ich/") + "---\n"
        (tmp_path / "README.md").write_text(text)
    if layout == "saved by datasets":
        for split in ("train", "val", "test"):
            (parquet,) = (tmp_path / "ich").glob(f"{split}-*")
            (tmp_path / "ich" / split).mkdir()
            table = pq.read_table(parquet)
            with pa.ipc.new_stream(str(tmp_path / "ich" / split / "data-00000-of-00001.arrow"), table.schema) as file:
                file.write_table(table)
            parquet.unlink()
    files = task_data.find(tmp_path, "ich")
    assert files is not None and set(files.by_split) == {"train", "validation", "test"}
    cases = task_data.read_cases(PLAIN, files)
    assert cases.classes == ("0", "1") and cases.groups == "patients"
    assert [len(cases.splits[split].slices) for split in ("train", "validation", "test")] == [24, 12, 12]
    assert [part.rows for part in task_data.parts(files.by_split["test"])] == [5, 5, 2]
    assert files.sha256 != dataclasses.replace(files, sha256="").sha256


def test_missing_folder_is_none_and_missing_split_is_named(tmp_path) -> None:
    assert task_data.find(tmp_path, "ich") is None
    rows = published.task()
    published.write(tmp_path / "ich", {"train": rows["train"], "val": rows["val"]})
    with pytest.raises(DataError, match="ich has no files of the split 'test'; there are: train, validation"):
        task_data.find(tmp_path, "ich")


def test_digest_changes_with_a_target(tmp_path) -> None:
    splits = published.task()
    first = opened(tmp_path / "a", PLAIN, splits)
    assert opened(tmp_path / "b", PLAIN, splits).sha256 == first.sha256
    splits["test"][0]["target"] = 1 - splits["test"][0]["target"]
    assert opened(tmp_path / "c", PLAIN, splits).sha256 != first.sha256


# ---- cases


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": float("nan")}, "the target of row 7 of test is nan, which is not a class"),
        ({"target": None}, "the target of row 7 of test is None, which is not a class"),
        ({"target": 5.0}, "row 7 of test is of class '5', which no row of train has"),
        ({"patient": "train 3"}, "row 7 of test is of the same patient as row 6 of train; split by patient"),
    ],
)
def test_cases_that_give_wrong_figures_are_refused(tmp_path, changes: dict, message: str) -> None:
    splits = {
        split: [row | {"target": float(row["target"])} for row in rows] for split, rows in published.task().items()
    }
    splits["test"][7] |= changes
    with pytest.raises(DataError, match=message):
        task_data.read_cases(PLAIN, opened(tmp_path, PLAIN, splits))


def test_single_class_is_refused_with_the_reason(tmp_path) -> None:
    splits = {split: [row | {"target": 1} for row in rows] for split, rows in published.task().items()}
    with pytest.raises(UserError, match="ich cannot be scored: every labelled slice of the test split is of class '1'"):
        task_data.read_cases(PLAIN, opened(tmp_path, PLAIN, splits))


def test_series_and_files_stand_for_unknown_patients(tmp_path) -> None:
    for column, groups in (("series_id", "series (patients unknown)"), ("filename", "files (patients unknown)")):
        splits = {
            split: [{**row, column: f"{split} {n // 3}", "patient": None} for n, row in enumerate(rows)]
            for split, rows in published.task(per_patient=3).items()
        }
        for rows in splits.values():
            for row in rows:
                del row["patient"]
        cases = task_data.read_cases(PLAIN, opened(tmp_path / column, PLAIN, splits))
        assert cases.groups == groups and len(set(cases.splits["test"].patients.tolist())) == 4


# ---- values and times

AGE = Task("ixi", "", "", "", "", tasks.MR, tasks.IMAGE, target=tasks.VALUE)
SURVIVAL = Task("tcia", "", "", "", "", tasks.CT, tasks.IMAGE, target=tasks.TIME, clinical=("age", "stage"))


def survival() -> dict[str, list[dict[str, Any]]]:
    """Months, every third a censored one; age is missing in row 1 of each split, and the test has a stage of its own."""
    splits = published.task()
    for split, rows in splits.items():
        for n, row in enumerate(rows):
            age, stage = None if n == 1 else 50.0 + n, "IV" if split == "test" and n == 0 else ("I", "II")[n % 2]
            row.update(target=1.5 * (n + 1), event=int(n % 3 > 0), age=age, stage=stage)
    return splits


def test_values_are_read_as_numbers(tmp_path) -> None:
    splits = published.task()
    for rows in splits.values():
        for n, row in enumerate(rows):
            row["target"] = 20.25 + n
    cases = task_data.read_cases(AGE, opened(tmp_path, AGE, splits))
    assert cases.is_value and cases.classes == () and cases.groups == "patients"
    np.testing.assert_array_equal(cases.targets("test"), 20.25 + np.arange(12))


def test_times_have_their_events_and_clinical_columns(tmp_path) -> None:
    files = opened(tmp_path, SURVIVAL, survival())
    cases = task_data.read_cases(SURVIVAL, files)
    times = cases.targets("test")
    assert cases.is_time and isinstance(times, Times)
    assert times.time.tolist() == [1.5 * (n + 1) for n in range(12)]
    assert times.event.tolist() == [n % 3 > 0 for n in range(12)]
    found = task_data.clinical(SURVIVAL, files)
    ages = [50.0 + n for n in range(24) if n != 1]
    # A missing age is the mean of the training split; a stage that training lacks is none of its stages.
    np.testing.assert_allclose(found["train"][:3], [[50, 1, 0], [np.mean(ages), 0, 1], [52, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["test"][0], [50, 0, 0])
    assert {split: len(rows) for split, rows in found.items()} == {"train": 24, "validation": 12, "test": 12}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": 0.0}, "the target of row 2 of test is 0.0, which is not a time above 0"),
        ({"target": None}, "the target of row 2 of test is None, which is not a time above 0"),
        ({"event": 2}, "column event of row 2 of test is 2; it has to be 0 or 1"),
        ({"event": None}, "column event of row 2 of test is None; it has to be 0 or 1"),
    ],
)
def test_time_or_event_that_is_none_is_refused(change: dict[str, Any], words: str, tmp_path) -> None:
    splits = survival()
    splits["test"][2].update(change)
    with pytest.raises(DataError, match=words):
        task_data.read_cases(SURVIVAL, opened(tmp_path, SURVIVAL, splits))


def test_missing_columns_of_survival_are_named(tmp_path) -> None:
    splits = survival()
    for rows in splits.values():
        for row in rows:
            del row["event"]
            del row["stage"]
    files = opened(tmp_path, SURVIVAL, splits)
    with pytest.raises(DataError, match="has no column event, 1 where the event was seen"):
        task_data.read_cases(SURVIVAL, files)
    with pytest.raises(DataError, match="has no column stage, which the clinical floor needs"):
        task_data.clinical(SURVIVAL, files)


def test_value_that_is_no_number_is_refused(tmp_path) -> None:
    splits = published.task()
    for rows in splits.values():
        for n, row in enumerate(rows):
            row["target"] = 30.0 + n
    splits["train"][3]["target"] = float("nan")
    with pytest.raises(DataError, match="the target of row 3 of train is nan, which is not a number"):
        task_data.read_cases(AGE, opened(tmp_path, AGE, splits))
