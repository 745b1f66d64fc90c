"""The contract of a reader: how one input file becomes slices.

A reader is a function `open_…(request) -> context manager of SourceFile`. All of them keep these rules, and
tests/data_pipeline/sources/test_contract.py holds every one to them:

1. It raises ReadError for whatever is wrong with the file, with a reason that quotes no value of any header; OSError with an
   errno for storage that fails; MemoryError where the file needs more than the worker may take. Nothing else.
2. It changes none of its arguments and no global state: what it found out is in the SourceFile.
3. `slices()` yields each slice once. Its order is the file's; `Slice.rank` is the place in spatial order.
4. Pixels are uint16 and real value = pixels * slope + intercept with slope > 0, exactly for whole numbers.
5. At most one frame (or slab of a compressed volume) is in memory at a time; scratch files lie in `request.scratch`.
6. `decoder` and `stored_sha256` are final once `slices()` is exhausted.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import numpy as np
from jaxtyping import UInt16

# Called with an item before it is read, and with None when nothing is being read: only reading has a time limit.
Heartbeat = Callable[[str | None], None]
Units = Literal["HU", "arbitrary"]

NO_MEMORY = "it needs more memory than a worker may take; if it is sound, give workers more with --memory-gb"
SCRATCH_FULL = "scratch disk is full ({error}); free some space and rerun the same command"


class ReadError(Exception):
    """A file cannot be read. The reason is for people to read and holds no value of any header."""


@dataclasses.dataclass(frozen=True)
class ReadRequest:
    """What a reader gets.

    Attributes:
      path: the file on a local disk.
      modality: "CT", "MR" or "OT"; "auto" where neither the file nor the user says.
      scratch: folder on a local disk for temporary files.
      frames: of a DICOM file, the wanted frames in spatial order: number and mm along the normal.
      flags: bits of format.records that follow from the header (IRREGULAR, LOSSY).
    """

    path: str
    modality: str
    scratch: str
    frames: tuple[tuple[int, float], ...] = ()
    flags: int = 0


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice; real value = pixels * slope + intercept.

    Attributes:
      rank: place in the spatial order of the file.
      position: mm along the normal.
      flags: bits of format.records.
      source: first 16 hex digits of the SHA-256 of the stored source pixels.
      spacing: mm between rows and between columns; 0 where unknown.
    """

    rank: int
    pixels: UInt16[np.ndarray, "rows columns"]
    slope: float
    intercept: float
    position: float
    flags: int
    source: str
    spacing: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What is known of a file's slices once it is open; None where the file does not say and the header's word stands.

    Attributes:
      modality: "CT", "MR" or "OT".
      units: of real values.
      plane: "axial", "coronal", "sagittal", "oblique" or "unknown".
      spacing: mm between slices.
      directions: unit vectors of rows, columns and slices in patient coordinates, where reformatting can use them.
    """

    modality: str
    units: Units
    body_part: str | None = None
    manufacturer: str | None = None
    plane: str | None = None
    spacing: float | None = None
    directions: tuple[tuple[float, ...], ...] | None = None


class SourceFile(Protocol):
    """An open file.

    Attributes:
      facts: known from the start.
      excluded: why it has no slices though it could be read (a label map, say); "" where it has some.
      decoder: name of the library that decoded the pixels.
      stored_sha256: of all stored pixels; "" where they are no whole numbers.
    """

    facts: ImageFacts
    excluded: str
    decoder: str
    stored_sha256: str

    def slices(self) -> Iterator[Slice]: ...


Reader = Callable[[ReadRequest], AbstractContextManager[SourceFile]]
