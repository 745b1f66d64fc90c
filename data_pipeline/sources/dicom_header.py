"""DICOM headers: whitelisted fields, and nothing else.

Nothing leaves this module but the fields of Header and FrameGeometry: no names, dates or free text, and of private tags only the
number of slices of a Siemens mosaic and their direction.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from io import BufferedIOBase
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
)

from data_pipeline.sources import mosaic, quantities, wording
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.geometry import FARTHEST_MM
from data_pipeline.sources.silence import guarded

# The last three may hold lossless data; the tag LossyImageCompression decides where it is present. Two of JPEG's retired
# forms have no name in pydicom.
LOSSY_SYNTAXES = frozenset({
    JPEGBaseline8Bit, JPEGExtended12Bit,
    UID("1.2.840.10008.1.2.4.53"),  # JPEG spectral selection, processes 6 and 8
    UID("1.2.840.10008.1.2.4.55"),  # JPEG full progression, processes 10 and 12
    JPEGLSNearLossless, JPEG2000, HTJ2K,
})  # fmt: skip
MAXIMUM_FRAMES = 65_536
MAXIMUM_PIXELS = 1 << 26  # of a frame: 8,192 x 8,192; none has a twentieth
MAXIMUM_ELEMENTS = 50_000  # of a data set; each costs time, and noise can hold millions
PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA = 0x7FE00010, 0x7FE00008, 0x7FE00009
# Of files without Modality.
_MODALITIES: dict[str, str] = {
    CTImageStorage: "CT", EnhancedCTImageStorage: "CT", LegacyConvertedEnhancedCTImageStorage: "CT",
    MRImageStorage: "MR", EnhancedMRImageStorage: "MR", LegacyConvertedEnhancedMRImageStorage: "MR",
}  # fmt: skip

# The fields below and no others are read from a header.
_HEADER_TAGS = [Tag(word) for word in (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "SamplesPerPixel",
    "BurnedInAnnotation", "BodyPartExamined", "Manufacturer", "PixelSpacing", "SliceThickness", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "LossyImageCompression", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "SeriesDescription", "RescaleType", "ModalityLUTSequence", "RealWorldValueMappingSequence", "ComplexImageComponent",
)]  # fmt: skip

# Read of mosaics alone.
_MOSAIC_TAGS = [Tag("SpacingBetweenSlices"), *mosaic.PRIVATE_TAGS]

# Defined terms of BodyPartExamined (DICOM PS3.16, tables L-1 and L-2), without spaces and underscores. Other
# texts, which can be names, are dropped.
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

# Those that show a face, whole or in part.
FACES = frozenset("brain ear eye eyelid face head headneck jaw mandible maxilla mouth nose orbit orbits scalp sella sinus "
                  "sinuses skull temporalbone tmj iac circleofwillis cerebellum neck neckchest neckchestabdomen "
                  "neckchestabdomenpelvis cspine cervicalspine petrousbone nasopharynx pharynx larynx parotid submandibular "
                  "pituitary thyroid parathyroid tongue carotid wholebody".split())  # fmt: skip

# Classes of manufacturers; the text of the tag itself does not leave this module.
MANUFACTURERS = ("siemens", "philips", "toshiba", "canon", "hitachi", "fujifilm", "hyperfine", "ge", "united imaging")


@dataclasses.dataclass(frozen=True)
class FrameGeometry:
    """Where one frame lies and how its values are rescaled; None where the header does not say.

    Attributes:
      orientation: direction cosines of a row and of a column.
      position: centre of the first pixel, mm, patient coordinates (x to the left, y to the back, z up).
      spacing: between rows and between columns, mm.
      slope, intercept: real value = stored * slope + intercept.
      declared: the header says so, and does not call the unit unspecified.
    """

    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float
    declared: bool = True


@dataclasses.dataclass(frozen=True)
class Header:
    """Whitelisted fields of a file. UIDs and patient_id are for pseudonyms and are stored nowhere.

    Attributes:
      frame_types: the different FrameTypes of a multi-frame object.
      tiles: slices of a Siemens mosaic, each of which counts as a frame of `rows` by `columns`; else 0.
      called_localizer: the series description says so; maybe_localizer: it has a word that other series have too.
      quantity: what the values measure, in the words of sources.quantities; "" for HU and the signal of MR.
      modality_lut: stored values are indices of a table, the Modality LUT Sequence.
    """

    sop_class: str
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    image_type: tuple[str, ...]
    frame_types: frozenset[tuple[str, ...]]
    rows: int
    columns: int
    frames: int
    photometric: str
    samples_per_pixel: int
    burned_in: bool
    called_localizer: bool
    maybe_localizer: bool
    body_part: str
    manufacturer: str
    thickness: float
    lossy: bool
    has_pixels: bool
    geometry: tuple[FrameGeometry, ...]
    quantity: str = ""
    modality_lut: bool = False
    tiles: int = 0


def is_dicom(file: BufferedIOBase) -> bool:
    """True for a file with the DICM mark, or one that starts with a plausible data set; leaves the file at its start."""
    start = file.read(132)
    file.seek(0)
    if start[128:132] == b"DICM":
        return True
    # Files before DICOM's file format start with a tag of group 0002 or 0008, little- or big-endian.
    return start[:2] in (b"\x08\x00", b"\x02\x00") or start[:4] in (b"\x00\x08\x00\x05", b"\x00\x08\x00\x08")


def read_header(source: str | BufferedIOBase) -> Header:
    """The whitelisted fields of a file, a path or open; no pixels.

    Raises:
      ReadError: it is not DICOM, or is cut off before the pixels.
    """
    with open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as file:
        dataset, _ = read_elements(file, _HEADER_TAGS, stop=FLOAT_PIXEL_DATA)
        with guarded("malformed header ({place})"):
            is_mosaic = (
                wording.is_mosaic_type(_values(dataset, "ImageType")) and text(dataset, "SOPClassUID") == MRImageStorage
            )
        if is_mosaic:
            file.seek(0)
            dataset, _ = read_elements(file, [*_HEADER_TAGS, *_MOSAIC_TAGS], stop=FLOAT_PIXEL_DATA)
    with guarded("malformed header ({place})"):  # values are parsed on access
        if "SOPClassUID" not in dataset and "Rows" not in dataset and not _is_dicomdir(dataset):
            raise ReadError("not a DICOM image: it has neither a SOP class nor rows")
        header = _header(dataset)
        return (is_mosaic and _split_mosaic(header, dataset)) or header


def read_dicomdir(path: str) -> list[str]:
    """The files that a DICOMDIR names, each a relative path of plain parts, in its order.

    Raises:
      ReadError: it is not a DICOMDIR, is damaged, or names a file outside its folder.
    """
    with open(path, "rb") as file:
        dataset, _ = read_elements(file, [Tag("DirectoryRecordSequence")], stop=FLOAT_PIXEL_DATA)
    with guarded("malformed DICOMDIR ({place})"):
        if not _is_dicomdir(dataset):
            raise ReadError("not a DICOMDIR")
        records = [record.get("ReferencedFileID") for record in dataset.get("DirectoryRecordSequence") or ()]
        names = [[str(part) for part in ([name] if isinstance(name, str) else name)] for name in records if name]
    if any(part in ("", ".", "..") or set(part) & set("/\\\0") for parts in names for part in parts):
        raise ReadError("it names a file outside its folder")
    return ["/".join(parts) for parts in names]


# ---- parsing, shared with dicom_pixels


class Element(NamedTuple):
    """Head of a data element: tag as a number, value representation (None if implicit) and length in bytes."""

    tag: int
    representation: str | None
    length: int


def read_elements(file: BufferedIOBase, tags: Sequence[BaseTag], stop: int) -> tuple[FileDataset, Element | None]:
    """The elements with these tags before the tag `stop`, and the head of the element at which reading ended.

    Raises:
      ReadError: the file is damaged.
      OSError: the storage fails.
    """
    seen = 0
    last: Element | None = None

    def ends(tag: BaseTag, representation: str | None, length: int) -> bool:
        nonlocal seen, last
        seen += 1
        if seen > MAXIMUM_ELEMENTS:
            raise ReadError(f"damaged DICOM file: more than {MAXIMUM_ELEMENTS:,} elements before the pixels")
        number = int(tag)  # tags compare slowly
        if number < stop and number:  # zeros are padding, or were never written
            return False
        last = Element(number, representation, length)
        return True

    with guarded("damaged DICOM file ({kind} while reading the header)"):
        return read_partial(cast(BinaryIO, file), stop_when=ends, force=True, specific_tags=list(tags)), last


def transfer_syntax(dataset: Dataset) -> str:
    return str(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", ""))


def text(dataset: Dataset, name: str) -> str:
    value = dataset.get(name)
    return "" if value is None else str(value).strip()


def whole_number(dataset: Dataset, name: str, default: int) -> int:
    try:
        value = dataset.get(name)
        return default if value in (None, "") else int(value)
    except Exception as error:  # values are parsed on access, and each parser raises its own kinds
        raise ReadError(f"malformed header: {name} is not a whole number") from error


def frame_sizes(dataset: Dataset) -> tuple[int, int, int]:
    """Frames, rows and columns.

    Raises:
      ReadError: they are beyond what real files have.
    """
    frames = whole_number(dataset, "NumberOfFrames", 1)
    if not 1 <= frames <= MAXIMUM_FRAMES:
        raise ReadError(f"the header states {frames:,} frames; 1 to {MAXIMUM_FRAMES:,} are read")
    rows, columns = whole_number(dataset, "Rows", 0), whole_number(dataset, "Columns", 0)
    if rows * columns > MAXIMUM_PIXELS:
        raise ReadError(f"the header states {rows:,} x {columns:,} px; a frame may have {MAXIMUM_PIXELS:,}")
    return frames, rows, columns


def frame_geometries(dataset: Dataset, frames: int) -> tuple[FrameGeometry, ...]:
    """One per frame; those without an item of their own share one, however many frames a header states."""
    own = min(frames, len(dataset.get("PerFrameFunctionalGroupsSequence") or ()))
    found = [_frame_geometry(dataset, frame) for frame in range(own)]
    return tuple(found + [_frame_geometry(dataset, own)] * (frames - own) if own < frames else found)


_GEOMETRY_GROUPS = (
    "PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "RealWorldValueMappingSequence",
)  # fmt: skip


def _places(dataset: Dataset, frame: int, groups: Sequence[str]) -> list[Dataset]:
    """The data sets that describe a frame. In a multi-frame object the frame's own item comes before the shared one, and that
    before the data set itself: the last counts."""
    places = [dataset]
    for name, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        sequence = dataset.get(name)
        if sequence and index < len(sequence):
            found = (sequence[index].get(group) for group in groups)
            places += [group[0] for group in found if group]
    return places


def _frame_geometry(dataset: Dataset, frame: int) -> FrameGeometry:
    places = _places(dataset, frame, _GEOMETRY_GROUPS)

    def find(name: str, count: int) -> tuple[float, ...] | None:
        for place in reversed(places):
            if name in place:
                values = _numbers(place, name, count, decimal_comma=True)
                return None if values is None or max(map(abs, values)) > FARTHEST_MM else values
        return None

    def number(name: str) -> float | None:
        for place in reversed(places):
            if not _is_empty(place, name):
                # A comma may also separate thousands here: -1,024.
                values = _numbers(place, name, 1, decimal_comma=False)
                if values is None:
                    raise ReadError(f"{name} is not a finite number: what the stored values mean is unknown")
                return values[0]
        return None

    slope, intercept = number("RescaleSlope"), number("RescaleIntercept")
    mapped = _mapping_to_hu(dataset, places)
    if slope is None and intercept is None and mapped is not None:
        slope, intercept = mapped
    given = slope is not None or intercept is not None
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if slope == 0:
        raise ReadError("RescaleSlope is 0: every pixel would have the same value")
    if mapped is not None and not np.allclose((slope, intercept), mapped, rtol=1e-4, atol=1e-3):
        raise ReadError(
            "the rescale and the Real World Value Mapping of the header give different HU: correct the header"
        )
    return FrameGeometry(
        orientation=find("ImageOrientationPatient", 6),
        position=find("ImagePositionPatient", 3),
        spacing=find("PixelSpacing", 2),
        slope=slope,
        intercept=intercept,
        declared=given and _rescale_type(places) in ("", "HU"),
    )


def _rescale_type(places: Sequence[Dataset]) -> str:
    found = (text(place, "RescaleType").upper() for place in reversed(places))
    return next(filter(None, found), "")


def _mappings(dataset: Dataset, places: Sequence[Dataset]) -> list[Dataset]:
    """Real World Value Mappings of a frame: items of a functional group, or of the data set itself."""
    return [*(dataset.get("RealWorldValueMappingSequence") or ()), *places[1:]]


def _unit_code(mapping: Dataset) -> str:
    codes = mapping.get("MeasurementUnitsCodeSequence")
    return text(codes[0], "CodeValue") if codes else ""


def _mapping_to_hu(dataset: Dataset, places: Sequence[Dataset]) -> tuple[float, float] | None:
    """Slope and intercept of the Real World Value Mapping to HU, where there is one.

    Raises:
      ReadError: it has neither; it may have a table instead (RealWorldValueLUTData), which is not applied.
    """
    for mapping in _mappings(dataset, places):
        if _unit_code(mapping).upper() == quantities.HOUNSFIELD:
            try:
                slope = _floats(mapping.get("RealWorldValueSlope"), 1)
                intercept = _floats(mapping.get("RealWorldValueIntercept"), 1)
            except (ValueError, TypeError, OverflowError) as error:
                raise ReadError("malformed header: the Real World Value Mapping is not a number") from error
            if not (slope and intercept):
                raise ReadError(
                    "its Real World Value Mapping to HU has no slope and intercept, and a table of values is not applied: export it with RescaleSlope and RescaleIntercept"
                )
            return slope[0], intercept[0]
    return None


def _quantity(dataset: Dataset, frames: int, modality: str, image_type: Sequence[str]) -> str:
    """What the values of the file's frames measure; see sources.quantities."""
    groups = ("PixelValueTransformationSequence", "RealWorldValueMappingSequence", "MRImageFrameTypeSequence")
    types: set[str] = set()
    units: set[str] = set()
    components: set[str] = set()
    for frame in range(max(1, min(frames, len(dataset.get("PerFrameFunctionalGroupsSequence") or ())))):
        places = _places(dataset, frame, groups)
        types.add(_rescale_type(places))
        units.update(map(_unit_code, _mappings(dataset, places)))
        components.update(text(place, "ComplexImageComponent") for place in places)
    return quantities.of(modality, image_type, types, units, components)


