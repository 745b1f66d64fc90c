"""NIfTI, NRRD and MetaImage volumes, cut into slices oriented as a DICOM viewer shows them."""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import nibabel
import numpy as np
import SimpleITK
from jaxtyping import Shaped
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from curia_common.errors import StorageError, UserError
from data_pipeline.format import records
from data_pipeline.sources.base import NO_MEMORY, SCRATCH_FULL, ImageFacts, ReadError, ReadRequest, Slice, SourceFile
from data_pipeline.sources.geometry import FARTHEST_MM, PLANES, Direction
from data_pipeline.sources.silence import silenced
from data_pipeline.sources.stored_values import LEVELS, Digest, stored_sha256, to_uint16

# A label map holds few distinct whole numbers. 8-bit images have up to 256, so above FEW_LABEL_VALUES the file name has to
# say so too.
LABEL_VALUES = 128
FEW_LABEL_VALUES = 24
MAXIMUM_RATIO = 1100  # deflate, which all these formats use, packs 1,032 bytes into one at best
HEADER_BYTES = 1 << 16
# Larger NIfTI volumes are read piece by piece.
IN_MEMORY_BYTES = 1 << 28
SLAB_BYTES = 1 << 24  # of neighbouring planes as they are stored
BLOCK_BYTES = 1 << 28  # of planes across the order in which they are stored: each needs one look at the whole file
LABEL_NAMES = re.compile(r"(seg|mask|msk|label|lobes?|roi)", re.IGNORECASE)
LABEL_MAP = "label map: few distinct whole numbers"
# Where slices, rows and columns go once a volume is turned as a viewer shows it.
DIRECTIONS: dict[str, tuple[Direction, Direction, Direction]] = {
    "axial": ((2, 1), (1, 1), (0, 1)), "coronal": ((1, -1), (2, -1), (0, 1)), "sagittal": ((0, -1), (2, -1), (1, 1)),
}  # fmt: skip


# ---- the reader


class VolumeFile:
    """The SourceFile of a volume."""

    def __init__(self, request: ReadRequest, volume: "Volume") -> None:
        self.decoder = "nibabel" if is_nifti(request.path) else "SimpleITK"
        self.stored_sha256 = ""
        self.excluded = LABEL_MAP if volume.is_label_map else ""
        inferred = request.modality == "auto"
        modality = infer_modality(volume.low, volume.high) if inferred else request.modality
        self.facts = ImageFacts(
            modality=modality, units="HU" if modality == "CT" else "arbitrary", body_part="", manufacturer="unknown",
            plane=volume.plane, spacing=volume.spacing[2], directions=DIRECTIONS[volume.plane],
        )  # fmt: skip
        self._volume = volume
        self._flags = request.flags | (records.MODALITY_INFERRED if inferred else 0)

    def slices(self) -> Iterator[Slice]:
        volume, digest = self._volume, Digest()
        if volume.is_label_map:
            for plane in volume.slices():
                digest.add(plane)
            self.stored_sha256 = digest.hex()
            return
        # Whole numbers as they are; others in 65,535 equal steps between the lowest and the highest.
        as_is = volume.integers and volume.high - min(volume.low, 0) < LEVELS
        slope = 1.0 if as_is else (float(volume.high) - float(volume.low)) / (LEVELS - 1) or 1.0
        intercept = 0.0 if as_is else float(volume.low)
        for number, plane in enumerate(volume.slices()):
            steps = plane if as_is else np.rint((plane.astype(np.float64) - intercept) / slope).astype(np.int64)
            source = digest.add(plane, also_alone=True) if volume.integers else ""
            pixels, pixel_slope, pixel_intercept, clipped = to_uint16(
                steps, slope, intercept, hu=self.facts.units == "HU", low=int(volume.low) if as_is else 0
            )
            yield Slice(
                rank=number, pixels=pixels, slope=pixel_slope, intercept=pixel_intercept,
                position=number * volume.spacing[2], flags=self._flags | clipped,
                source=source if as_is else stored_sha256(steps), spacing=volume.spacing[:2],
            )  # fmt: skip
        self.stored_sha256 = digest.hex() if volume.integers else ""


@contextlib.contextmanager
def open_volume_file(request: ReadRequest) -> Iterator[SourceFile]:
    """The reader of volumes; see data_pipeline.sources.base."""
    with open_volume(request.path, request.scratch) as volume:
        yield VolumeFile(request, volume)


