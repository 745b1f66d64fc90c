"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd): SimpleITK parses headers; what its readers leave out is read here: checksums, units of
length, and the intensity function of MetaImage.
"""

import contextlib
import math
import os
import re

import numpy as np
import SimpleITK
from jaxtyping import Float64

from data_pipeline.sources import deflate, voxels
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.silence import silenced

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
HEADER_BYTES = 1 << 16

Scaling = tuple[float, float]
Affine = Float64[np.ndarray, "4 4"]

_TYPES = {
    getattr(SimpleITK, f"sitk{name}{bits}"): np.dtype(f"{kind}{bits // 8}")
    for name, kind, sizes in (("UInt", "u", (8, 16, 32, 64)), ("Int", "i", (8, 16, 32, 64)), ("Float", "f", (32, 64)))
    for bits in sizes
}
# A field of a header; pairs with := are remarks.
_FIELD = re.compile(rb"^([A-Za-z][A-Za-z ]*?)\s*[:=](?!=)[ \t]*([^\r\n]*?)\s*$", re.MULTILINE)
# What is read here; MetaImage's only compression is zlib's, which inflated reads like gzip's.
_ENCODINGS = {
    b"raw": None, b"gzip": deflate.inflated, b"gz": deflate.inflated, b"bzip2": deflate.bunzipped, b"bz2": deflate.bunzipped,
}  # fmt: skip
# Names of units in NRRD and MetaImage, which leave the text free, in mm.
_UNITS_MM = {
    name: size
    for size, names in (
        (1.0, ("mm", "millimeter", "millimeters", "millimetre", "millimetres")),
        (0.001, ("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres")),
        (10.0, ("cm", "centimeter", "centimeters", "centimetre", "centimetres")),
        (1000.0, ("m", "meter", "meters", "metre", "metres")),
    )
    for name in names
}  # fmt: skip


def open_itk(
    path: str, scratch: str | None, stack: contextlib.ExitStack
) -> tuple[voxels.Array | voxels.File, Scaling, Affine]:
    """Stored values, their slope and intercept, and the affine in mm to axes right, front, up.

    Raises:
      ReadError: it is damaged, or its header leaves open what it means.
    """
    data = _data_file(path)
    fields, begin = _fields(path)
    reader = SimpleITK.ImageFileReader()
    # By the name alone: ITK would try every format that it knows, some of which open other files.
    reader.SetImageIO("NrrdImageIO" if path.lower().endswith((".nrrd", ".nhdr")) else "MetaImageIO")
    reader.SetFileName(path)
    try:
        with silenced():
            reader.ReadImageInformation()
            components, size = reader.GetNumberOfComponents(), reader.GetSize()
            dtype = _TYPES.get(reader.GetPixelID())
            voxels.check_size(math.prod((*size, components)) * (dtype.itemsize if dtype else 1), data)
            if components != 1:
                raise ReadError(
                    f"{components} values per voxel (colours, vectors or a time series); write one volume per file, with one number per voxel"
                )
            if reader.GetDimension() != 3:
                raise ReadError(f"{reader.GetDimension()} dimensions; slices come from volumes of 2 or 3")
            affine = np.eye(4)
            affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * np.array(reader.GetSpacing())
            affine[:2] *= -1  # ITK's axes point left and back, NIfTI's right and front
            affine[:3] *= _unit(fields)
            scaling = _scaling(fields)
            stored = None
            if dtype is not None:
                stored = _open_raw(path, data, fields, begin, (size[0], size[1], size[2]), dtype, scratch, stack)
            if stored is None:
                stored = voxels.Array(SimpleITK.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0))
    except RuntimeError as error:
        _read_through(data)
        raise ReadError("damaged volume (SimpleITK cannot read it)") from error
    voxels.check_shape(stored.shape, stored.dtype)
    return stored, scaling, affine


def _fields(path: str) -> tuple[dict[bytes, bytes], int]:
    """Fields of the header, in lower case, and where it ends; 0 if it does not."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n" if start.startswith(b"NRRD") else rb"^ElementDataFile[^\n]*\n", start, re.MULTILINE)
    header = start[: end.end()] if end else start
    return {
        key.lower().replace(b" ", b""): value.lower() for key, value in _FIELD.findall(header)
    }, end.end() if end else 0


