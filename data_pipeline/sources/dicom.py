"""DICOM files: whitelisted headers and stored pixel values.

Nothing leaves this module but the fields of Header: no names, dates, free text or private tags.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
import pydicom.config
import SimpleITK
from jaxtyping import Integer, Shaped
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from curia_common.errors import UserError, fault_location
from data_pipeline.sources.base import NO_MEMORY, ReadError
from data_pipeline.sources.geometry import FARTHEST_MM

# Messages of the readers quote header values; none of them may reach a log.
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
pydicom.config.logger.disabled = True
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# Which plugin decodes which transfer syntax: pinned, because lossy pixels depend on the decoder. The order and the
# choice follow measurements of speed and of agreement between decoders; SimpleITK comes second for all of them.
PLUGINS = {
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE
    "1.2.840.10008.1.2.4.50": "gdcm",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG extended
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG lossless, first order
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS near lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}
LOSSY_SYNTAXES = frozenset(
    f"1.2.840.10008.1.2.4.{end}" for end in ("50", "51", "53", "55", "81", "91", "203")
)  # .81, .91 and .203 may hold lossless data; the tag LossyImageCompression decides where it is present
DICOMDIR = "1.2.840.10008.1.3.10"  # Media Storage Directory, the index of a CD
MAXIMUM_FRAMES = 65_536
MAXIMUM_PIXELS = 1 << 26  # of a frame: 8,192 x 8,192; none has a twentieth
IN_MEMORY_BYTES = 1 << 24  # larger files are read frame by frame
# Implicit, explicit, deflated and big-endian: the pixels themselves, where others have items of compressed data.
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")

# The fields below and no others are read from a header.
_HEADER_TAGS = [Tag(word) for word in (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel",
    "BurnedInAnnotation", "BodyPartExamined", "Manufacturer", "PixelSpacing", "SliceThickness", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "LossyImageCompression", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "SeriesDescription",
)]  # fmt: skip

# What decoding and rescaling need.
_PIXEL_TAGS = [Tag(word) for word in (
    "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)]  # fmt: skip
_PIXEL_DATA, _FLOAT_PIXEL_DATA = 0x7FE00010, 0x7FE00008
_UNDEFINED = 0xFFFFFFFF
_ITEM = 0xE000FFFE  # as a little-endian number of four bytes
LONGEST_TAIL = 1 << 16  # bytes after the pixels; GDCM takes seconds for a megabyte of zeros
MAXIMUM_ELEMENTS = 50_000  # of a data set; each costs time, and noise can hold millions

# Defined terms of BodyPartExamined (DICOM PS3.16, tables L-1 and L-2), without spaces and underscores. Whatever else
# somebody typed into the tag, a name for example, is dropped.
BODY_PARTS = frozenset(
    """abdomen abdomenpelvis adrenal ankle aorta aorticarch arm axilla back bladder brachialplexus brain breast bronchus
    buttock calcaneus calf cardiac carotid cerebellum cervix chest chestabdomen chestabdomenpelvis circleofwillis clavicle
    coccyx colon cspine ctspine cervicalspine duodenum ear elbow esophagus extremity eye eyelid face femoralartery femur finger
    foot forearm gallbladder hand head headneck heart hip humerus iac ileum ilium jaw jejunum kidney knee larynx leg legs
    liver lowerextremity lowerleg lspine lsspine lumbarspine lung lungs mandible maxilla mediastinum mouth nasopharynx neck
    neckchest neckchestabdomen neckchestabdomenpelvis nose orbit orbits ovary pancreas parathyroid parotid patella pelvis
    penis petrousbone pharynx pituitary prostate pulmonaryartery radius rectum renalartery rib ribs sacrum scalp scapula
    sella shoulder sijoint sinus sinuses skull spine spleen sspine sternum stomach submandibular temporalbone testis thigh
    thoracicspine thorax thumb thymus thyroid tibia tibiafibula tlspine tmj toe tongue trachea tspine ulna upperextremity
    ureter urethra uterus vagina vulva wholebody wrist zygoma""".split()
)

# Those in which a face can be seen, whole or in part.
FACES = frozenset("brain ear eye eyelid face head headneck jaw mandible maxilla mouth nose orbit orbits scalp sella sinus "
                  "sinuses skull temporalbone tmj iac circleofwillis cerebellum neck neckchest neckchestabdomen "
                  "neckchestabdomenpelvis cspine cervicalspine petrousbone nasopharynx pharynx larynx parotid submandibular "
                  "pituitary thyroid parathyroid tongue carotid wholebody".split())  # fmt: skip

# Classes of manufacturers; the text of the tag itself does not leave this module.
_MANUFACTURERS = ("siemens", "philips", "toshiba", "canon", "hitachi", "fujifilm", "hyperfine", "ge", "united imaging")


@dataclasses.dataclass(frozen=True)
class FrameGeometry:
    """Where one frame lies and how its values are rescaled; None where the header does not say.

    Attributes:
      orientation: direction cosines of a row and of a column.
      position: centre of the first pixel, mm, patient coordinates (x to the left, y to the back, z up).
      spacing: between rows and between columns, mm.
    """

    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float


@dataclasses.dataclass(frozen=True)
class Header:
    """Whitelisted fields of a file; uids and patient_id serve for pseudonyms and go no further."""

    path: str
    sop_class: str
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    frames: int
    photometric: str
    samples_per_pixel: int
    bits_stored: int
    signed: bool
    burned_in: bool
    called_localizer: bool
    body_part: str
    manufacturer: str
    thickness: float
    lossy: bool
    has_pixels: bool
    geometry: tuple[FrameGeometry, ...]


def check_plugins() -> None:
    """Asks for the decoders that PLUGINS pins, so that the pixels do not depend on what happens to be installed.

    Raises:
      UserError: one is missing.
    """
    missing = {plugin for syntax, plugin in PLUGINS.items() if plugin not in get_decoder(syntax).available_plugins}
    if missing:
        raise UserError(
            f"no decoder {', '.join(sorted(missing))} for compressed DICOM; install the extra: pip install 'curia-jax[ingest]'"
        )


def is_dicom(file: io.BufferedIOBase) -> bool:
    """True for a file with the DICM mark, or one that starts with a plausible data set without it; reads on from its start."""
    start = file.read(132)
    file.seek(0)
    if start[128:132] == b"DICM":
        return True
    # Old files start with a tag of group 0002 or 0008, little- or big-endian.
    return start[:2] in (b"\x08\x00", b"\x02\x00") or start[:4] in (b"\x00\x08\x00\x05", b"\x00\x08\x00\x08")


def read_header(path: str, file: io.BufferedIOBase | None = None) -> Header:
    """Reads the whitelisted fields; no pixels.

    Args:
      file: the open file, where it lies in an archive.

    Raises:
      ReadError: it is not DICOM, or is cut off before the pixels.
    """
    with open(path, "rb") if file is None else contextlib.nullcontext(file) as source:
        dataset, _ = _read(source, _HEADER_TAGS, stop=_FLOAT_PIXEL_DATA)
    try:
        with warnings.catch_warnings(action="ignore"):
            if "SOPClassUID" not in dataset and "Rows" not in dataset and not _is_dicomdir(dataset):
                raise ReadError("not a DICOM image: it has neither a SOP class nor rows")
            return _header(path, dataset)
    except ReadError:
        raise
    except Exception as error:  # values are parsed when they are asked for, and each parser raises its own kinds
        raise ReadError(f"malformed header ({fault_location(error)})") from error


def _read(
    file: io.BufferedIOBase, tags: Sequence[BaseTag], stop: int
) -> tuple[Dataset, tuple[int, str | None, int] | None]:
    """The elements with these tags, of those before the tag `stop`; and tag, representation and length of the one at which
    reading ended."""
    seen = 0
    last = None

    def ends(tag: BaseTag, representation: str | None, length: int) -> bool:
        nonlocal seen, last
        seen += 1
        if seen > MAXIMUM_ELEMENTS:
            raise ReadError(f"damaged DICOM file: more than {MAXIMUM_ELEMENTS:,} elements before the pixels")
        number = int(tag)  # tags compare slowly
        if number < stop and number:  # zeros are padding, or what was never written
            return False
        last = number, representation, length
        return True

    try:
        with warnings.catch_warnings(action="ignore"):
            return read_partial(file, stop_when=ends, force=True, specific_tags=tags), last
    except (ReadError, UserError):
        raise
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error
    except Exception as error:  # pydicom raises many kinds on damaged files, with header values in their texts
        if isinstance(error, OSError) and error.errno:
            raise
        raise ReadError(f"damaged DICOM file ({type(error).__name__} while reading the header)") from error


def _whole(dataset: Dataset, name: str, default: int) -> int:
    try:
        value = dataset.get(name)
        return default if value in (None, "") else int(value)
    except Exception as error:  # values are parsed when they are asked for, and each parser raises its own kinds
        raise ReadError(f"malformed header: {name} is no whole number") from error


def _header(path: str, dataset: Dataset) -> Header:
    def text(name: str) -> str:
        value = dataset.get(name)
        return "" if value is None else str(value).strip()

    syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", "")) if hasattr(dataset, "file_meta") else ""
    image_type = dataset.get("ImageType") or ()
    lossy = text("LossyImageCompression")
    frames, rows, columns = _sizes(dataset)
    return Header(
        path=path,
        sop_class=DICOMDIR if _is_dicomdir(dataset) else text("SOPClassUID"),
        sop_uid=text("SOPInstanceUID"),
        series_uid=text("SeriesInstanceUID"),
        study_uid=text("StudyInstanceUID"),
        patient_id=text("PatientID"),
        modality=text("Modality"),
        image_type=tuple(str(v).upper() for v in ([image_type] if isinstance(image_type, str) else image_type)),
        rows=rows,
        columns=columns,
        frames=frames,
        photometric=text("PhotometricInterpretation"),
        samples_per_pixel=_whole(dataset, "SamplesPerPixel", 1),
        bits_stored=_whole(dataset, "BitsStored", 16),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        burned_in=text("BurnedInAnnotation").upper() == "YES",
        called_localizer=_is_called_localizer(dataset),
        body_part=_body_part(text("BodyPartExamined")),
        manufacturer=next((m for m in _MANUFACTURERS if m in text("Manufacturer").lower()), "unknown"),
        thickness=_thickness(dataset),
        lossy=lossy == "01" if lossy in ("00", "01") else syntax in LOSSY_SYNTAXES,
        has_pixels="BitsAllocated" in dataset and "Rows" in dataset,
        geometry=_geometries(dataset, frames),
    )


def _sizes(dataset: Dataset) -> tuple[int, int, int]:
    """Frames, rows and columns, where they can be real."""
    frames = _whole(dataset, "NumberOfFrames", 1)
    if not 1 <= frames <= MAXIMUM_FRAMES:
        raise ReadError(f"the header promises {frames:,} frames; 1 to {MAXIMUM_FRAMES:,} can be real")
    rows, columns = _whole(dataset, "Rows", 0), _whole(dataset, "Columns", 0)
    if rows * columns > MAXIMUM_PIXELS:
        raise ReadError(f"the header promises {rows:,} x {columns:,} px; a frame may have {MAXIMUM_PIXELS:,}")
    return frames, rows, columns


def _is_dicomdir(dataset: Dataset) -> bool:
    return str(getattr(getattr(dataset, "file_meta", None), "MediaStorageSOPClassUID", "")) == DICOMDIR


def read_dicomdir(path: str) -> list[str]:
    """The files that a DICOMDIR names, each a relative path of plain parts, in its order.

    Raises:
      ReadError: it is no DICOMDIR, is damaged, or names a file outside its folder.
    """
    with open(path, "rb") as file:
        dataset, _ = _read(file, [Tag("DirectoryRecordSequence")], stop=_FLOAT_PIXEL_DATA)
    if not _is_dicomdir(dataset):
        raise ReadError("not a DICOMDIR")
    try:
        records = [record.get("ReferencedFileID") for record in dataset.get("DirectoryRecordSequence") or ()]
        names = [[str(part) for part in ([name] if isinstance(name, str) else name)] for name in records if name]
    except Exception as error:  # values are parsed when they are asked for
        raise ReadError(f"malformed DICOMDIR ({fault_location(error)})") from error
    if any(part in ("", ".", "..") or set(part) & set("/\\\0") for parts in names for part in parts):
        raise ReadError("it names a file outside its folder")
    return ["/".join(parts) for parts in names]


def _body_part(text: str) -> str:
    word = text.lower().replace("_", "").replace(" ", "")
    return word if word in BODY_PARTS else ""


# What technicians and scanners call localizers; Siemens writes a type that tells them from no other series.
_LOCALIZER = re.compile(
    rb"locali[sz]er|scout|topogram|scanogram|surview|(?<![a-z])(?:3|three)[- _]?plane(?![a-z])", re.IGNORECASE
)


def _is_called_localizer(dataset: Dataset) -> bool:
    """Whether the series' description says so; the text itself does not leave this function, nor is it decoded."""
    element = dataset.get_item("SeriesDescription")
    value = None if element is None else element.value
    return isinstance(value, bytes) and _LOCALIZER.search(value) is not None