def _header(dataset: Dataset) -> Header:
    description = _raw(dataset, "SeriesDescription")
    manufacturer = text(dataset, "Manufacturer").lower()
    body_part = text(dataset, "BodyPartExamined").lower().replace("_", "").replace(" ", "")
    lossy = text(dataset, "LossyImageCompression")
    frames, rows, columns = frame_sizes(dataset)
    sop_class = MediaStorageDirectoryStorage if _is_dicomdir(dataset) else text(dataset, "SOPClassUID")
    types, frame_types = _values(dataset, "ImageType"), _frame_types(dataset, frames)
    modality = text(dataset, "Modality") or _MODALITIES.get(sop_class, "")
    return Header(
        sop_class=sop_class,
        sop_uid=text(dataset, "SOPInstanceUID"),
        series_uid=text(dataset, "SeriesInstanceUID"),
        study_uid=text(dataset, "StudyInstanceUID"),
        patient_id=text(dataset, "PatientID"),
        modality=modality,
        image_type=types,
        frame_types=frame_types,
        rows=rows,
        columns=columns,
        frames=frames,
        photometric=text(dataset, "PhotometricInterpretation"),
        samples_per_pixel=whole_number(dataset, "SamplesPerPixel", 1),
        burned_in=text(dataset, "BurnedInAnnotation").upper() == "YES",
        called_localizer=wording.calls_localizer(description),
        maybe_localizer=wording.may_call_localizer(description),
        body_part=body_part if body_part in BODY_PARTS else "",
        manufacturer=next((name for name in MANUFACTURERS if name in manufacturer), "unknown"),
        thickness=_thickness(dataset),
        lossy=lossy == "01" if lossy in ("00", "01") else transfer_syntax(dataset) in LOSSY_SYNTAXES,
        has_pixels="BitsAllocated" in dataset and "Rows" in dataset,
        geometry=frame_geometries(dataset, frames),
        quantity=_quantity(dataset, frames, modality, [*types, *(value for one in frame_types for value in one)]),
        modality_lut=bool(dataset.get("ModalityLUTSequence")),
    )


