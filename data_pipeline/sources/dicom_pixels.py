"""Pixels of DICOM files: which decoder reads which transfer syntax, and the stored values frame by frame."""

import contextlib
import dataclasses
import functools
import io
import os
import struct
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from typing import BinaryIO, cast

import numpy as np
import pydicom
import SimpleITK
from jaxtyping import Integer
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_partial
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from curia_common.errors import UserError
from data_pipeline.format import records
from data_pipeline.sources import mosaic
from data_pipeline.sources.base import NO_MEMORY, ImageFacts, ReadError, ReadRequest, Slice, SourceFile
from data_pipeline.sources.dicom_elements import read_plain
from data_pipeline.sources.dicom_header import (
    DOUBLE_PIXEL_DATA,
    FLOAT_PIXEL_DATA,
    PIXEL_DATA,
    Element,
    FrameGeometry,
    frame_geometries,
    frame_sizes,
    read_elements,
    text,
    transfer_syntax,
    whole_number,
)
from data_pipeline.sources.silence import guarded, silenced
from data_pipeline.sources.stored_values import (
    Digest,
    Padding,
    below_air,
    extract_bits,
    levels,
    replace_padding,
    stored_sha256,
    to_uint16,
)

# Which plugin decodes which transfer syntax: pinned, because lossy pixels depend on the decoder. The choice follows
# measurements of speed and of agreement between decoders; SimpleITK comes second for all of them.
PLUGINS = {
    RLELossless: "pylibjpeg",
    JPEGBaseline8Bit: "gdcm",
    JPEGExtended12Bit: "gdcm",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
}
UNCOMPRESSED = frozenset({
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian,
})  # fmt: skip
_WORDS = UNCOMPRESSED | {RLELossless}  # pixel data holds whole words, of which the decoders look at no bit
IN_MEMORY_BYTES = 1 << 24  # larger files are read frame by frame
LONGEST_TAIL = 1 << 16  # bytes after the pixels; GDCM takes seconds for a megabyte of zeros

_PIXEL_TAGS = [Tag(word) for word in (
    "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "RealWorldValueMappingSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PixelPaddingValue", "PixelPaddingRangeLimit",
)]  # fmt: skip
# Overlay Bit Position (60xx,0102): before 2004 overlays could lie in bits of the pixel data that are not used.
_OVERLAY_BITS = [Tag(0x6000 + group, 0x0102) for group in range(0, 0x20, 2)]
_WANTED_TAGS = frozenset(map(int, _PIXEL_TAGS + _OVERLAY_BITS))
_HEADERS_KEPT = 4
_UNDEFINED = 0xFFFFFFFF
_ITEM = 0xE000FFFE  # as a little-endian number of four bytes
_DELIMITER = struct.pack("<LL", 0xE0DDFFFE, 0)
_END_OF_IMAGE = b"\xff\xd9"  # the last marker of JPEG, JPEG-LS and JPEG 2000
_LAST_BYTES = 16  # with padding

Frame = Integer[np.ndarray, "rows columns"]


def check_plugins() -> None:
    """Checks that all decoders that PLUGINS pins are installed, so that pixels do not depend on the installation.

    Raises:
      UserError: one is missing.
    """
    missing = {plugin for syntax, plugin in PLUGINS.items() if plugin not in get_decoder(syntax).available_plugins}
    if missing:
        raise UserError(
            f"no decoder {', '.join(sorted(missing))} for compressed DICOM; install the extra: pip install 'curia-jax[ingest]'"
        )


# ---- the reader