# ---- stored values


class _Array:
    """Stored values in memory; the first axis is the fastest, as in NIfTI."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def planes(self, axis: int, first: int, last: int) -> np.ndarray:
        """Planes first to last along an axis."""
        return self.values[(slice(None),) * axis + (slice(first, last),)]

    def planes_at_once(self, axis: int) -> int:
        """How many planes to read at a time."""
        return max(1, SLAB_BYTES * self.shape[axis] // max(1, self.values.nbytes))


class _File:
    """Stored values in a file; planes are read on request."""

    def __init__(self, file: BinaryIO, offset: int, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._file, self._offset, self.shape, self.dtype = file, offset, shape, dtype

    def planes(self, axis: int, first: int, last: int) -> np.ndarray:
        rows, columns, count = self.shape
        if axis == 2:
            return self._read(first * rows * columns, (rows, columns, last - first))
        part = np.empty((*self.shape[:axis], last - first, *self.shape[axis + 1 :]), self.dtype, order="F")
        for n in range(count):
            if axis == 1:
                part[:, :, n] = self._read((n * columns + first) * rows, (rows, last - first, 1))[:, :, 0]
            else:
                part[:, :, n] = self._read(n * columns * rows, (rows, columns, 1))[first:last, :, 0]
        return part

    def _read(self, start: int, shape: tuple[int, int, int]) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self._offset + start * self.dtype.itemsize)
        if len(data) < size:
            raise ReadError("damaged volume: it is cut off")
        return np.frombuffer(data, self.dtype).reshape(shape, order="F")

    def planes_at_once(self, axis: int) -> int:
        plane = math.prod(self.shape) // self.shape[axis] * self.dtype.itemsize
        return max(1, (SLAB_BYTES if axis == 2 else BLOCK_BYTES) // plane)


@dataclasses.dataclass(frozen=True)
class Volume:
    """Slices of a volume.

    Attributes:
      spacing: between rows, columns and slices, mm.
      plane: of the slices: the plane with the smallest spacing within it, axial for isotropic volumes.
      low, high: lowest and highest value.
      integers: all values are whole numbers.
      is_label_map: few distinct whole numbers: segmentations, not images.
    """

    spacing: tuple[float, float, float]
    plane: str
    low: int | float
    high: int | float
    integers: bool
    is_label_map: bool
    _stored: _Array | _File
    _scaling: tuple[float, float]
    _orientation: np.ndarray

    def slices(self) -> Iterator[Shaped[np.ndarray, "rows columns"]]:
        """In spatial order, rescaled, turned as open_volume says; integers where all values are, else float32.

        NaN becomes the lowest value, infinity the highest or lowest.
        """
        through = PLANES.index(self.plane)
        axis = int(np.flatnonzero(self._orientation[:, 0] == through)[0])
        count, step = self._stored.shape[axis], self._stored.planes_at_once(axis)
        starts = range(0, count, step)
        for start in starts if self._orientation[axis, 1] > 0 else reversed(starts):
            values = _scaled(self._stored.planes(axis, start, min(start + step, count)), self._scaling)
            if values.dtype.kind == "f":
                values = np.nan_to_num(values, nan=self.low, posinf=self.high, neginf=self.low)
                values = np.rint(values).astype(np.int32) if self.integers else values.astype(np.float32)
            values = nibabel.apply_orientation(values, self._orientation)
            # Rows run from the front or the head down, columns from the patient's right or, in sagittal slices, from the face.
            for one in np.moveaxis(values, through, 0)[:, ::-1, ::-1].transpose(0, 2, 1):
                yield np.ascontiguousarray(one)


def is_nifti(path: str) -> bool:
    """By its name: NIfTI goes to nibabel, everything else to SimpleITK."""
    return path.lower().endswith((".nii", ".nii.gz"))


@contextlib.contextmanager
def open_volume(path: str, scratch: str | None = None) -> Iterator[Volume]:
    """Reads a volume once for its range and turns it as viewers show it: axial and coronal slices with the patient's right on
    the left and front or head up, sagittal ones with the face to the left.

    A volume of more than IN_MEMORY_BYTES is read in pieces. A compressed one is unpacked to `scratch` for that, as a file
    without a name. Unusual forms of NRRD and MetaImage are read whole: text, bzip2, skipped bytes.

    Raises:
      ReadError: damaged, or not of two or three dimensions.
      StorageError: the scratch disk is full.
    """
    try:
        with contextlib.ExitStack() as stack:
            opened = _open_nifti(path, scratch, stack) if is_nifti(path) else _open_itk(path, scratch, stack)
            yield _volume(path, *opened)
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error


def _volume(path: str, stored: _Array | _File, scaling: tuple[float, float], affine: np.ndarray) -> Volume:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # To axes pointing right, front, up, so that array axes are sagittal, coronal and axial in turn.
    orientation = nibabel.io_orientation(affine)
    if np.isnan(orientation).any():
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    order = np.argsort(orientation[:, 0])
    spacing, shape = spacing[order], [stored.shape[axis] for axis in order]
    through = 2
    if shape.count(1) == 1:
        through = shape.index(1)
    elif spacing.max() > 1.1 * np.sort(spacing)[1]:
        through = int(np.argmax(spacing))
    in_plane = [axis for axis in range(3) if axis != through]
    low, high, integers, distinct = _range(stored, scaling)
    few = distinct <= FEW_LABEL_VALUES or (
        distinct <= LABEL_VALUES and bool(LABEL_NAMES.search(path.rsplit("/", 1)[-1]))
    )
    return Volume(
        spacing=(float(spacing[in_plane[1]]), float(spacing[in_plane[0]]), float(spacing[through])),
        plane=PLANES[through], low=low, high=high, integers=integers, is_label_map=integers and few, _stored=stored,
        _scaling=scaling, _orientation=orientation,
    )  # fmt: skip


def _shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """Of three axes; more than three may be there if they are of one plane."""
    if len(shape) > 3:
        shape = tuple(n for n in shape if n != 1)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or 0 in shape:
        raise ReadError(f"{len(shape)} dimensions; slices come from volumes of 2 or 3")
    if dtype.kind == "c" or dtype.names:
        raise ReadError("complex or colour values")
    return shape


def _open_nifti(
    path: str, scratch: str | None, stack: contextlib.ExitStack
) -> tuple[_Array | _File, tuple[float, float], np.ndarray]:
    try:
        with silenced():
            image = nibabel.load(path)
            proxy = image.dataobj if isinstance(image, SpatialImage) else None
            if not isinstance(image, SpatialImage) or not isinstance(proxy, ArrayProxy):
                raise ReadError("damaged volume: no NIfTI")
            _check_size(path, image.shape, image.get_data_dtype().itemsize)
            affine = np.asarray(image.affine, np.float64)
            shape = _shape(proxy.shape, proxy.dtype)
            size = math.prod(shape) * proxy.dtype.itemsize
            if size <= IN_MEMORY_BYTES:
                stored: _Array | _File = _Array(np.asarray(proxy.get_unscaled()).reshape(shape, order="F"))
            elif path.lower().endswith(".gz"):
                file = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                with ImageOpener(path) as packed:
                    packed.seek(proxy.offset)
                    _copy(iter(lambda: packed.read(SLAB_BYTES), b""), file, size)
                stored = _File(file, 0, shape, proxy.dtype)
            else:
                stored = _File(stack.enter_context(open(path, "rb")), proxy.offset, shape, proxy.dtype)
    except (ReadError, UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - nibabel, gzip and zlib each raise their own kinds
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        _read_through(path)
        raise ReadError(f"damaged volume ({type(error).__name__})") from error
    return stored, (float(proxy.slope), float(proxy.inter)), _checked(affine)


def _copy(pieces: Iterator[bytes], target: BinaryIO, size: int) -> None:
    while size > 0:
        piece = next(pieces, b"")
        if not piece:
            raise ReadError("damaged volume: it is cut off")
        size -= len(piece)
        try:
            target.write(piece)
            target.flush()
        except OSError as error:  # not the input's fault
            raise StorageError(SCRATCH_FULL.format(error=error.strerror)) from error


def _scaled(stored: np.ndarray, scaling: tuple[float, float]) -> np.ndarray:
    """Real values: integers where stored values and scaling are small ones, else as nibabel rescales, in float32."""
    slope, inter = scaling
    if scaling == (1, 0):
        return stored
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2 and _is_small(slope) and _is_small(inter):
        return stored.astype(np.int32) * int(slope) + int(inter)
    return apply_read_scaling(stored, np.float64(slope), np.float64(inter)).astype(np.float32)


def _range(stored: _Array | _File, scaling: tuple[float, float]) -> tuple[int | float, int | float, bool, int]:
    """Lowest and highest finite value; whether all are whole numbers that fit 32 bits or their own type; and the count of
    distinct whole numbers, exact up to LABEL_VALUES."""
    low, high, whole = math.inf, -math.inf, True
    distinct: set[int] = set()
    for start in range(0, stored.shape[2], step := stored.planes_at_once(2)):
        values = _scaled(stored.planes(2, start, min(start + step, stored.shape[2])), scaling)
        kind = values.dtype.kind
        if kind == "f":
            finite = np.isfinite(values)
            values = values if finite.all() else values[finite]
            if not values.size:
                continue
            whole = whole and bool(np.array_equal(values, np.rint(values)))
        bottom, top = values.min().item(), values.max().item()
        low, high = min(low, bottom), max(high, top)
        whole = whole and (kind != "f" or max(abs(bottom), abs(top)) < 2**31)
        if whole and len(distinct) <= LABEL_VALUES:
            distinct.update(_distinct(values.astype(np.int64) if kind == "f" else values))
    if low > high:
        raise ReadError("none of its values is a finite number")
    if not whole:
        low, high = float(np.float32(low)), float(np.float32(high))
    return low, high, whole, len(distinct)


def _distinct(values: np.ndarray) -> list[int]:
    low, high = int(values.min()), int(values.max())
    if high - low < 1 << 16:  # counting is many times faster than sorting
        return (np.flatnonzero(np.bincount((values.ravel() - np.int64(low)).astype(np.int64))) + low).tolist()
    return np.unique(values).tolist()


def _is_small(number: float) -> bool:
    """Whole, and small enough for 16-bit values times it to fit into 32 bits."""
    return float(number).is_integer() and abs(number) < 1 << 14


def _check_size(path: str, shape: tuple[int, ...], itemsize: int) -> None:
    promised = math.prod(shape) * itemsize
    if promised > MAXIMUM_RATIO * os.path.getsize(path):
        raise ReadError(f"damaged volume: its header promises {promised:,} bytes, which the file cannot hold")


# Where NRRD and MetaImage headers name a data file beside them.
_DATA_FILE = re.compile(rb"^\s*(?:data ?file|ElementDataFile)\s*[:=][ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


def _data_file(path: str) -> str:
    """The file that holds the values: the header's own, or one in its folder or below.

    Raises:
      ReadError: there are several, it is missing, or it lies elsewhere: a header must not make us read other files.
    """
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(b"NRRD"):
        # The header ends at its first empty line; what follows is data.
        start, *data = re.split(rb"\r?\n\r?\n", start, maxsplit=1)
        ended = bool(data) or os.path.getsize(path) <= HEADER_BYTES
    else:
        ended = _DATA_FILE.search(start) is not None  # the last line of a MetaImage header
    if not ended:
        raise ReadError(f"damaged volume: its header does not end within {HEADER_BYTES:,} bytes")
    found = _DATA_FILE.search(start)
    name = os.fsdecode(found[1].strip()) if found else ""
    if name in ("", "LOCAL"):
        return path
    if "\0" in name:
        raise ReadError("damaged volume: zeros in its header")
    if name.split()[0] == "LIST" or "%" in name:
        raise ReadError("a header with several data files, which are not read: write the volume to one file")
    folder = os.path.dirname(os.path.abspath(path))
    target = os.path.realpath(os.path.join(folder, name))
    if os.path.isabs(name) or os.path.commonpath([os.path.realpath(folder), target]) != os.path.realpath(folder):
        raise ReadError("its header names a data file outside its folder")
    if not os.path.isfile(target):
        raise ReadError(
            "its data file is missing; one beside a header in an archive or a bucket is not read either: lay both into a folder"
        )
    return target


def _open_itk(
    path: str, scratch: str | None, stack: contextlib.ExitStack
) -> tuple[_Array | _File, tuple[float, float], np.ndarray]:
    reader = SimpleITK.ImageFileReader()
    # By the name alone: ITK would try every format that it knows, some of which open other files.
    reader.SetImageIO("NrrdImageIO" if path.lower().endswith((".nrrd", ".nhdr")) else "MetaImageIO")
    reader.SetFileName(path)
    data = _data_file(path)
    try:
        with silenced():
            reader.ReadImageInformation()
            components, size = reader.GetNumberOfComponents(), reader.GetSize()
            dtype = _TYPES.get(reader.GetPixelID())
            _check_size(data, (*size, components), dtype.itemsize if dtype else 1)
            if components != 1:
                raise ReadError("colour values")
            if reader.GetDimension() != 3:
                raise ReadError(f"{reader.GetDimension()} dimensions; slices come from volumes of 2 or 3")
            affine = np.eye(4)
            affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * np.array(reader.GetSpacing())
            affine[:2] *= -1  # ITK's axes point left and back, NIfTI's right and front
            stored: _Array | _File | None = None
            if dtype and math.prod(size) * dtype.itemsize > IN_MEMORY_BYTES:
                stored = _open_raw(path, data, (size[0], size[1], size[2]), dtype, scratch, stack)
            if stored is None:
                stored = _Array(SimpleITK.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0))
    except (RuntimeError, zlib.error) as error:
        _read_through(data)
        raise ReadError("damaged volume (SimpleITK cannot read it)") from error
    _shape(stored.shape, stored.dtype)
    return stored, (1.0, 0.0), _checked(affine)


def _read_through(path: str) -> None:
    """Raises OSError if the storage fails rather than the file, which libraries do not always tell apart."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