def _thickness(dataset: Dataset) -> float:
    """A description only, so that one which is no number costs nothing."""
    try:
        return _floats(dataset.get("SliceThickness"), 1, (0.0,))[0]
    except (ValueError, TypeError):
        return 0.0


def _floats(value: Any, count: int, default: Any = None) -> Any:
    if value is None or value == "":
        return default
    values = [float(v) for v in (value if hasattr(value, "__len__") and not isinstance(value, str) else [value])]
    return tuple(values) if len(values) == count and all(map(math.isfinite, values)) else default


def _geometries(dataset: Dataset, frames: int) -> tuple[FrameGeometry, ...]:
    """One per frame; those that have no item of their own share one, however many a header promises."""
    own = min(frames, len(dataset.get("PerFrameFunctionalGroupsSequence") or ()))
    found = [_geometry(dataset, frame) for frame in range(own)]
    return tuple(found + [_geometry(dataset, own)] * (frames - own) if own < frames else found)


def _geometry(dataset: Dataset, frame: int) -> FrameGeometry:
    places = [dataset]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        sequence = dataset.get(name)
        if sequence:
            index = frame if name.startswith("Per") else 0
            if index < len(sequence):
                for group in (
                    "PlaneOrientationSequence",
                    "PlanePositionSequence",
                    "PixelMeasuresSequence",
                    "PixelValueTransformationSequence",
                ):
                    if sequence[index].get(group):
                        places.append(sequence[index].get(group)[0])

    def find(name: str, count: int) -> Any:
        for place in reversed(places):
            if name in place:
                values = number(place.get(name), name, count)
                return None if values is None or max(map(abs, values)) > FARTHEST_MM else values
        return None

    def number(value: Any, name: str, count: int, default: Any = None) -> Any:
        try:
            return _floats(value, count, default)
        except (ValueError, TypeError, OverflowError) as error:
            raise ReadError(f"malformed header: {name} is no number") from error

    def rescale(name: str, default: float) -> float:
        for place in reversed(places):
            if (value := place.get(name)) not in (None, ""):
                values = number(value, name, 1)
                if values is None:
                    raise ReadError(f"{name} is no finite number: what the stored values mean is unknown")
                return values[0]
        return default

    slope = rescale("RescaleSlope", 1.0)
    if slope == 0:
        raise ReadError("RescaleSlope is 0: every pixel would have the same value")
    return FrameGeometry(
        orientation=find("ImageOrientationPatient", 6),
        position=find("ImagePositionPatient", 3),
        spacing=find("PixelSpacing", 2),
        slope=slope,
        intercept=rescale("RescaleIntercept", 0.0),
    )