def _split_mosaic(header: Header, dataset: Dataset) -> Header | None:
    """The header with one frame per slice of a mosaic; None where their places are unknown."""
    layout = mosaic.layout(dataset)
    whole = header.geometry[0]
    if layout is None or header.frames != 1 or whole.spacing is None:
        return None
    step = (_numbers(dataset, "SpacingBetweenSlices", 1, decimal_comma=True) or (header.thickness,))[0]
    matrix = (header.rows, header.columns)
    places = mosaic.positions(layout, matrix, whole.spacing, step, whole.orientation, whole.position)
    if places is None:
        return None
    return dataclasses.replace(
        header, rows=header.rows // layout.side, columns=header.columns // layout.side, frames=layout.tiles, tiles=layout.tiles,
        geometry=tuple(dataclasses.replace(whole, position=place) for place in places),
    )  # fmt: skip


def _is_dicomdir(dataset: Dataset) -> bool:
    meta = getattr(dataset, "file_meta", None)
    return str(getattr(meta, "MediaStorageSOPClassUID", "")) == MediaStorageDirectoryStorage


def _raw(dataset: Dataset, name: str) -> bytes:
    """The bytes of an element that is not decoded, because they do not leave this module."""
    element = dataset.get_item(name)
    value = None if element is None else element.value
    return value if isinstance(value, bytes) else b""