class DicomFile:
    """The SourceFile of a DICOM file: those of its frames that the request names."""

    excluded = ""

    def __init__(self, request: ReadRequest, image: "Image") -> None:
        self.facts = ImageFacts(request.modality, request.units or ("HU" if request.modality == "CT" else "arbitrary"))
        self.decoder = self.stored_sha256 = ""
        self._request, self._image = request, image

    def slices(self) -> Iterator[Slice]:
        image, header, hu = self._image, self._image.header, self.facts.units == "HU"
        wanted = {frame: (rank, position) for rank, (frame, position) in enumerate(self._request.frames)}
        digest = Digest(self._request.digest)
        for number, (values, own) in enumerate(self._frames(digest)):
            if number not in wanted:
                continue
            padding = header.padding
            if header.photometric == "MONOCHROME1" and not hu:
                # High values are meant to be seen dark. HU mean the same however they are shown.
                mirror = -1 if header.signed else (1 << header.bits_stored) - 1
                values = mirror - values.astype(np.int64)
                padding = padding and Padding(mirror - padding.high, mirror - padding.low)
            place = header.geometry[0 if self._request.tiles else number]
            # The one look at all pixels; what is counted later follows from how many have which value.
            image_values, known, padded = values, levels(values), 0
            if padding is not None:
                image_values, padded = replace_padding(values, known, padding, place.slope, place.intercept, hu=hu)
                known = known if image_values is values else levels(image_values)
            pixels, slope, intercept, clipped = to_uint16(image_values, place.slope, place.intercept, hu=hu)
            stored, *_ = to_uint16(known.values[None], place.slope, place.intercept, hu=hu)
            flags = self._request.flags | (clipped if image_values is values else records.CLIPPED)
            rank, position = wanted[number]
            yield Slice(
                rank, pixels, slope, intercept, position, flags, own or digest.hex(),
                (place.spacing[0], place.spacing[1]) if place.spacing else (0.0, 0.0),
                rescale=(place.slope, place.intercept) if place.declared else None,
                below=below_air(known, place.slope, place.intercept, padding) if hu and clipped else (),
                padded=padded, histogram=np.bincount(stored[0], weights=known.counts).astype(np.int64),
            )  # fmt: skip
        self.stored_sha256, self.decoder = digest.hex(), image.decoder

    def _frames(self, digest: Digest) -> Iterator[tuple["Frame", str]]:
        """Frames, or slices of a mosaic, with their own digests; "" where the file has but one. All of the file goes into `digest`."""
        for values in self._image.stored():
            own = digest.add(values, also_alone=self._image.header.frames > 1)
            if not self._request.tiles:
                yield values, own
                continue
            for tile in mosaic.split(values, self._request.tiles):
                yield tile, stored_sha256(tile, self._request.digest)


@contextlib.contextmanager
def open_dicom(request: ReadRequest) -> Iterator[SourceFile]:
    """The reader of DICOM files; see data_pipeline.sources.base."""
    with open_image(request.path) as image:
        yield DicomFile(request, image)


# ---- stored values


@dataclasses.dataclass(frozen=True, eq=False)
class PixelHeader:
    """What the header of a file says of its pixels.

    Attributes:
      frame_bytes: of an uncompressed frame; bits of several frames can share a byte.
      bits_stored: of a value.
      signed: values are two's complement.
      high_bit: of a word of uncompressed pixel data, in which values can lie anywhere.
      overlays: numbers of the bits that hold overlays.
      padding: stored values that are not part of the image; None where the header names none.
      geometry: one per frame; spacing and rescaling alone, positions are known from the header before.
      dataset: for the decoders.
    """

    syntax: str
    frames: int
    frame_bytes: float
    photometric: str
    bits_stored: int
    signed: bool
    high_bit: int
    overlays: frozenset[int]
    padding: Padding | None
    geometry: tuple[FrameGeometry, ...]
    dataset: Dataset


