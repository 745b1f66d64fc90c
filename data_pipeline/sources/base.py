"""The contract of a reader: how one input file becomes slices.

A reader is a function `open_…(request) -> context manager of SourceFile`. All of them keep these rules, and
tests/data_pipeline/sources/test_readers.py checks every one of them:

1. It raises ReadError for whatever is wrong with the file, with a reason that quotes no value of any header; OSError with an
   errno for storage that fails; StorageError for a full scratch disk; MemoryError or ReadError(NO_MEMORY) where the file needs
   more than the worker may take. Opening raises, or else reading the slices does.
2. It changes none of its arguments and no global state: what it learns is in the SourceFile. Settings of libraries that
   only exist globally are changed for the length of a call and put back (see silence.py).
3. `slices()` is called once and yields each slice once, in the order of the file; `Slice.rank` is the place in spatial order.
   The ranks of a file are 0, 1, … without gaps, unless the request names frames that the file does not have.
4. Pixels are uint16 and real value = pixels * slope + intercept with slope > 0, exactly for whole numbers. `Slice.histogram`, where a
   reader gives it, counts these pixels.
5. At most one frame (or slab of a volume) is in memory at a time, but for compressed forms that a library decodes whole;
   scratch files lie in `request.scratch`.
6. `facts` and `excluded` are known once the file is open; `decoder` and `stored_sha256` once `slices()` is exhausted.
7. The same file gives the same slices and digests every time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int, UInt16

from data_pipeline.sources.geometry import Direction

# Called with an item before it is read, and with None when nothing is being read: only reading has a time limit.
Heartbeat = Callable[[str | None], None]
Units = Literal["HU", "arbitrary"]

NO_MEMORY = "it needs more memory than a worker may take; if it is sound, give workers more with --memory-gb"
SCRATCH_FULL = "scratch disk is full ({error}); free some space and rerun the same command"


class ReadError(Exception):
    """A file cannot be read. The reason is shown to users and holds no value of any header."""


@dataclasses.dataclass(frozen=True)
class ReadRequest:
    """What a reader gets.

    Attributes:
      path: the file on a local disk.
      modality: "CT", "MR" or "OT"; "auto" where neither the file nor the user says.
      scratch: folder on a local disk for temporary files.
      frames: of a DICOM file, the frames to read in spatial order: number within the file, and mm along the normal.
      flags: bits of format.records that the inventory and the plan know (IRREGULAR, LOSSY).
      tiles: slices of a mosaic, which are the frames; else 0.
      digest: how stored values become digests; see stored_values.DIGESTS.
      units: of real values; None where the modality says them.
    """

    path: str
    modality: str
    scratch: str
    frames: tuple[tuple[int, float], ...] = ()
    flags: int = 0
    digest: Literal["smallest", "int64"] = "smallest"
    units: Units | None = None
    tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice; real value = pixels * slope + intercept.

    Attributes:
      rank: place in the spatial order of the file.
      position: mm along the normal.
      flags: bits of format.records.
      source: first 16 hex digits of the SHA-256 of the stored source pixels.
      spacing: mm between rows and between columns; 0 where unknown.
      rescale: slope and intercept of the source; None where it does not say in which units its values are.
      below: HU below -1024, which are raised to it, and how many pixels had each; declared padding left out.
      padded: pixels of declared padding.
      histogram: how many pixels have the stored value 0, 1, 2, …, up to the highest; None where the reader has not counted them.
    """

    rank: int
    pixels: UInt16[np.ndarray, "rows columns"]
    slope: float
    intercept: float
    position: float
    flags: int
    source: str
    spacing: tuple[float, float]
    rescale: tuple[float, float] | None = (1.0, 0.0)
    below: tuple[tuple[float, int], ...] = ()
    padded: int = 0
    histogram: Int[np.ndarray, " levels"] | None = None


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What is known of a file's slices once it is open; None where what the inventory and the plan say stands.

    Attributes:
      modality: "CT", "MR" or "OT".
      units: of real values.
      plane: "axial", "coronal", "sagittal", "oblique" or "unknown".
      spacing: mm between slices.
      directions: of slices, rows and columns in patient coordinates, where the file says so.
    """

    modality: str
    units: Units
    body_part: str | None = None
    manufacturer: str | None = None
    plane: str | None = None
    spacing: float | None = None
    directions: tuple[Direction, Direction, Direction] | None = None


class SourceFile(Protocol):
    """An open file.

    Attributes:
      facts: known from the start.
      excluded: why it has no slices though it can be read (such as a label map); "" where it has some.
      decoder: name of the library that decoded the pixels.
      stored_sha256: of all stored pixels; "" where they are not whole numbers.
    """

    facts: ImageFacts
    excluded: str
    decoder: str
    stored_sha256: str

    def slices(self) -> Iterator[Slice]: ...


Reader = Callable[[ReadRequest], AbstractContextManager[SourceFile]]