@dataclasses.dataclass
class Image:
    """An open file: what rescaling its frames takes, and the frames themselves.

    Attributes:
      frames, photometric, bits_stored, signed: as in Header.
      geometry: spacing and rescaling of each frame; where it lies was a matter of the plan.
      decoder: what decoded the frames, once they are read.
    """

    path: str
    frames: int
    photometric: str
    bits_stored: int
    signed: bool
    geometry: tuple[FrameGeometry, ...]
    decoder: str
    _dataset: Dataset
    _representation: str  # of the pixel data
    _source: Any  # at their first byte: the file, or its inflated content as pydicom wraps it

    def stored(self) -> Iterator[Integer[np.ndarray, "rows columns"]]:
        """The stored values before any rescaling, frame by frame, so that no more than a frame is in memory.

        The plugin pinned in PLUGINS comes first, SimpleITK (GDCM) second; from the frame on that the first cannot decode.

        Raises:
          ReadError: no decoder reads the pixels, or there are more frames than the header promises.
        """
        syntax = self._dataset.file_meta.TransferSyntaxUID
        plugin = PLUGINS.get(syntax, "")
        self.decoder = f"pydicom {pydicom.__version__} {plugin}".strip()
        decoded = _decoded(self._dataset, self._representation, self._source, plugin)
        count, second = 0, False
        while True:
            try:
                values = next(decoded, None)
                if values is None and count < self.frames:
                    raise ValueError("fewer frames than the header promises")
            except MemoryError as error:
                raise ReadError(NO_MEMORY) from error
            except (KeyboardInterrupt, SystemExit, ReadError):
                raise
            except BaseException as first:  # noqa: BLE001 - each plugin raises its own kinds, and those in Rust no Exception
                if isinstance(first, OSError) and first.errno:  # of the disk
                    raise
                if second:
                    raise ReadError(f"the pixels cannot be decoded (SimpleITK: {type(first).__name__})") from first
                second, name = True, f"SimpleITK {SimpleITK.Version.VersionString()}"
                self.decoder = name if not count else f"{self.decoder}, {name}"
                decoded = _decoded_by_itk(self.path, type(first).__name__, self.geometry, count)
                continue
            if values is None:
                return
            count += 1
            if count > self.frames:
                raise ReadError(f"the header promises {self.frames} frames, the file holds more")
            if values.ndim != 2:
                raise ReadError("colour image")
            if values.dtype.kind not in "iu":
                raise ReadError(f"pixels are {values.dtype}, not integers")
            yield values


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image]:
    """Reads what stands before the pixels of a file, and stands ready to read those.

    Raises:
      ReadError: the header is damaged, there are no pixels, they are cut off, or they have several samples each.
    """
    with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
        small = os.fstat(file.fileno()).st_size <= IN_MEMORY_BYTES
        # The parser asks where it is after every element, which is a call of the system for a file and none for memory.
        source = io.BytesIO(file.read()) if small else file
        dataset, last = _read(source, _PIXEL_TAGS, stop=_PIXEL_DATA)
        try:
            image = _image(path, dataset, source if dataset.buffer is None else dataset.buffer, last)
        except ReadError:
            raise
        except Exception as error:  # values are parsed when they are asked for, and each parser raises its own kinds
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            raise ReadError(f"malformed header ({fault_location(error)})") from error
        yield image


