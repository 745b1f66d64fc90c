"""DICOM files: whitelisted headers and stored pixel values.

Nothing leaves this module but the fields of Header: no names, dates, free text or private tags.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import warnings
from typing import Any

import numpy as np
import pydicom
import pydicom.config
import SimpleITK
from jaxtyping import Float, Integer, Shaped
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import BaseTag, Tag

from data_pipeline.errors import NO_MEMORY, ReadError, UserError, fault

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
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")

# The fields below and no others are read from a header.
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel",
    "BurnedInAnnotation", "BodyPartExamined", "Manufacturer", "PixelSpacing", "SliceThickness", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "LossyImageCompression", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

# What decoding needs, and what says how to.
_PIXEL_TAGS = [
    "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip
_PIXEL_DATA, _FLOAT_PIXEL_DATA = 0x7FE00010, 0x7FE00008
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
    transfer_syntax: str
    photometric: str
    samples_per_pixel: int
    bits_stored: int
    signed: bool
    burned_in: bool
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
    dataset = _read(path if file is None else file, _TAGS, stop=_FLOAT_PIXEL_DATA)
    try:
        with warnings.catch_warnings(action="ignore"):
            if "SOPClassUID" not in dataset and "Rows" not in dataset and not _is_dicomdir(dataset):
                raise ReadError("not a DICOM image: it has neither a SOP class nor rows")
            return _header(path, dataset)
    except ReadError:
        raise
    except Exception as error:  # values are parsed when they are asked for, and each parser raises its own kinds
        raise ReadError(f"malformed header ({fault(error)})") from error


def _read(source: str | io.BufferedIOBase, keywords: list[str], stop: int) -> Dataset:
    """Elements by keyword, of those before the tag `stop`."""
    seen = 0

    def ends(tag: BaseTag, representation: str | None, length: int) -> bool:
        nonlocal seen
        seen += 1
        if seen > MAXIMUM_ELEMENTS:
            raise ReadError(f"damaged DICOM file: more than {MAXIMUM_ELEMENTS:,} elements before the pixels")
        number = int(tag)  # tags compare slowly
        return number >= stop or number == 0  # zeros are padding, or what was never written

    try:
        with (
            warnings.catch_warnings(action="ignore"),
            open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as file,
        ):
            return read_partial(file, stop_when=ends, force=True, specific_tags=[Tag(word) for word in keywords])
    except ReadError:
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
    frames = _whole(dataset, "NumberOfFrames", 1)
    if not 1 <= frames <= MAXIMUM_FRAMES:
        raise ReadError(f"the header promises {frames:,} frames; 1 to {MAXIMUM_FRAMES:,} can be real")
    rows, columns = _whole(dataset, "Rows", 0), _whole(dataset, "Columns", 0)
    if rows * columns > MAXIMUM_PIXELS:
        raise ReadError(f"the header promises {rows:,} x {columns:,} px; a frame may have {MAXIMUM_PIXELS:,}")
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
        transfer_syntax=syntax,
        photometric=text("PhotometricInterpretation"),
        samples_per_pixel=_whole(dataset, "SamplesPerPixel", 1),
        bits_stored=_whole(dataset, "BitsStored", 16),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        burned_in=text("BurnedInAnnotation").upper() == "YES",
        body_part=_body_part(text("BodyPartExamined")),
        manufacturer=next((m for m in _MANUFACTURERS if m in text("Manufacturer").lower()), "unknown"),
        thickness=_thickness(dataset),
        lossy=lossy == "01" if lossy in ("00", "01") else syntax in LOSSY_SYNTAXES,
        has_pixels="BitsAllocated" in dataset and "Rows" in dataset,
        geometry=_geometries(dataset, frames),
    )


def _is_dicomdir(dataset: Dataset) -> bool:
    return str(getattr(getattr(dataset, "file_meta", None), "MediaStorageSOPClassUID", "")) == DICOMDIR


def read_dicomdir(path: str) -> list[str]:
    """The files that a DICOMDIR names, each a relative path of plain parts, in its order.

    Raises:
      ReadError: it is no DICOMDIR, is damaged, or names a file outside its folder.
    """
    dataset = _read(path, ["DirectoryRecordSequence"], stop=_FLOAT_PIXEL_DATA)
    if not _is_dicomdir(dataset):
        raise ReadError("not a DICOMDIR")
    try:
        records = [record.get("ReferencedFileID") for record in dataset.get("DirectoryRecordSequence") or ()]
        names = [[str(part) for part in ([name] if isinstance(name, str) else name)] for name in records if name]
    except Exception as error:  # values are parsed when they are asked for
        raise ReadError(f"malformed DICOMDIR ({fault(error)})") from error
    if any(part in ("", ".", "..") or set(part) & set("/\\\0") for parts in names for part in parts):
        raise ReadError("it names a file outside its folder")
    return ["/".join(parts) for parts in names]


def _body_part(text: str) -> str:
    word = text.lower().replace("_", "").replace(" ", "")
    return word if word in BODY_PARTS else ""


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
    return tuple(values) if len(values) == count and all(np.isfinite(values)) else default


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

    def find(name: str, count: int, default: Any = None) -> Any:
        for place in reversed(places):
            if name in place:
                return number(place, name, count, default)
        return default

    def number(place: Dataset, name: str, count: int, default: Any = None) -> Any:
        try:
            return _floats(place.get(name), count, default)
        except (ValueError, TypeError, OverflowError) as error:
            raise ReadError(f"malformed header: {name} is no number") from error

    def rescale(name: str, default: float) -> float:
        for place in reversed(places):
            if place.get(name) not in (None, ""):
                values = number(place, name, 1)
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


def read_stored(path: str) -> tuple[Integer[np.ndarray, "frames rows columns"], str]:
    """The stored values before any rescaling, and the decoder that made them.

    The plugin pinned in PLUGINS comes first, SimpleITK (GDCM) second.

    Raises:
      ReadError: no decoder reads the pixels, they are cut off, or they have several samples each.
    """
    dataset = _read(path, _PIXEL_TAGS, stop=_PIXEL_DATA + 1)  # padding may follow, and it costs time
    try:
        with warnings.catch_warnings(action="ignore"):
            return _stored(path, dataset)
    except ReadError:
        raise
    except Exception as error:
        raise ReadError(f"malformed header ({fault(error)})") from error


def _stored(path: str, dataset: Dataset) -> tuple[np.ndarray, str]:
    syntax = str(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", ""))
    if not syntax:
        raise ReadError("no transfer syntax: how the pixels are encoded is unknown")
    if "PixelData" not in dataset:
        raise ReadError("no pixel data")
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise ReadError("colour image")
    if syntax in UNCOMPRESSED:
        rows, columns, frames = (
            int(dataset.get(n) or d) for n, d in (("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1))
        )
        wanted = rows * columns * frames * int(dataset.get("BitsAllocated") or 0) // 8
        if len(dataset.PixelData) < wanted:
            raise ReadError(f"truncated: the pixel data has {len(dataset.PixelData):,} of {wanted:,} bytes")
    try:
        plugin = PLUGINS.get(syntax, "")
        values = pixel_array(dataset, raw=True, decoding_plugin=plugin)
        decoder = f"pydicom {pydicom.__version__} {plugin}".strip()
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as first:  # noqa: BLE001 - each plugin raises its own kinds, and those in Rust no Exception
        values, decoder = _read_with_itk(path, type(first).__name__)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise ReadError("colour image")
    if values.dtype.kind not in "iu":
        raise ReadError(f"pixels are {values.dtype}, not integers")
    return values, decoder


def _end_of_pixels(path: str) -> int:
    with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
        stop = _PIXEL_DATA + 1
        read_partial(
            file, stop_when=lambda tag, *_: int(tag) >= stop or int(tag) == 0, force=True, specific_tags=[Tag(0)]
        )
        return file.tell()


def _read_with_itk(path: str, first_failure: str) -> tuple[np.ndarray, str]:
    tail = os.path.getsize(path) - _end_of_pixels(path)
    if tail > LONGEST_TAIL:
        raise ReadError(
            f"the pixels cannot be decoded (pydicom: {first_failure}; SimpleITK is not asked, because it reads what follows "
            f"the pixels too, {tail:,} bytes)"
        )
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        image = reader.Execute()
    except RuntimeError as error:
        raise ReadError(
            f"the pixels cannot be decoded (pydicom: {first_failure}; SimpleITK refused them too)"
        ) from error
    values = SimpleITK.GetArrayFromImage(image).astype(np.float64)
    rescales = {(place.slope, place.intercept) for place in read_header(path).geometry}
    if len(rescales) > 1:
        raise ReadError(
            f"the pixels cannot be decoded (pydicom: {first_failure}; SimpleITK mixes up frames of several rescale slopes)"
        )
    slope, intercept = rescales.pop()
    # GDCM rescales; undo that, so that both decoders give stored values.
    stored = np.rint((values - intercept) / slope)
    if np.abs(stored * slope + intercept - values).max() > 1e-3 * max(1.0, abs(slope)):
        raise ReadError(f"the pixels cannot be decoded (pydicom: {first_failure}; SimpleITK rescales them otherwise)")
    return stored.astype(np.int32), f"SimpleITK {SimpleITK.Version.VersionString()}"


def stored_sha256(stored: Shaped[np.ndarray, "..."]) -> str:
    """First 16 hex digits of the SHA-256 over the stored values as little-endian int64, frames first, in C order."""
    digest = hashlib.sha256()
    for part in stored if stored.ndim == 3 else [stored]:  # frame by frame: int64 takes four times the memory
        digest.update(np.ascontiguousarray(part, dtype="<i8"))
    return digest.hexdigest()[:16]


def real_values(
    stored: Integer[np.ndarray, "rows columns"], geometry: FrameGeometry
) -> Float[np.ndarray, "rows columns"]:
    """Stored values rescaled: HU for CT."""
    return stored.astype(np.float32) * np.float32(geometry.slope) + np.float32(geometry.intercept)