@dataclasses.dataclass
class Image:
    """An open file.

    Attributes:
      decoder: libraries that decoded the frames, set while they are read.
    """

    path: str
    header: PixelHeader
    decoder: str
    _representation: str  # of the pixel data
    _source: BufferedIOBase  # at their first byte: the file, or its content

    def stored(self) -> Iterator[Frame]:
        """The stored values before any rescaling, frame by frame, so that only one frame is in memory.

        The plugin pinned in PLUGINS decodes; from the first frame that it cannot decode, SimpleITK (GDCM) does.

        Raises:
          ReadError: no decoder reads the pixels, or there are more frames than the header states.
        """
        header = self.header
        plugin = PLUGINS.get(UID(header.syntax), "")
        self.decoder = f"pydicom {pydicom.__version__} {plugin}".strip()
        decoded = _decode_with_pydicom(header, self._representation, self._source, plugin)
        count, second = 0, False
        while True:
            try:
                with silenced():
                    values = next(decoded, None)
                if values is None and count < header.frames:
                    raise ValueError("fewer frames than the header states")
            except MemoryError as error:
                raise ReadError(NO_MEMORY) from error
            except (KeyboardInterrupt, SystemExit, ReadError):
                raise
            except BaseException as error:  # noqa: BLE001 - each plugin raises its own kinds, and those in Rust no Exception
                if isinstance(error, OSError) and error.errno:  # of the disk
                    raise
                failure = type(error).__name__
                if second:
                    raise ReadError(f"the pixels cannot be decoded (SimpleITK: {failure})") from error
                second, name = True, f"SimpleITK {SimpleITK.Version.VersionString()}"
                self.decoder = name if not count else f"{self.decoder}, {name}"
                decoded = decode_with_simpleitk(self.path, header.geometry, start=count, first_failure=failure)
                continue
            if values is None:
                return
            count += 1
            if count > header.frames:
                raise ReadError(f"the header states {header.frames} frames, the file holds more")
            if values.ndim != 2:
                raise ReadError("colour image")
            if values.dtype.kind not in "iu":
                raise ReadError(f"pixels are {values.dtype}, not integers")
            if not second and header.syntax in _WORDS:
                values = extract_bits(
                    values, header.bits_stored, header.high_bit, signed=header.signed, overlays=header.overlays
                )
            yield values


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image]:
    """Parses what precedes the pixels of a file and leaves it open for reading them.

    Raises:
      ReadError: the header is damaged, there are no pixels, they are cut off, or they have several samples each.
    """
    with open(path, "rb") as file:
        small = os.fstat(file.fileno()).st_size <= IN_MEMORY_BYTES
        # The parser asks for its position after every element, a system call for a file and none for memory.
        content = file.read() if small else b""
        with guarded("malformed header ({place})"):  # values are parsed on access
            plain = read_plain(content, _WANTED_TAGS, FLOAT_PIXEL_DATA, PLUGINS)
            if plain is not None:
                header = _plain_header(plain.syntax, plain.fields, plain.last)
                image = _image(path, header, io.BytesIO(plain.content), plain.begin, plain.last)
        if plain is None:
            source = io.BytesIO(content) if small else file
            dataset, last = read_elements(source, _PIXEL_TAGS + _OVERLAY_BITS, stop=FLOAT_PIXEL_DATA)
            with guarded("malformed header ({place})"):
                header = _pixel_header(dataset, transfer_syntax(dataset), last)
                assert last is not None  # it has pixels
                # Of a deflated file pydicom keeps the inflated content, in a wrapper.
                if isinstance(dataset.buffer, DicomBytesIO):
                    source = cast(BufferedIOBase, dataset.buffer.parent)
                begin = source.tell() + (12 if last.representation in EXPLICIT_VR_LENGTH_32 else 8)
                image = _image(path, header, source, begin, last)
        yield image


def read_stored(path: str) -> tuple[Integer[np.ndarray, "frames rows columns"], str]:
    """All frames of a file at once, and what decoded them; see Image."""
    with open_image(path) as image:
        return np.stack(list(image.stored())), image.decoder


@functools.lru_cache(maxsize=_HEADERS_KEPT)
def _plain_header(syntax: UID, fields: tuple[RawDataElement, ...], last: Element) -> PixelHeader:
    """The header with these elements: in most series that of all slices, so that it is parsed once."""
    return _pixel_header(Dataset({field.tag: field for field in fields}), syntax, last)


def _pixel_header(dataset: Dataset, syntax: str, last: Element | None) -> PixelHeader:
    if not syntax:
        raise ReadError("no transfer syntax: how the pixels are encoded is unknown")
    if last is not None and last.tag in (FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA):
        raise ReadError(
            "its pixels are floating-point numbers, which are not read; store them as integers with a rescale"
        )
    if last is None or last.tag != PIXEL_DATA:
        raise ReadError("no pixel data")
    if whole_number(dataset, "SamplesPerPixel", 1) != 1:
        raise ReadError("colour image")
    frames, rows, columns = frame_sizes(dataset)
    bits = whole_number(dataset, "BitsStored", 16)
    signed = whole_number(dataset, "PixelRepresentation", 0) == 1
    return PixelHeader(
        syntax=syntax, frames=frames, frame_bytes=rows * columns * whole_number(dataset, "BitsAllocated", 0) / 8,
        photometric=text(dataset, "PhotometricInterpretation"),
        bits_stored=bits, signed=signed, high_bit=whole_number(dataset, "HighBit", bits - 1),
        overlays=frozenset(int(dataset[tag].value or 0) for tag in _OVERLAY_BITS if tag in dataset),
        padding=_padding(dataset, signed), geometry=frame_geometries(dataset, frames), dataset=dataset,
    )  # fmt: skip


def _image(path: str, header: PixelHeader, source: BufferedIOBase, begin: int, last: Element) -> Image:
    """The image whose pixels begin at an offset of `source`."""
    source.seek(0, os.SEEK_END)
    found = min(last.length, source.tell() - begin)
    source.seek(begin)
    if header.syntax in UNCOMPRESSED:
        wanted = int(header.frame_bytes * header.frames)
        if found < wanted:
            raise ReadError(f"truncated: the pixel data has {found:,} of {wanted:,} bytes")
        if header.frame_bytes and found // header.frame_bytes > header.frames:
            raise ReadError(f"the header states {header.frames} frames, the file holds more")
    elif last.length == _UNDEFINED:
        source = _ended_items(source, header.syntax)
    else:  # against the standard; the end of the items has to be the end of the source
        source = io.BytesIO(source.read(last.length))
    return Image(path, header, "", last.representation or "OW", source)


