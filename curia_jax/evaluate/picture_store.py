"""Random access to the pictures of a task whose data is in the published schema.

Its tables have pictures as lists of numbers and are read from the first row to the last, which takes longer than an accelerator
needs for their features. So a split is decoded once, to a folder with the pixels as they travel to the device: every backbone,
protocol and fine-tuning reads that. The folder holds images of patients: it belongs where the data may be.
"""

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64, Shaped, UInt16

from curia_common import logs
from curia_common.errors import DataError
from curia_common.progress import Progress
from curia_jax import data
from curia_jax.evaluate.pictures import MOST_SLICES, TaskPictures
from curia_jax.evaluate.task_data import Part
from data_pipeline.format.records import SliceFacts

_FORMAT = 2  # of the folder
_TABLE, _PIXELS, _MASKS = "table.npz", "pixels.bin", "masks.bin"
_LEVELS = 65535  # of 16 bits

log = logs.get_logger(__name__)


class PictureStore:
    """The decoded pictures of a split, in the order of its rows; see data.Slices and features.Images. Can be pickled; reads are
    thread-safe.

    Attributes:
      split: its name.
      fingerprint: of the pixels, the units and the masks, and not of what else the files hold: features do not depend on targets.
      largest: greatest height and width of a picture, px.
      numbers: of the pictures, see `Picture`.
      depths: how many slices the volume of each has.
      masked: whether each has a region.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self.split = folder, split
        try:
            with np.load(folder / _TABLE) as table:
                self.numbers: Int64[np.ndarray, " n"] = table["numbers"]
                self.depths: Int64[np.ndarray, " n"] = table["depths"]
                self.fingerprint = str(table["fingerprint"])
                self.masked = bool(table["masked"])
                self._sizes, self._facts, self._hu = table["sizes"], table["facts"], table["hu"]
                self._first, self._first_mask = table["first"], table["first_mask"]
            areas = self._sizes.prod(axis=1)
            for name, size in ((_PIXELS, 2 * areas.sum()), (_MASKS, -(-areas // 8).sum() if self.masked else 0)):
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
        return len(self.numbers)

    @property
    def rows(self) -> Int64[np.ndarray, " n"]:
        """Number of the row that each picture is of."""
        return self.numbers // MOST_SLICES

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[SliceFacts]]:
        """Writes pictures to the top left of images, one each, with zeros right of them and below.

        Args:
          numbers: places in the store, from 0.

        Returns:
          Height and width of every picture, and its facts.
        """
        sizes, facts = [], []
        for number, image in zip(numbers, images, strict=True):
            height, width = map(int, self._sizes[number])
            first = self._first[number]
            _fill(image, self._pixels[first : first + height * width].reshape(height, width))
            sizes.append((height, width))
            facts.append(SliceFacts(*map(float, self._facts[number]), hu=bool(self._hu[number])))
        return sizes, facts

    def masks_into(self, numbers: Sequence[int], masks: Shaped[np.ndarray, "batch height width"]) -> None:
        """Writes the regions of pictures to the top left of masks, one each: 1 inside, with zeros elsewhere."""
        assert self._masks is not None
        for number, mask in zip(numbers, masks, strict=True):
            height, width = map(int, self._sizes[number])
            first = self._first_mask[number]
            packed = self._masks[first : first - (-height * width // 8)]
            _fill(mask, np.unpackbits(packed, count=height * width).reshape(height, width))

    def batches(self, numbers: Int[np.ndarray, " n"], batch_size: int) -> Iterator[data.HostBatch]:
        """As `features.Images` says; with the field `mask` where the task has masks."""
        places = np.searchsorted(self.numbers, numbers)
        masks = self.masks_into if self.masked else None
        for batch in data.evaluation_batches(self, places, batch_size=batch_size, canvas=self.largest, masks=masks):
            yield {**batch, "slice": self.numbers[batch["slice"]]}


def _fill(canvas: Shaped[np.ndarray, "height width"], image: Shaped[np.ndarray, "rows columns"]) -> None:
    """Writes an image to the top left of a canvas, and zeros to the rest."""
    rows, columns = image.shape
    canvas[:rows, :columns] = image
    canvas[rows:], canvas[:rows, columns:] = 0, 0


def open_store(pictures: TaskPictures, cache: Path) -> PictureStore:
    """The decoded pictures of a split, which is decoded where the cache does not have it yet.

    Args:
      cache: folder of the decoded splits.

    Raises:
      DataError: a row cannot be used, or what was decoded before is damaged.
      OSError: the disk is full. In both cases nothing is left behind.
    """
    folder = cache / f"{pictures.task.name}-{pictures.split}-{pictures.source_digest[:16]}-{_FORMAT}"
    if not folder.is_dir():
        log.info(f"decoding the images of {pictures.task.name}, {pictures.split}")
        made = cache / f".{folder.name}-{secrets.token_hex(4)}"
        try:
            made.mkdir(parents=True)
            _write(pictures, made)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return PictureStore(folder, pictures.split)


class _Entry(NamedTuple):
    """A picture in the store; `first` and `first_mask` are where its pixels begin, and the bytes of its mask."""

    number: int
    depth: int
    size: tuple[int, int]
    facts: tuple[float, float, float, float]
    hu: bool
    first: int
    first_mask: int
    digest: bytes


def _write(pictures: TaskPictures, folder: Path) -> None:
    lock = threading.Lock()
    with (folder / _PIXELS).open("wb") as pixels, (folder / _MASKS).open("wb") as masks:

        def decode(part: Part) -> list[_Entry]:
            found = []
            for picture in pictures.of_part(part):
                stored, facts = _stored(picture.values)
                mask = b"" if picture.mask is None else np.packbits(picture.mask).tobytes()
                digest = hashlib.blake2b(stored.data, digest_size=16)
                digest.update(mask)
                digest.update(f"{picture.number} {stored.shape} {facts} {picture.hu}".encode())
                with lock:  # parts are read side by side: their pictures may come in any order
                    first, first_mask = pixels.tell() // 2, masks.tell()
                    pixels.write(stored.data)
                    masks.write(mask)
                found.append(
                    _Entry(
                        picture.number,
                        picture.depth,
                        stored.shape,
                        facts,
                        picture.hu,
                        first,
                        first_mask,
                        digest.digest(),
                    )
                )
            return found

        entries: list[_Entry] = []
        rows = sum(part.rows for part in pictures.parts)
        with ThreadPoolExecutor(data.READERS) as pool, Progress("decode", rows, "rows") as progress:
            for part, found in zip(pictures.parts, pool.map(decode, pictures.parts), strict=True):
                entries += found
                progress.step(part.rows)
    number, depth, size, facts, hu, first, first_mask, digest = zip(*entries, strict=True)
    np.savez(
        folder / _TABLE, numbers=np.array(number, np.int64), depths=np.array(depth, np.int64), sizes=np.array(size, np.int64),
        facts=np.array(facts, np.float32), hu=np.array(hu, bool), first=np.array(first, np.int64),
        first_mask=np.array(first_mask, np.int64), masked=np.array(pictures.masked),
        fingerprint=np.array(hashlib.sha256(b"".join(digest)).hexdigest()),
    )  # fmt: skip


def _stored(
    values: Float32[np.ndarray, "rows columns"],
) -> tuple[UInt16[np.ndarray, "rows columns"], tuple[float, float, float, float]]:
    """Values in 16 bits, and their slope, intercept, 0.5 and 99.5 percentile; real value = stored * slope + intercept.

    Whole numbers that fit are exact; others are within 1/131070 of their range. Percentiles are values of the slice, as in shards.
    """
    low, high = float(values.min()), float(values.max())
    ranks = [max(1, math.ceil(share * values.size)) for share in (0.005, 0.995)]
    if high - low <= _LEVELS:
        shifted = values - np.float32(low)
        stored = shifted.astype(np.uint16)
        if np.array_equal(stored, shifted):
            counted = np.cumsum(np.bincount(stored.ravel()))
            ends = [low + int(np.searchsorted(counted, rank)) for rank in ranks]
            return stored, (1.0, low, ends[0], ends[1])
    slope = (high - low) / _LEVELS
    stored = np.round((values.astype(np.float64) - low) / slope).astype(np.uint16)
    in_order = np.partition(values, [rank - 1 for rank in ranks], axis=None)
    return stored, (slope, low, float(in_order[ranks[0] - 1]), float(in_order[ranks[1] - 1]))