def _unit(fields: dict[bytes, bytes]) -> float:
    """Millimetres per unit of length."""
    text = fields.get(b"spaceunits", fields.get(b"units", fields.get(b"distanceunits", b""))).decode("utf-8", "replace")
    names = {name.strip() for name in (re.findall(r'"([^"]*)"', text) or text.split())} - {"", "?"}
    if not names:
        return 1.0
    if len(names) > 1 or (unit := _UNITS_MM.get(names.pop())) is None:
        raise ReadError("its header states an unknown unit of length, or several; wanted is one of um, mm, cm and m")
    return unit


def _scaling(fields: dict[bytes, bytes]) -> Scaling:
    """Of MetaImage; an NRRD that was quantised has no scaling that all programs agree on."""
    if b"oldmin" in fields or b"oldmax" in fields:
        raise ReadError("its values were quantised (old min, old max); write the volume with its own values")
    try:
        slope = float(fields.get(b"elementtointensityfunctionslope", b"1"))
        offset = float(fields.get(b"elementtointensityfunctionoffset", b"0"))
    except ValueError as error:
        raise ReadError("damaged volume: ElementToIntensityFunction is not a number") from error
    if not (math.isfinite(slope) and math.isfinite(offset) and slope):
        raise ReadError("damaged volume: ElementToIntensityFunction is 0 or not finite")
    return slope, offset


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


def _read_through(path: str) -> None:
    """Raises OSError if the storage fails rather than the file, which SimpleITK does not tell apart."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def _open_raw(
    path: str, data: str, fields: dict[bytes, bytes], begin: int, size: tuple[int, int, int], dtype: np.dtype,
    scratch: str | None, stack: contextlib.ExitStack,
) -> voxels.Array | voxels.File | None:  # fmt: skip
    """Values that are stored raw or compressed; None in unusual forms: text, skipped lines.

    Args:
      fields, begin: of the header of `path`, and where it ends.
      data: the file with the values.
    """
    try:
        if b"sizes" in fields:  # NRRD
            encoding = fields.get(b"encoding", b"")
            big, sizes = fields.get(b"endian") == b"big", fields[b"sizes"]
            lines, skip = int(fields.get(b"lineskip", b"0")), int(fields.get(b"byteskip", b"0"))
        else:
            plain = fields.get(b"binarydata") == b"true" and fields.get(b"headersize", b"0") == b"0"
            encoding = (b"gzip" if fields.get(b"compresseddata") == b"true" else b"raw") if plain else b""
            big = b"true" in (fields.get(b"binarydatabyteordermsb"), fields.get(b"elementbyteordermsb"))
            sizes, lines, skip = fields.get(b"dimsize", b""), 0, 0
    except ValueError as error:
        raise ReadError("damaged volume: a number of skipped lines or bytes is not a number") from error
    # The size of a "long" differs between programs.
    long = fields.get(b"elementtype") in (b"met_long", b"met_ulong")
    if (
        encoding not in _ENCODINGS
        or long
        or lines
        or sizes.split() != [b"%d" % n for n in size]
        or (data == path and not begin)
    ):
        return None
    dtype = dtype.newbyteorder(">" if big else "<")
    start = begin if data == path else 0
    file = stack.enter_context(open(data, "rb"))
    if (unpack := _ENCODINGS[encoding]) is not None:
        if skip < 0:
            return None
        file.seek(start)
        return voxels.unpacked(unpack(file, "volume"), voxels.Layout(skip, size, dtype), scratch, stack)
    layout = voxels.Layout(start + skip, size, dtype)
    if skip < 0:  # the values are the last bytes
        layout = layout._replace(offset=os.path.getsize(data) - layout.size)
    return voxels.stored_in(file, layout)