def _padding(dataset: Dataset, signed: bool) -> Padding | None:
    """Writers disagree on whether the two elements are signed where pixels are: 63536 is -2000 in 16 bits."""
    if dataset.get("PixelPaddingValue") in (None, ""):
        return None
    bits = whole_number(dataset, "BitsAllocated", 16)

    def wrapped(name: str, default: int) -> int:
        value = whole_number(dataset, name, default) % (1 << bits)
        return value - (1 << bits) if signed and value >= 1 << bits - 1 else value

    value = wrapped("PixelPaddingValue", 0)
    limit = wrapped("PixelPaddingRangeLimit", value)
    return Padding(min(value, limit), max(value, limit))


def _ended_items(source: BufferedIOBase, syntax: str) -> BufferedIOBase:
    """Compressed pixel data, at its first item, with the delimiter that some programs leave out or write as zeros.

    Raises:
      ReadError: it is cut off; decoders would take the rest for an image.
    """
    begin = at = source.tell()
    source.seek(0, os.SEEK_END)
    size, tag = source.tell(), _ITEM
    while at + 8 <= size:
        source.seek(at)
        tag, length = struct.unpack("<LL", source.read(8))
        if tag != _ITEM or length == _UNDEFINED:
            break
        at += 8 + length
    ended = at + 8 <= size
    if not ended or tag == 0:
        # Every item is there whole. Whether the last one ends a frame, only its codestream says, or RLE, with one item a frame.
        source.seek(max(begin, min(at, size) - _LAST_BYTES))
        last = source.read(min(at, size) - source.tell()).rstrip(b"\0")
        if begin < at <= size and (syntax == RLELossless or last.endswith(_END_OF_IMAGE)):
            source.seek(begin)
            return io.BytesIO(source.read(at - begin) + _DELIMITER)
        if not ended:
            raise ReadError("truncated: the compressed pixel data has no end")
    source.seek(begin)  # at something else than an item the decoders judge
    return source


# ---- decoders: frames, to be advanced under silenced()


def _decode_with_pydicom(
    header: PixelHeader, representation: str, source: BufferedIOBase, plugin: str
) -> Iterator[Frame]:
    options = as_pixel_options(header.dataset, pixel_keyword="PixelData", pixel_vr=representation)
    if header.syntax in UNCOMPRESSED:
        options["view_only"] = True  # nobody writes to what was read, so it needs no copy
    if header.syntax in _WORDS:
        options["correct_unused_bits"] = False  # extract_bits does more
    for values, _ in get_decoder(header.syntax).iter_array(
        cast(BinaryIO, source), raw=True, decoding_plugin=plugin, **options
    ):
        yield values


def decode_with_simpleitk(
    path: str, geometry: Sequence[FrameGeometry], *, start: int = 0, first_failure: str = ""
) -> Iterator[Frame]:
    """Frames from number `start` on, stored values. GDCM decodes a file whole, and rescales, which is undone.

    Args:
      first_failure: what pydicom raised, for the message.

    Raises:
      ReadError: SimpleITK cannot decode the file either, or it rescales so that stored values cannot be known.
    """
    failed = f"the pixels cannot be decoded (pydicom: {first_failure}; SimpleITK "
    tail = os.path.getsize(path) - _end_of_pixels(path)
    if tail > LONGEST_TAIL:
        raise ReadError(f"{failed}is not asked, because it reads what follows the pixels too, {tail:,} bytes)")
    rescales = {(place.slope, place.intercept) for place in geometry}
    if len(rescales) > 1:
        raise ReadError(f"{failed}mixes up frames of several rescale slopes)")
    slope, intercept = rescales.pop()
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        image = reader.Execute()
    except RuntimeError as error:
        raise ReadError(f"{failed}refused them too)") from error
    frames = SimpleITK.GetArrayFromImage(image)
    del image
    for frame in (frames if frames.ndim == 3 else frames[None])[start:]:
        values = frame.astype(np.float64)
        stored = np.rint((values - intercept) / slope)
        if np.abs(stored * slope + intercept - values).max() > 1e-3 * max(1.0, abs(slope)):
            raise ReadError(f"{failed}rescales them otherwise)")
        yield stored.astype(np.int32)


def _end_of_pixels(path: str) -> int:
    with open(path, "rb") as file:
        stop = PIXEL_DATA + 1
        read_partial(
            file, stop_when=lambda tag, *_: int(tag) >= stop or int(tag) == 0, force=True, specific_tags=[Tag(0)]
        )
        return file.tell()