def _values(dataset: Dataset, name: str) -> tuple[str, ...]:
    found = dataset.get(name) or ()
    return tuple(str(value).upper() for value in ([found] if isinstance(found, str) else found))


def _frame_types(dataset: Dataset, frames: int) -> frozenset[tuple[str, ...]]:
    groups = [
        item
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
        for item in (dataset.get(name) or ())[:frames]
    ]
    found = (item.get(name) for item in groups for name in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence"))
    return frozenset(_values(types[0], "FrameType") for types in found if types) - {()}


def _thickness(dataset: Dataset) -> float:
    """mm; a description only, so one that is not a number counts as missing."""
    try:
        return (_numbers(dataset, "SliceThickness", 1, decimal_comma=True) or (0.0,))[0]
    except ReadError:
        return 0.0


def _is_empty(place: Dataset, name: str) -> bool:
    element = place.get_item(name)
    return element is None or element.value in (None, "", b"")


def _numbers(place: Dataset, name: str, count: int, *, decimal_comma: bool) -> tuple[float, ...] | None:
    """None unless there are `count` finite numbers.

    Args:
      decimal_comma: whether a comma can be nothing else.

    Raises:
      ReadError: there is something else than numbers.
    """
    try:
        value = place.get(name)  # text where pydicom finds no number, or under a representation for text, as UT
        parts = value.strip("\0 ").split("\\") if isinstance(value, str) else value
        if decimal_comma and isinstance(parts, Sequence):
            parts = [_COMMA.sub(r"\1.\2", part) if isinstance(part, str) else part for part in parts]
        return _floats(parts, count)
    except Exception as error:  # values are parsed on access, and each parser raises its own kinds
        raise ReadError(f"malformed header: {name} is not a number") from error


_COMMA = re.compile(r"^(\s*[-+]?\d+),(\d+\s*)$")


def _floats(value: Any, count: int) -> tuple[float, ...] | None:
    """None unless there are `count` finite numbers."""
    if value is None or value in ("", [""]):
        return None
    values = [float(v) for v in (value if hasattr(value, "__len__") and not isinstance(value, str) else [value])]
    return tuple(values) if len(values) == count and all(map(math.isfinite, values)) else None
