"""Images of tasks in the published schema: read as they are, refused with their row where they cannot be used."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError
from curia_jax.evaluate import tasks
from curia_jax.evaluate.pictures import MOST_SLICES, Picture, TaskPictures, chosen_slices, pooled
from curia_jax.evaluate.tasks import Task
from tests.evaluate import published
from tests.evaluate.test_task_data import MASKED, PLAIN, VOLUME, opened


def slices(pictures: TaskPictures) -> list[Picture]:
    return [one for part in pictures.parts for one in pictures.of_part(part)]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (PLAIN, {"image": np.zeros((1, 1))}, "row 7 of test has an image of 1x1 px, as upload makes of a missing file"),
        (PLAIN, {"image": np.full((24, 24), np.nan)}, "row 7 of test has pixels that are not finite"),
        (PLAIN, {"image": None}, "row 7 of test has no image"),
        (MASKED, {"mask": np.ones((24, 20))}, r"row 7 of test has a mask of shape \(24, 20\), but an image of shape \(24, 24\)"),
        (MASKED, {"mask": np.zeros((24, 24))}, "row 7 of test has an empty mask"),
        (MASKED, {"mask": None}, "row 7 of test has no mask"),
        (VOLUME, {}, r"row 0 of test has an image of shape \(24, 24\); the task takes \(rows, columns, slices\)"),
        (dataclasses.replace(PLAIN, modality=tasks.BOTH), {}, "test has no column modality"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used_are_refused_with_their_row(
    tmp_path, task: Task, changes: dict, message: str
) -> None:
    splits = published.task(masked=task.masked)
    splits["test"][7] |= changes
    with pytest.raises(DataError, match=message):
        slices(TaskPictures(task, opened(tmp_path, task, splits), "test"))


def test_units_of_a_row_come_from_its_modality(tmp_path) -> None:
    task = dataclasses.replace(PLAIN, modality=tasks.BOTH)
    splits = {s: [row | {"modality": m} for row in rows] for (s, rows), m in zip(published.task().items(), ("CT", "CT", "MR"), strict=True)}  # fmt: skip
    files = opened(tmp_path, task, splits)
    for split, hu in (("train", True), ("test", False)):
        assert {one.hu for one in slices(TaskPictures(task, files, split))} == {hu}


def test_chosen_slices_surround_the_middle_of_volume_or_mask() -> None:
    assert chosen_slices(7, None, 3) == [2, 3, 4]
    assert chosen_slices(2, None, 3) == [0, 1]
    assert chosen_slices(3, None, None) == [0, 1, 2]
    mask = np.zeros((2, 2, 9), bool)
    mask[0, 0, [5, 6, 7]] = True
    assert chosen_slices(9, mask, 1) == [6]
    assert chosen_slices(9, mask, 5) == [5, 6, 7]
    assert chosen_slices(9, mask, None) == [5, 6, 7]


def test_pooled_is_the_mean_over_the_slices_of_each_row() -> None:
    numbers = np.array([0, 1, 2, MOST_SLICES + 4, 3 * MOST_SLICES, 3 * MOST_SLICES + 9])
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    found = pooled(numbers, {"mean": values})["mean"]
    np.testing.assert_allclose(found, [values[:3].mean(0), values[3], values[4:].mean(0)])


def test_of_rows_gives_the_middle_slice_of_each_row_in_order(tmp_path) -> None:
    splits = published.task(slices=5)
    images = TaskPictures(VOLUME, opened(tmp_path, VOLUME, splits), "test")
    found = images.of_rows([7, 2])
    for picture, row in zip(found, (7, 2), strict=True):
        np.testing.assert_array_equal(picture.values, splits["test"][row]["image"][..., 2])
        assert picture.number == row * MOST_SLICES + 2 and picture.mask is None


def test_lines_of_different_length_are_refused_with_their_row(tmp_path) -> None:
    splits = published.task()
    splits["test"][4]["image"] = [[0.0] * 24] * 23 + [[0.0] * 20]
    with pytest.raises(DataError, match="row 4 of test has an image or mask whose lines differ in length"):
        slices(TaskPictures(PLAIN, opened(tmp_path, PLAIN, splits), "test"))


def test_missing_number_in_a_line_is_refused_with_its_row(tmp_path) -> None:
    splits = published.task()
    splits["test"][4]["image"] = [[0.0] * 23 + [None]] * 24
    with pytest.raises(DataError, match="row 4 of test has pixels that are not finite"):
        slices(TaskPictures(PLAIN, opened(tmp_path, PLAIN, splits), "test"))


@pytest.mark.parametrize("saved", ["parquet", "arrow"])
def test_images_of_several_files_and_parts_are_read_as_they_are(tmp_path, saved: str) -> None:
    rows = published.rows("train", slices=5, masked=True)
    for row in rows[::2]:
        row["image"], row["mask"] = row["image"][:20, :22], row["mask"][:20, :22]
        row["mask"][10, 10] = 1
    task = dataclasses.replace(VOLUME, form=tasks.MASKED_VOLUME)
    files = opened(tmp_path, task, {"train": rows, "test": rows[:13]})
    (first,) = files.by_split["test"]
    second = first.with_name("test-00001-of-00002.parquet")
    pq.write_table(pq.read_table(files.by_split["train"][0]).slice(13), second, row_group_size=3)
    found = [first, second]
    if saved == "arrow":
        for number, path in enumerate(found):
            table = pq.read_table(path)
            found[number] = path.with_suffix(".arrow")
            with pa.ipc.new_stream(str(found[number]), table.schema) as file:
                file.write_table(table, max_chunksize=4)
    files = dataclasses.replace(files, by_split={**files.by_split, "test": tuple(found)})
    pictures = TaskPictures(task, files, "test")
    read = slices(pictures)
    assert [one.number for one in read] == [row * MOST_SLICES + n for row in range(24) for n in (1, 2, 3)]
    for one in read:
        row, number = divmod(one.number, MOST_SLICES)
        np.testing.assert_array_equal(one.values, rows[row]["image"][..., number])
        np.testing.assert_array_equal(one.mask, rows[row]["mask"][..., number] > 0)
        assert one.depth == 5 and one.values.dtype == np.float32
    assert [one.number for one in pictures.of_rows([20, 3])] == [20 * MOST_SLICES + 2, 3 * MOST_SLICES + 2]
