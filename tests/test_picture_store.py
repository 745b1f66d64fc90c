"""Decoded pictures of a task: what its tables hold, any picture at any time."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from curia_common.errors import DataError
from curia_jax import picture_store
from curia_jax.evaluate import tasks
from curia_jax.evaluate.task_data import TaskImages, find
from tests.evaluate import published


def images(folder: Path, name: str, split: str = "train") -> TaskImages:
    files = find(folder, name)
    assert files is not None
    return TaskImages(tasks.find(name), files, split)


def real(store: picture_store.PictureStore, numbers: list[int]) -> np.ndarray:
    """Real values on a canvas of 26 x 28 px, which are 0 in stored values outside."""
    pixels = np.ones((len(numbers), 26, 28), np.uint16)
    sizes, facts = store.read_into(numbers, pixels)
    assert set(sizes) == {(24, 24)}
    assert not pixels[:, 24:].any() and not pixels[:, :, 24:].any()
    return np.stack([one * fact.slope + fact.intercept for one, fact in zip(pixels, facts, strict=True)])[:, :24, :24]


def test_store_gives_the_pictures_of_the_table_in_any_order(tmp_path: Path) -> None:
    rows = published.task(slices=4, masked=True)
    published.write(tmp_path / "luna16-3D", rows)
    (store,) = picture_store.open_stores([images(tmp_path, "luna16-3D")], tmp_path / "cache")
    # Three slices around the middle of those that the mask reaches, which are all four.
    assert len(store) == 3 * 24 and store.largest == (24, 24) and store.masked
    np.testing.assert_array_equal(store.rows, np.repeat(np.arange(24), 3))
    found = real(store, [70, 1])
    for values, (row, number) in zip(found, [(23, 2), (0, 2)], strict=True):
        wanted = rows["train"][row]["image"][:, :, number]
        np.testing.assert_allclose(values, wanted, atol=(wanted.max() - wanted.min()) / 65535)
    masks = np.full((2, 26, 28), 7, np.float32)
    store.masks_into([70, 1], masks)
    np.testing.assert_array_equal(masks[0, :24, :24], rows["train"][23]["mask"][:, :, 2])
    assert not masks[:, 24:].any() and not masks[:, :, 24:].any()
    np.testing.assert_array_equal(real(pickle.loads(pickle.dumps(store)), [70, 1]), found)


def test_decoded_images_are_used_again_and_those_of_other_data_are_not(tmp_path: Path) -> None:
    published.write(tmp_path / "ich", published.task())
    picture_store.open_stores([images(tmp_path, "ich")], tmp_path / "cache")
    (before,) = (tmp_path / "cache").iterdir()
    time = (before / "pixels.bin").stat().st_mtime_ns
    picture_store.open_stores([images(tmp_path, "ich")], tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [before.name]
    assert (before / "pixels.bin").stat().st_mtime_ns == time
    published.write(tmp_path / "ich", published.task(seed=1))
    picture_store.open_stores([images(tmp_path, "ich")], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_row_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = published.task(masked=True)
    rows["train"][5]["mask"] = None
    published.write(tmp_path / "kits", rows)
    with pytest.raises(DataError, match="kits: row 5 of train has no mask, and the task is about what is inside"):
        picture_store.open_stores([images(tmp_path, "kits")], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_damaged_store_is_named_with_its_remedy(tmp_path: Path) -> None:
    published.write(tmp_path / "ich", published.task())
    picture_store.open_stores([images(tmp_path, "ich")], tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "pixels.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="pixels.bin has 2 bytes instead of 27,648.; delete the folder and rerun"):
        picture_store.open_stores([images(tmp_path, "ich")], tmp_path / "cache")
