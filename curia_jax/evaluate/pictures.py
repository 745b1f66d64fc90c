"""The images of a task in the published schema: slices in real values, in the order of rows.

What would give a wrong figure is refused and its row is named: images of 1x1 px, which stand for files that were missing at
upload; masks of another shape, or empty; pixels that are not finite.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Int, Shaped

from curia_common.errors import DataError
from curia_jax.evaluate import labels, task_data
from curia_jax.evaluate.task_data import IMAGE, MASK, Files, Part
from curia_jax.evaluate.tasks import BOTH, CT, Task

MOST_SLICES = 1 << 16  # of a volume; image number = row * MOST_SLICES + slice
_IMAGES_TOGETHER = 16  # rows that are decoded at a time; of volumes one


@dataclasses.dataclass(frozen=True)
class Picture:
    """One slice of a case.

    Attributes:
      number: row * MOST_SLICES + slice.
      values: HU, or raw values.
      hu: whether they are HU.
      mask: of the same shape; None without one.
      depth: slices of its volume; 1 of an image.
    """

    number: int
    values: Float32[np.ndarray, "rows columns"]
    hu: bool
    mask: Bool[np.ndarray, "rows columns"] | None
    depth: int


@dataclasses.dataclass(frozen=True)
class TaskPictures:
    """The slices of a split that a task's features come from."""

    task: Task
    files: Files
    split: str

    @property
    def source_digest(self) -> str:
        """Of the files, and of what is taken from them: known without reading any image."""
        what = f"{self.files.sha256} {self.task.form} {self.task.slices} {self.task.modality}"
        return hashlib.sha256(what.encode()).hexdigest()

    @functools.cached_property
    def masked(self) -> bool:
        """Whether features are those of a region; where the task leaves that to the data, its first row says it."""
        return _has_mask(self.files) if self.task.masked is None else self.task.masked

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Of its files."""
        return task_data.parts(self.files.by_split[self.split])

    def of_rows(self, rows: Sequence[int]) -> list[Picture]:
        """One slice of each of these rows, in their order: of a volume the middle one of those that features come from."""
        by_row: dict[int, list[Picture]] = {}
        for part in self.parts:
            for picture in self.of_part(part, set(rows)):
                by_row.setdefault(picture.number // MOST_SLICES, []).append(picture)
        return [by_row[row][len(by_row[row]) // 2] for row in rows]

    def of_part(self, part: Part, rows: Collection[int] | None = None) -> Iterator[Picture]:
        """The slices of the rows of a part, or of those of them that are among `rows`.

        Raises:
          DataError: a row cannot be used.
        """
        row = part.first_row
        if rows is not None and not any(row <= wanted < row + part.rows for wanted in rows):
            return
        together = 1 if self.task.volume else _IMAGES_TOGETHER
        for batch in task_data.read(part.path, (IMAGE, MASK, "modality"), part=part.number, together=together):
            columns = {name: _Cells(batch.column(name)) for name in (IMAGE, MASK) if name in batch.schema.names}
            for offset in range(len(batch)):
                if rows is None or row in rows:
                    yield from self._of_row(batch, columns, offset, row)
                row += 1

    def _of_row(
        self, batch: pa.RecordBatch, columns: "Mapping[str, _Cells]", offset: int, row: int
    ) -> Iterator[Picture]:
        task, where = self.task, f"{self.task.name}: row {row} of {self.split}"
        if IMAGE not in columns:
            raise DataError(
                f"{task.name}: {self.split} has no column image; there are: {', '.join(batch.schema.names)}"
            )
        image = columns[IMAGE].array(offset, where)
        if image is None or image.ndim != (3 if task.volume else 2):
            shape = "no image" if image is None else f"an image of shape {image.shape}"
            wanted = "(rows, columns, slices)" if task.volume else "(rows, columns)"
            raise DataError(f"{where} has {shape}; the task takes {wanted}")
        if min(image.shape[:2]) < 2:
            raise DataError(
                f"{where} has an image of {image.shape[0]}x{image.shape[1]} px, as upload makes of a missing file"
            )
        if not image.size:
            raise DataError(f"{where} has a volume without a slice; leave the row out, or give it one")
        # NaN and infinities show in the extremes, which are found several times faster than they are looked for in every pixel.
        if not (np.isfinite(image.min()) and np.isfinite(image.max())):
            raise DataError(f"{where} has pixels that are not finite")
        hu = task.modality == CT
        if task.modality == BOTH:
            if "modality" not in batch.schema.names:
                raise DataError(f"{task.name}: {self.split} has no column modality, which says the units of a row")
            hu = batch.column("modality")[offset].as_py() == CT
        mask = None
        if self.masked:
            mask = columns[MASK].array(offset, where) if MASK in columns else None
            if mask is None:
                raise DataError(f"{where} has no mask, and the task is about what is inside")
            if mask.shape != image.shape:
                raise DataError(f"{where} has a mask of shape {mask.shape}, but an image of shape {image.shape}")
            mask = mask > 0
            if not mask.any():
                raise DataError(f"{where} has an empty mask")
        for number in chosen_slices(image.shape[2], mask, task.slices) if task.volume else [0]:
            values = image[:, :, number] if task.volume else image
            yield Picture(
                row * MOST_SLICES + number,
                np.ascontiguousarray(values, np.float32),
                hu,
                mask if mask is None or not task.volume else np.ascontiguousarray(mask[:, :, number]),
                image.shape[2] if task.volume else 1,
            )


def chosen_slices(count: int, mask: Bool[np.ndarray, "rows columns slices"] | None, wanted: int | None) -> list[int]:
    """Numbers of the slices of a volume that features come from.

    `wanted` slices around the middle of the volume, or of the slices that the mask reaches; None takes all. Slices that do not
    exist, or without mask, are left out.
    """
    inside = np.arange(count) if mask is None else np.flatnonzero(mask.any(axis=(0, 1)))
    if wanted is None:
        return inside.tolist()
    start = int(inside[len(inside) // 2]) - wanted // 2
    return [number for number in range(start, start + wanted) if number in set(inside.tolist())]


def _has_mask(files: Files) -> bool:
    """Whether the first row of the training split has a mask."""
    for batch in task_data.read(files.by_split[labels.FIT][0], (MASK,), together=1):
        return MASK in batch.schema.names and batch.column(MASK).null_count == 0
    return False


class _Cells:
    """A column of nested lists, whose cells are views of its one buffer of numbers: no list is made an object."""

    def __init__(self, column: pa.Array) -> None:
        if isinstance(column, pa.ExtensionArray):  # Array2D and Array3D of `datasets`
            column = column.storage
        self._null = column.is_null().to_numpy(zero_copy_only=False)
        self._offsets: list[Int[np.ndarray, " _"]] = []  # of every level, where lists begin in the next
        while isinstance(column, pa.ListArray | pa.LargeListArray):
            self._offsets.append(column.offsets.to_numpy())
            column = column.values
        self._values = column.to_numpy(zero_copy_only=False)

    def array(self, row: int, where: str) -> Shaped[np.ndarray, "..."] | None:
        """The cell of a row as an array; None where it is null.

        Args:
          where: the row, for the error.

        Raises:
          DataError: its lists differ in length.
        """
        if self._null[row]:
            return None
        shape, first, last = [], row, row + 1
        for offsets in self._offsets:
            lengths = np.diff(offsets[first : last + 1])
            if not len(lengths) or lengths.min() != lengths.max():
                raise DataError(f"{where} has an image or mask whose lines differ in length")
            shape.append(int(lengths[0]))
            first, last = int(offsets[first]), int(offsets[last])
        return self._values[first:last].reshape(shape)


def pooled(
    numbers: Int[np.ndarray, " slices"], by_readout: Mapping[str, Shaped[np.ndarray, "slices _features"]]
) -> dict[str, Float[np.ndarray, "rows _features"]]:
    """The mean over the slices of each row; `numbers` are sorted."""
    first = np.flatnonzero(np.diff(numbers // MOST_SLICES, prepend=-1))
    counts = np.diff(first, append=len(numbers))[:, None]
    return {name: np.add.reduceat(values, first) / counts.astype(np.float32) for name, values in by_readout.items()}
