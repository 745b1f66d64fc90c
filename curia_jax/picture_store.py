"""Random access to the pictures of a task whose data is in the published schema.

Its tables have pictures as lists of numbers and are read from the first row to the last, where training wants any case at any
time. So a split is decoded once, to a folder with the pixels as they travel to the device. The folder holds images of patients: it
belongs where the data may be.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt16

from curia_common import logs
from curia_common.errors import DataError
from curia_jax.evaluate.task_data import MOST_SLICES, TaskImages
from data_pipeline.format.records import SliceFacts

_FORMAT = 1  # of the folder
_TABLE, _PIXELS, _MASKS = "table.npz", "pixels.bin", "masks.bin"
_BATCH = 64  # pictures decoded at a time

log = logs.get_logger(__name__)


class PictureStore:
    """The decoded pictures of a split, in the order of its rows; see data.Slices. Can be pickled; reads are thread-safe.

    Attributes:
      largest: greatest height and width of a picture, px.
      rows: number of the row that each picture is of.
      masked: whether each has a region.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with np.load(folder / _TABLE) as table:
                self.rows: Int64[np.ndarray, " n"] = table["rows"]
                self.masked = bool(table["masked"])
                self._sizes, self._facts, self._hu = table["sizes"], table["facts"], table["hu"]
            pixels = self._sizes.prod(axis=1)
            self._first = np.concatenate([[0], np.cumsum(pixels)])
            self._first_mask = np.concatenate([[0], np.cumsum(-(-pixels // 8))])
            for name, size in ((_PIXELS, 2 * self._first[-1]), (_MASKS, self._first_mask[-1] if self.masked else 0)):
                if (found := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the decoded images {folder} are damaged ({error}); delete the folder and rerun the same command"
            ) from error
        self.largest = int(self._sizes[:, 0].max()), int(self._sizes[:, 1].max())
        self._open()

    def _open(self) -> None:
        self._pixels = np.memmap(self._folder / _PIXELS, np.uint16, "r")
        self._masks = np.memmap(self._folder / _MASKS, np.uint8, "r") if self.masked else None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None, "_masks": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[SliceFacts]]:
        """Writes pictures to the top left of images, one each, with zeros right of them and below.

        Returns:
          Height and width of every picture, and its facts.
        """
        sizes, facts = [], []
        for number, image in zip(numbers, images, strict=True):
            height, width = map(int, self._sizes[number])
            image[:] = 0
            image[:height, :width] = self._pixels[self._first[number] : self._first[number + 1]].reshape(height, width)
            sizes.append((height, width))
            facts.append(SliceFacts(*map(float, self._facts[number]), hu=bool(self._hu[number])))
        return sizes, facts

    def masks_into(self, numbers: Sequence[int], masks: Float32[np.ndarray, "batch height width"]) -> None:
        """Writes the regions of pictures to the top left of masks, one each: 1 inside, with zeros elsewhere."""
        assert self._masks is not None
        for number, mask in zip(numbers, masks, strict=True):
            height, width = map(int, self._sizes[number])
            packed = self._masks[self._first_mask[number] : self._first_mask[number + 1]]
            mask[:] = 0
            mask[:height, :width] = np.unpackbits(packed, count=height * width).reshape(height, width)


def open_stores(splits: Sequence[TaskImages], cache: Path) -> list[PictureStore]:
    """The decoded pictures of splits, which are decoded where the cache does not have them yet: after all are looked through.

    Args:
      cache: folder of the decoded splits.

    Raises:
      DataError: a row cannot be used, or what was decoded before is damaged.
      OSError: the disk is full. In both cases nothing is left behind.
    """
    folders = [cache / f"{one.task.name}-{one.split}-{one.source_digest[:16]}-{_FORMAT}" for one in splits]
    missing = [(one, folder) for one, folder in zip(splits, folders, strict=True) if not folder.is_dir()]
    counts = [len(one.numbers) for one, _ in missing]
    for (one, folder), count in zip(missing, counts, strict=True):
        log.info(f"decoding {count:,} images of {one.task.name}, {one.split}")
        made = cache / f".{folder.name}-{secrets.token_hex(4)}"
        try:
            made.mkdir(parents=True)
            _write(one, made)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return [PictureStore(folder) for folder in folders]


def _write(images: TaskImages, folder: Path) -> None:
    rows, sizes, facts, hu = [], [], [], []
    with (folder / _PIXELS).open("wb") as pixels, (folder / _MASKS).open("wb") as masks:
        for batch in images.batches(images.numbers, _BATCH):
            for number in np.flatnonzero(batch.get("valid", np.ones(len(batch["slice"]), bool))):
                height, width = batch["extent"][number]
                pixels.write(np.ascontiguousarray(batch["pixels"][number, :height, :width]).tobytes())
                if "mask" in batch:
                    masks.write(np.packbits(batch["mask"][number, :height, :width] > 0).tobytes())
                rows.append(batch["slice"][number] // MOST_SLICES)
                sizes.append((height, width))
                facts.append([batch[name][number] for name in ("slope", "intercept", "low", "high")])
                hu.append(batch["hu"][number])
    np.savez(
        folder / _TABLE, rows=np.array(rows, np.int64), sizes=np.array(sizes, np.int64), facts=np.array(facts, np.float32),
        hu=np.array(hu, bool), masked=np.array(images.masked),
    )  # fmt: skip
