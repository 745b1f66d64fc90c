"""Decoded pictures of a task: what its tables hold, any picture at any time."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curia_common.errors import DataError
from curia_jax import data
from curia_jax.evaluate import tasks
from curia_jax.evaluate.picture_store import PictureStore, open_store
from curia_jax.evaluate.pictures import MOST_SLICES, TaskPictures
from curia_jax.evaluate.task_data import find
from curia_jax.evaluate.tasks import Task
from tests.evaluate import published
from tests.evaluate.test_task_data import MASKED, PLAIN, VOLUME, opened


def images(folder: Path, name: str, split: str = "train") -> TaskPictures:
    files = find(folder, name)
    assert files is not None
    return TaskPictures(tasks.find(name), files, split)


def batches(store: PictureStore, numbers: np.ndarray, size: int) -> list[Any]:
    return list(store.batches(numbers, size))


def values(batch: Any, row: int) -> np.ndarray:
    height, width = batch["extent"][row]
    return batch["pixels"][row, :height, :width] * np.float64(batch["slope"][row]) + batch["intercept"][row]


def real(store: PictureStore, numbers: list[int]) -> np.ndarray:
    """Real values on a canvas of 26 x 28 px, which are 0 in stored values outside."""
    pixels = np.ones((len(numbers), 26, 28), np.uint16)
    sizes, facts = store.read_into(numbers, pixels)
    assert set(sizes) == {(24, 24)}
    assert not pixels[:, 24:].any() and not pixels[:, :, 24:].any()
    return np.stack([one * fact.slope + fact.intercept for one, fact in zip(pixels, facts, strict=True)])[:, :24, :24]


def test_store_gives_the_pictures_of_the_table_in_any_order(tmp_path: Path) -> None:
    rows = published.task(slices=4, masked=True)
    published.write(tmp_path / "luna16-3D", rows)
    store = open_store(images(tmp_path, "luna16-3D"), tmp_path / "cache")
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
    open_store(images(tmp_path, "ich"), tmp_path / "cache")
    (before,) = (tmp_path / "cache").iterdir()
    time = (before / "pixels.bin").stat().st_mtime_ns
    open_store(images(tmp_path, "ich"), tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [before.name]
    assert (before / "pixels.bin").stat().st_mtime_ns == time
    published.write(tmp_path / "ich", published.task(seed=1))
    open_store(images(tmp_path, "ich"), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_row_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = published.task(masked=True)
    rows["train"][5]["mask"] = None
    published.write(tmp_path / "kits", rows)
    with pytest.raises(DataError, match="kits: row 5 of train has no mask, and the task is about what is inside"):
        open_store(images(tmp_path, "kits"), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_damaged_store_is_named_with_its_remedy(tmp_path: Path) -> None:
    published.write(tmp_path / "ich", published.task())
    open_store(images(tmp_path, "ich"), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "pixels.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="pixels.bin has 2 bytes instead of 27,648.; delete the folder and rerun"):
        open_store(images(tmp_path, "ich"), tmp_path / "cache")


def test_fingerprint_follows_images_and_masks_but_not_targets(tmp_path) -> None:
    def fingerprint(name: str, task: Task = MASKED) -> str:
        pictures = TaskPictures(task, opened(tmp_path / name, task, splits), "test")
        return open_store(pictures, tmp_path / "decoded").fingerprint

    splits = published.task(masked=True)
    first = fingerprint("a")
    for row in splits["test"]:
        row["target"], row["age"] = 1 - row["target"], 50
    splits["train"][0]["image"][0, 0] += 1  # of another split
    assert fingerprint("targets") == first
    found = {first, fingerprint("units", dataclasses.replace(MASKED, modality=tasks.MR))}
    splits["test"][3]["mask"][np.argmin(splits["test"][3]["mask"][:, 0]), 0] = 1
    found.add(fingerprint("mask"))
    splits["test"][3]["image"][5, 5] += 1
    found.add(fingerprint("pixel"))
    splits["test"] = [splits["test"][1], splits["test"][0], *splits["test"][2:]]
    found.add(fingerprint("order"))
    assert len(found) == 5


def test_whole_numbers_are_exact_and_others_within_their_16_bits(tmp_path) -> None:
    splits = published.task()
    rng = np.random.default_rng(0)
    whole = rng.integers(-1024, 3071, (24, 24)).astype(np.float32)
    fine = rng.normal(0, 1, (20, 22)).astype(np.float32)
    splits["test"][0]["image"], splits["test"][1]["image"] = whole, fine
    images = open_store(TaskPictures(PLAIN, opened(tmp_path, PLAIN, splits), "test"), tmp_path / "decoded")
    (batch,) = batches(images, images.numbers[:2], 4)
    assert batch["valid"].tolist() == [True, True, False, False] and batch["hu"].all() and "mask" not in batch
    np.testing.assert_array_equal(values(batch, 0), whole)
    np.testing.assert_allclose(values(batch, 1), fine, atol=float(np.ptp(fine)) / 131070 * 1.01)
    # Values of the slice, as in shards: of 440 in order, those of ranks ceil(0.005 * 440) = 3 and ceil(0.995 * 440) = 438.
    in_order = np.sort(fine, axis=None)
    assert [batch["low"][1], batch["high"][1]] == [in_order[2], in_order[437]]


def test_batches_hold_the_wanted_slices_of_volumes_with_their_masks(tmp_path) -> None:
    task = dataclasses.replace(VOLUME, form=tasks.MASKED_VOLUME)
    splits = published.task(slices=5, masked=True)
    image, mask = splits["test"][2]["image"], splits["test"][2]["mask"]
    mask[:, :, :3] = 0  # slices 3 and 4 are left: the middle is 4, and 5 does not exist
    images = open_store(TaskPictures(task, opened(tmp_path, task, splits), "test"), tmp_path / "decoded")
    row = [number % MOST_SLICES for number in images.numbers if number // MOST_SLICES == 2]
    assert row == [3, 4]
    wanted = images.numbers[np.isin(images.numbers // MOST_SLICES, (2, 5))]
    found = batches(images, wanted, 2)
    assert np.concatenate([batch["slice"][batch["valid"]] for batch in found]).tolist() == wanted.tolist()
    assert not found[0]["hu"].any()
    scale = float(np.ptp(image)) / 131070 * 1.01
    np.testing.assert_allclose(values(found[0], 0), image[:, :, 3], atol=scale)
    np.testing.assert_array_equal(found[0]["mask"][0], mask[:, :, 3])


@pytest.mark.parametrize("shape", [(2, 2), (24, 24), (20, 50), (16, 200)])
def test_percentiles_are_those_of_the_values(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    splits = published.task()
    splits["train"][0]["image"] = rng.integers(-3024, 30000, shape).astype(np.float32)
    splits["train"][1]["image"] = rng.normal(0, 1e6, shape).astype(np.float32)
    splits["train"][2]["image"] = np.full(shape, 7.25, np.float32)
    published.write(tmp_path / "ich", splits)
    store = open_store(images(tmp_path, "ich"), tmp_path / "cache")
    (batch,) = batches(store, store.numbers[:3], 3)
    for row in range(3):
        wanted = np.percentile(splits["train"][row]["image"], (0.5, 99.5), method="inverted_cdf")
        np.testing.assert_array_equal([batch["low"][row], batch["high"][row]], wanted)


def test_store_does_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write(tmp_path / "kits", published.task(masked=True))
    stores = []
    for threads in (1, 4):
        monkeypatch.setattr(data, "READERS", threads)
        stores.append(open_store(images(tmp_path, "kits"), tmp_path / f"cache{threads}"))
    one, many = stores
    assert one.fingerprint == many.fingerprint
    for first, second in zip(batches(one, one.numbers, 7), batches(many, many.numbers, 7), strict=True):
        assert set(first) == set(second) and "mask" in first
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])
