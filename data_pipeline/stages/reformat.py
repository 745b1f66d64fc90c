"""Other planes of a regular series, at isotropic spacing, without holding the series in memory.

The spacing is the cube root of the voxel's volume, so that a reformatted volume has about as many voxels as its source: 0.9 mm
for pixels of 0.7 mm in slices 1.4 mm apart. Every axis is resampled once, with an antialiasing filter where it shrinks and a
cubic one where it grows.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from data_pipeline.sources.geometry import Direction

PLANES = ("axial", "coronal", "sagittal")
BLOCK_BYTES = 64 * 1024 * 1024
HIGHEST = (1 << 16) - 1
# Patient coordinates: x to the left, y to the back, z up. Of each plane the axis through the slices, down the rows and along
# the columns, with directions as a viewer shows them: axial and coronal with the patient's right on the left, front or head
# up; sagittal with the face to the left.
_VIEWS = {
    "axial": ((2, 1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}


def directions(orientation: tuple[float, ...]) -> tuple[Direction, Direction, Direction] | None:
    """Directions of slices sorted along their normal, of their rows and columns; None where two share an axis.

    Args:
      orientation: direction cosines of a row and of a column, as in ImageOrientationPatient.
    """
    along_row, along_column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    vectors = (np.cross(along_row, along_column), along_column, along_row)  # slices, rows (downwards), columns
    slices, rows, columns = ((int(np.argmax(np.abs(v))), 1 if v[np.argmax(np.abs(v))] > 0 else -1) for v in vectors)
    return (slices, rows, columns) if len({slices[0], rows[0], columns[0]}) == 3 else None


@dataclasses.dataclass(frozen=True)
class Reformat:
    """One slice of another plane.

    Attributes:
      position: distance from the first one, mm.
    """

    plane: str
    number: int
    pixels: UInt16[np.ndarray, "rows columns"]
    position: float


class Stack:
    """Takes the slices of a series in order and reformats them. A context manager.

    Args:
      where: folder for a temporary file that holds the resampled slices.
      spacing: between slices, rows and columns, mm.
      along: directions of slices, rows and columns.
    """

    def __init__(
        self, where: Path, spacing: tuple[float, float, float], along: tuple[Direction, Direction, Direction]
    ) -> None:
        self.spacing = float(np.prod(spacing)) ** (1 / 3)
        self._step, self._rows_mm, self._columns_mm = spacing
        self._along = along
        self._file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115 - it lives as long as the stack
        self._count = 0
        self._shape = (0, 0)  # of the resampled slices, once there is one

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def add(self, pixels: UInt16[np.ndarray, "rows columns"]) -> None:
        """The next slice; all have one shape."""
        rows, columns = pixels.shape
        shape = (self._length(rows, self._rows_mm), self._length(columns, self._columns_mm))
        if not self._count:
            self._shape = shape
        self._file.write(resize(pixels, self._shape).tobytes())
        self._count += 1

    def _length(self, count: int, spacing: float) -> int:
        return max(1, round(count * spacing / self.spacing))

    def planes(self, wanted: tuple[str, ...]) -> Iterator[Reformat]:
        """Slices of the planes in `wanted` other than the series' own, plane by plane; sorted in patient coordinates upwards,
        front to back, right to left."""
        if not self._count:
            return
        self._file.flush()
        axes = [axis for axis, _ in self._along]
        for plane in wanted:
            through = axes.index(_VIEWS[plane][0][0])
            if through:
                yield from self._plane(plane, through)

    def _plane(self, plane: str, through: int) -> Iterator[Reformat]:
        rows, columns = self._shape
        count = rows if through == 1 else columns
        across = columns if through == 1 else rows
        block = max(1, BLOCK_BYTES // (2 * self._count * across))
        starts = list(range(0, count, block))
        backwards = self._along[through][1] < 0
        number = 0
        for start in reversed(starts) if backwards else starts:
            part = self._block(through, start, min(start + block, count))
            order = range(part.shape[1])
            for n in reversed(order) if backwards else order:
                pixels = resize(part[:, n], (self._length(self._count, self._step), across))
                yield Reformat(plane, number, self._oriented(plane, through, pixels), number * self.spacing)
                number += 1

    def _block(self, through: int, first: int, last: int) -> UInt16[np.ndarray, "slices lines across"]:
        """Lines first to last of every slice: rows, or columns turned into rows."""
        rows, columns = self._shape
        size = 2 * rows * columns
        handle = self._file.fileno()
        if through == 1:
            part = np.empty((self._count, last - first, columns), np.uint16)
            for n in range(self._count):
                data = os.pread(handle, part[n].nbytes, n * size + 2 * first * columns)
                part[n] = np.frombuffer(data, np.uint16).reshape(part[n].shape)
            return part
        part = np.empty((self._count, last - first, rows), np.uint16)
        for n in range(self._count):
            whole = np.frombuffer(os.pread(handle, size, n * size), np.uint16).reshape(rows, columns)
            part[n] = whole[:, first:last].T
        return part

    def _oriented(
        self, plane: str, through: int, pixels: UInt16[np.ndarray, "slices across"]
    ) -> UInt16[np.ndarray, "rows columns"]:
        here = (self._along[0], self._along[2 if through == 1 else 1])
        _, rows, columns = _VIEWS[plane]
        if here[0][0] != rows[0]:
            pixels, here = pixels.T, here[::-1]
        if here[0][1] != rows[1]:
            pixels = pixels[::-1]
        if here[1][1] != columns[1]:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)


def resize(pixels: UInt16[np.ndarray, "rows columns"], shape: tuple[int, int]) -> UInt16[np.ndarray, "high wide"]:
    """Pixels at another height and width, bicubic and antialiased."""
    if pixels.shape == shape:
        return pixels
    # Pillow's bicubic filter widens where the image shrinks; 16-bit values are exact in float32.
    size = (shape[1], shape[0])
    picture = Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.rint(np.asarray(picture)), 0, HIGHEST).astype(np.uint16)
