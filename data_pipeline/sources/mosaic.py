"""Siemens mosaics: the slices of a volume, side by side in the one matrix of a classic MR object.

How many slices there are and which way they go stands in private elements alone. Sources: nibabel, "DICOM Siemens mosaic format", and
dcm2niix. The position in the header is that of a matrix as large as the mosaic around the centre of the first slice.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from data_pipeline.sources.geometry import Orientation, Position

_BLOCKS = range(0x10, 0x18)  # in which private elements may lie
# Creator, group and element of the CSA image header and of NumberOfImagesInMosaic.
_CSA, _COUNT = ("SIEMENS CSA HEADER", 0x29, 0x10), ("SIEMENS MR HEADER", 0x19, 0x0A)
PRIVATE_TAGS = [
    Tag(group, element)
    for _, group, offset in (_CSA, _COUNT)
    for block in _BLOCKS
    for element in (block, block << 8 | offset)
]
MOST_TILES = 1024
NORMAL_TOLERANCE = 1e-2  # of a direction cosine


class Layout(NamedTuple):
    """How many slices a mosaic has, and the unit vector from one to the next."""

    tiles: int
    normal: tuple[float, ...]

    @property
    def side(self) -> int:
        """Tiles in a row and in a column."""
        return math.isqrt(self.tiles - 1) + 1


def layout(dataset: Dataset) -> Layout | None:
    """The layout of a mosaic whose PRIVATE_TAGS were read; None where they do not say it."""
    from nibabel.nicom import csareader  # slow to import, and mosaics are rare

    data = _private(dataset, *_CSA)
    try:
        tags = csareader.read(data)["tags"] if isinstance(data, bytes) else {}
        count = _first(tags, "NumberOfImagesInMosaic") or _whole(_private(dataset, *_COUNT))
        normal = tuple(float(value) for value in tags["SliceNormalVector"]["items"])
    except Exception:  # noqa: BLE001 - nobody checked the private elements, and the reader raises what it likes
        return None
    sound = len(normal) == 3 and abs(math.hypot(*normal) - 1) <= NORMAL_TOLERANCE and 1 < count <= MOST_TILES
    return Layout(count, normal) if sound else None


def _private(dataset: Dataset, creator: str, group: int, offset: int) -> object:
    try:
        return dataset.private_block(group, creator)[offset].value
    except KeyError:
        return None


def _first(tags: dict, name: str) -> int:
    items = tags[name]["items"] if name in tags else []
    return int(items[0]) if items else 0


def _whole(value: object) -> int:
    if isinstance(value, bytes):  # in implicit files private elements have no representation
        return int.from_bytes(value, "little")
    return value if isinstance(value, int) else 0


def positions(
    layout: Layout, matrix: tuple[int, int], spacing: tuple[float, ...], step: float, orientation: Orientation, position: Position
) -> list[tuple[float, ...]] | None:  # fmt: skip
    """Centre of the first pixel of each slice, mm; None where the header does not say where they lie.

    Args:
      matrix: rows and columns of the mosaic.
      spacing: between rows and between columns, mm; step: between slices, mm.
      orientation, position: of the header.
    """
    if orientation is None or position is None or step <= 0 or any(length % layout.side for length in matrix):
        return None
    right, down = np.array(orientation[:3]), np.array(orientation[3:])
    if abs(abs(float(np.cross(right, down) @ np.array(layout.normal))) - 1) > NORMAL_TOLERANCE:
        return None
    rows, columns = (length - length // layout.side for length in matrix)
    first = np.array(position) + right * spacing[1] * columns / 2 + down * spacing[0] * rows / 2
    return [tuple((first + np.array(layout.normal) * step * n).tolist()) for n in range(layout.tiles)]


def split(
    matrix: Integer[np.ndarray, "rows columns"], tiles: int
) -> Iterator[Integer[np.ndarray, "tile_rows tile_columns"]]:
    """The slices of a mosaic, from left to right and from top to bottom; empty places at its end are left out."""
    side = math.isqrt(tiles - 1) + 1
    height, width = (length // side for length in matrix.shape)
    for n in range(tiles):
        row, column = divmod(n, side)
        yield matrix[row * height : (row + 1) * height, column * width : (column + 1) * width]