_TYPES = {
    getattr(SimpleITK, f"sitk{name}{bits}"): np.dtype(f"{kind}{bits // 8}")
    for name, kind, sizes in (("UInt", "u", (8, 16, 32, 64)), ("Int", "i", (8, 16, 32, 64)), ("Float", "f", (32, 64)))
    for bits in sizes
}
# A field of a header; pairs with := are remarks.
_FIELD = re.compile(rb"^([A-Za-z][A-Za-z ]*?)\s*[:=](?!=)[ \t]*([^\r\n]*?)\s*$", re.MULTILINE)


def _open_raw(
    path: str, data: str, size: tuple[int, int, int], dtype: np.dtype, scratch: str | None, stack: contextlib.ExitStack
) -> _File | None:
    """The values of an NRRD or MetaImage volume that are stored raw or deflated; None in all other cases."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    nrrd = start.startswith(b"NRRD")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"^ElementDataFile[^\n]*\n", start, re.MULTILINE)
    header = start[: end.end()] if end else start
    fields = {key.lower().replace(b" ", b""): value.lower() for key, value in _FIELD.findall(header)}
    if nrrd:
        packed = {b"raw": False, b"gzip": True, b"gz": True}.get(fields.get(b"encoding", b""))
        plain = all(fields.get(key, b"0") == b"0" for key in (b"byteskip", b"lineskip"))
        big, sizes = fields.get(b"endian") == b"big", fields.get(b"sizes", b"")
    else:
        packed = fields.get(b"compresseddata") == b"true"
        plain = fields.get(b"binarydata") == b"true" and fields.get(b"headersize", b"0") == b"0"
        big = b"true" in (fields.get(b"binarydatabyteordermsb"), fields.get(b"elementbyteordermsb"))
        sizes = fields.get(b"dimsize", b"")
    if packed is None or not plain or sizes.split() != [b"%d" % n for n in size]:
        return None
    if data != path:
        offset = 0
    elif end is None:
        return None
    else:
        offset = end.end()
    dtype = dtype.newbyteorder(">" if big else "<")
    if not packed:
        return _File(stack.enter_context(open(data, "rb")), offset, size, dtype)
    file = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
    with open(data, "rb") as source:
        source.seek(offset)
        _copy(_inflated(source), file, math.prod(size) * dtype.itemsize)
    return _File(file, 0, size, dtype)


def _inflated(source: BinaryIO) -> Iterator[bytes]:
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # with the head of zlib or of gzip
    while not inflate.eof and (packed := source.read(SLAB_BYTES)):
        while packed and not inflate.eof:
            if piece := inflate.decompress(packed, SLAB_BYTES):
                yield piece
            packed = inflate.unconsumed_tail


def _checked(affine: np.ndarray) -> np.ndarray:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    if np.abs(affine).max() > FARTHEST_MM:
        raise ReadError(f"its affine has a value beyond {FARTHEST_MM:,.0f} mm: where the voxels lie is unknown")
    return affine


def infer_modality(low: int | float, high: int | float) -> str:
    """ "CT" where the values look like HU (air near -1000 and nothing far below the padding values in use), else "MR"."""
    return "CT" if -4096 <= low <= -500 and high > 100 else "MR"