def _image(path: str, dataset: Dataset, source: Any, last: tuple[int, str | None, int] | None) -> Image:
    syntax = str(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", ""))
    if not syntax:
        raise ReadError("no transfer syntax: how the pixels are encoded is unknown")
    if last is None or last[0] != _PIXEL_DATA:
        raise ReadError("no pixel data")
    if _whole(dataset, "SamplesPerPixel", 1) != 1:
        raise ReadError("colour image")
    frames, rows, columns = _sizes(dataset)
    _, representation, length = last
    source.seek(12 if representation in EXPLICIT_VR_LENGTH_32 else 8, os.SEEK_CUR)
    begin = source.tell()
    source.seek(0, os.SEEK_END)
    found = min(length, source.tell() - begin)
    source.seek(begin)
    if syntax in UNCOMPRESSED:
        frame = rows * columns * _whole(dataset, "BitsAllocated", 0) / 8
        if found < int(frame * frames):
            raise ReadError(f"truncated: the pixel data has {found:,} of {int(frame * frames):,} bytes")
        if frame and found // frame > frames:
            raise ReadError(f"the header promises {frames} frames, the file holds more")
    elif length == _UNDEFINED:
        _check_items(source)
    else:  # not as the standard has it; the end of the items has to be the end of the source
        source = io.BytesIO(source.read(length))
    return Image(
        path=path,
        frames=frames,
        photometric=str(dataset.get("PhotometricInterpretation") or "").strip(),
        bits_stored=_whole(dataset, "BitsStored", 16),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        geometry=_geometries(dataset, frames),
        decoder="",
        _dataset=dataset,
        _representation=representation or "OW",
        _source=source,
    )


def _check_items(source: Any) -> None:
    """Raises ReadError where compressed pixel data is cut off; decoders take what is left of it for an image."""
    begin = source.tell()
    while True:
        head = source.read(8)
        if len(head) < 8:
            raise ReadError("truncated: the compressed pixel data has no end")
        tag, length = struct.unpack("<LL", head)
        if tag != _ITEM or length == _UNDEFINED:
            break  # at the end of the items; or at what is none, about which the decoders have their say
        source.seek(length, os.SEEK_CUR)
    source.seek(begin)


def _decoded(
    dataset: Dataset, representation: str, source: Any, plugin: str
) -> Iterator[Integer[np.ndarray, "rows columns"]]:
    syntax = dataset.file_meta.TransferSyntaxUID
    options = as_pixel_options(dataset, pixel_keyword="PixelData", pixel_vr=representation)
    if syntax in UNCOMPRESSED:
        options["view_only"] = True  # nobody writes to what was read, so it needs no copy
    for values, _ in get_decoder(syntax).iter_array(source, raw=True, decoding_plugin=plugin, **options):
        yield values


def read_stored(path: str) -> tuple[Integer[np.ndarray, "frames rows columns"], str]:
    """All frames of a file at once, and what decoded them; see Image."""
    with open_image(path) as image:
        return np.stack(list(image.stored())), image.decoder


def _end_of_pixels(path: str) -> int:
    with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
        stop = _PIXEL_DATA + 1
        read_partial(
            file, stop_when=lambda tag, *_: int(tag) >= stop or int(tag) == 0, force=True, specific_tags=[Tag(0)]
        )
        return file.tell()


def _decoded_by_itk(
    path: str, first_failure: str, geometry: Sequence[FrameGeometry], start: int = 0
) -> Iterator[Integer[np.ndarray, "rows columns"]]:
    """Frames from number `start` on. GDCM decodes a file whole."""
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
        # GDCM rescales; undo that, so that both decoders give stored values.
        stored = np.rint((values - intercept) / slope)
        if np.abs(stored * slope + intercept - values).max() > 1e-3 * max(1.0, abs(slope)):
            raise ReadError(f"{failed}rescales them otherwise)")
        yield stored.astype(np.int32)


class Digest:
    """SHA-256 over stored values as little-endian int64, frame after frame, each in C order; hex() gives its first 16 digits."""

    def __init__(self) -> None:
        self._all = hashlib.sha256()

    def add(self, frame: Shaped[np.ndarray, "..."], *, of_its_own: bool = False) -> str:
        """Takes in a frame; says what the digest of this frame alone is where that is asked for."""
        wide = np.ascontiguousarray(frame, dtype="<i8")  # a frame at a time: int64 takes four times the memory
        self._all.update(wide)
        return hashlib.sha256(wide).hexdigest()[:16] if of_its_own else ""

    def hex(self) -> str:
        return self._all.hexdigest()[:16]


def stored_sha256(stored: Shaped[np.ndarray, "..."]) -> str:
    """Digest of one frame, or of several with the frames first."""
    digest = Digest()
    for frame in stored if stored.ndim == 3 else [stored]:
        digest.add(frame)
    return digest.hex()
