import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, MRImageStorage

from data_pipeline.sources import dicom_header
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.sources.dicom_pixels import read_stored
from data_pipeline.stages import exclusion

PIXELS = np.random.default_rng(0).integers(0, 4096, (34, 38)).astype(np.uint16)
FRAMES = np.stack([PIXELS, PIXELS + 1, PIXELS + 2])


def edit(path: Path, **fields) -> Path:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def test_header_has_geometry_and_whitelisted_fields(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", PIXELS, ImagePositionPatient=[1, 2, 3], BodyPartExamined="CHEST", Manufacturer="GE MEDICAL"
    )
    header = read_header(str(path))
    assert (header.modality, header.rows, header.columns, header.frames) == ("CT", 34, 38, 1)
    assert (header.body_part, header.manufacturer, header.lossy, header.has_pixels) == ("chest", "ge", False, True)
    (place,) = header.geometry
    wanted = dicom_header.FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 2.0, 3.0), (0.5, 0.75), 1.0, -1024.0)
    assert place == wanted
    with path.open("rb") as file:
        assert read_header(file) == header


def test_enhanced_header_has_position_and_slope_per_frame(write_enhanced, tmp_path: Path) -> None:
    header = read_header(str(write_enhanced(tmp_path / "e.dcm", FRAMES, [1.0, 2.0, 0.5])))
    assert header.frames == 3
    assert [place.position for place in header.geometry] == [(0, 0, 0), (0, 0, 3), (0, 0, 6)]
    assert [place.slope for place in header.geometry] == [1.0, 2.0, 0.5]
    assert {place.spacing for place in header.geometry} == {(0.5, 0.75)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [("CHEST", "chest"), ("C SPINE", "cspine"), ("CHEST_ABDOMEN", "chestabdomen"), ("Miller", ""), ("HEAD MILLER", ""), ("", ""), (None, "")],
)  # fmt: skip
def test_body_part_is_a_defined_term_or_empty(write_dicom, tmp_path: Path, value: str | None, expected: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", BodyPartExamined=value)
    assert read_header(str(path)).body_part == expected


@pytest.mark.parametrize(
    ("text", "called", "maybe"),
    [
        ("Localiser sag", True, False), ("AAHead_Scout", True, False), ("Topogram  0.6  T80s", True, False), ("3-plane loc", True, True),
        ("THREE PLANE", False, True), ("t2_tse_tra", False, False), ("Scott^Plane 13 planes", False, False), ("", False, False),
        (None, False, False),
    ],
)  # fmt: skip
def test_localizer_is_recognized_by_series_description(
    write_dicom, tmp_path: Path, text: str | None, called: bool, maybe: bool
) -> None:
    path = write_dicom(tmp_path / "a.dcm", SeriesDescription=text)
    header = read_header(str(path))
    assert (header.called_localizer, header.maybe_localizer) == (called, maybe)
    assert not text or text not in str(header)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        (["LOCALIZER", "LOCALIZER"], "localizer or screen"),
        (["MAX_IP", "MPR"], "projection or reformat"),
        (["VOLUME", "MPR"], None),
    ],
)
def test_enhanced_object_is_excluded_by_the_types_of_its_frames(
    write_enhanced, tmp_path: Path, types: list[str], reason: str | None
) -> None:
    path = write_enhanced(tmp_path / "e.dcm", FRAMES[:2], [1.0, 1.0])
    data = pydicom.dcmread(path)
    for item, word in zip(data.PerFrameFunctionalGroupsSequence, types, strict=True):
        of_frame = pydicom.Dataset()
        of_frame.FrameType = ["ORIGINAL", "PRIMARY", word, "NONE"]
        item.CTImageFrameTypeSequence = pydicom.Sequence([of_frame])
    data.ImageType = ["ORIGINAL", "PRIMARY", "MIXED", "NONE"]
    data.save_as(path)
    assert exclusion.exclude_header(read_header(str(path))) == reason


def test_lossy_follows_the_tag_then_the_transfer_syntax(write_dicom, tmp_path: Path) -> None:
    def lossy(syntax: str, tag: str | None) -> bool:
        path = write_dicom(tmp_path / "a.dcm", syntax=syntax, PixelData=None, LossyImageCompression=tag)
        return read_header(str(path)).lossy

    assert not lossy(ExplicitVRLittleEndian, None)
    assert lossy(ExplicitVRLittleEndian, "01")  # decompressed, but it was lossy before
    assert lossy(JPEG2000, None)
    assert not lossy(JPEG2000, "00")


def test_invalid_rescale_or_frame_count_raises_read_error(write_dicom, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="RescaleSlope is 0"):
        read_header(str(write_dicom(tmp_path / "a.dcm", RescaleSlope=0)))
    path = write_dicom(tmp_path / "b.dcm", RescaleIntercept="-1024")
    path.write_bytes(path.read_bytes().replace(b"-1024", b"nan  "))
    with pytest.raises(ReadError, match="RescaleIntercept is not a finite number"):
        read_header(str(path))
    path = edit(write_dicom(tmp_path / "e.dcm"), NumberOfFrames=77)
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x0077", b"IS\x02\x00x7"))
    with pytest.raises(ReadError, match="malformed header: NumberOfFrames is not a whole number"):
        read_header(str(path))


def with_text(path: Path, name: str, old: str, new: str, representation: str = "DS") -> str:
    """Replaces an element of the file as it is stored, which pydicom would not write."""
    data, tag = path.read_bytes(), tag_for_keyword(name)
    assert tag is not None
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    long = struct.pack("<HL", 0, len(new)) if representation == "UT" else struct.pack("<H", len(new))
    before = head + b"DS" + struct.pack("<H", len(old)) + old.encode()
    assert data.count(before) == 1 and len(new) % 2 == 0
    path.write_bytes(data.replace(before, head + representation.encode() + long + new.encode()))
    return str(path)


@pytest.mark.parametrize(
    ("representation", "stored"), [("DS", "0,8\\0,9 "), ("UT", "0.8\\0.9 "), ("UT", "0,8\\ 0,9"), ("UN", "0.8\\0.9 ")]
)
def test_spacing_with_decimal_comma_or_as_text_is_read(write_dicom, tmp_path: Path, representation, stored) -> None:
    path = write_dicom(tmp_path / "a.dcm", PixelSpacing=["0.5", "0.75"], SliceThickness="2.5 ")
    with_text(path, "PixelSpacing", "0.5\\0.75", stored, "UT" if representation == "UN" else representation)
    if representation == "UN":
        path.write_bytes(path.read_bytes().replace(b"\x28\x00\x30\x00UT", b"\x28\x00\x30\x00UN"))
    header = read_header(with_text(path, "SliceThickness", "2.5 ", "2,75"))
    assert header.geometry[0].spacing == (0.8, 0.9) and header.thickness == 2.75


@pytest.mark.parametrize("stored", ["-1,024", "1,2,3 "])
def test_comma_in_rescale_is_ambiguous_and_refused(write_dicom, tmp_path: Path, stored: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", RescaleIntercept="-512")
    with pytest.raises(ReadError, match="malformed header: RescaleIntercept is not a number"):
        read_header(with_text(path, "RescaleIntercept", "-512", stored))


def test_modality_follows_the_sop_class_where_it_is_missing(write_dicom, tmp_path: Path) -> None:
    ct = write_dicom(tmp_path / "a.dcm", Modality=None)
    mr = write_dicom(tmp_path / "b.dcm", SOPClassUID=MRImageStorage, Modality="")
    other = write_dicom(tmp_path / "c.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality=None)
    assert [read_header(str(path)).modality for path in (ct, mr, other)] == ["CT", "MR", ""]


def test_invalid_slice_thickness_counts_as_missing(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "c.dcm", SliceThickness="2.75")
    path.write_bytes(path.read_bytes().replace(b"2.75", b"thin"))
    assert read_header(str(path)).thickness == 0.0


def test_frames_without_own_item_share_one_geometry(write_dicom, write_enhanced, tmp_path: Path) -> None:
    path = edit(write_dicom(tmp_path / "a.dcm"), NumberOfFrames=65536)
    places = read_header(str(path)).geometry
    assert len(places) == 65536 and len(set(map(id, places))) == 1
    path = edit(write_enhanced(tmp_path / "e.dcm", FRAMES, [2.0, 3.0]), NumberOfFrames=4)
    assert [place.slope for place in read_header(str(path)).geometry] == [2.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "field"),
    [("ImagePositionPatient", "position"), ("ImageOrientationPatient", "orientation"), ("PixelSpacing", "spacing")],
)
def test_geometry_beyond_one_kilometre_counts_as_missing(name: str, field: str, write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm")
    count = len(pydicom.dcmread(path)[name].value)
    near, far = (
        read_header(str(edit(path, **{name: [value] + [0.5] * (count - 1)}))).geometry[0] for value in (2e5, 1e200)
    )
    assert getattr(near, field)[0] == 2e5 and getattr(far, field) is None


def test_absurd_sizes_raise_read_error(write_dicom, tmp_path: Path) -> None:
    path = edit(write_dicom(tmp_path / "a.dcm"), NumberOfFrames=2_000_000_000)
    with pytest.raises(ReadError, match="2,000,000,000 frames"):
        read_header(str(path))
    path = edit(write_dicom(tmp_path / "b.dcm"), Rows=65535, Columns=65535)
    with pytest.raises(ReadError, match="states 65,535 x 65,535 px; a frame may have 67,108,864"):
        read_header(str(path))


def test_damaged_file_meta_information_raises_read_error(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm")
    data = path.read_bytes()
    # The SOP class of the meta information gets a representation that does not exist, and that of the data set vanishes.
    data = data.replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00ZZ")
    data = data.replace(b"\x08\x00\x16\x00UI", b"\x08\x00\x17\x00UI")
    path.write_bytes(data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x12\x00US"))
    with pytest.raises(ReadError):
        read_header(str(path))


def test_is_dicom_goes_by_the_first_bytes(write_dicom, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "a.dcm").read_bytes()
    samples = {"mark": (whole, True), "no mark": (whole[132:], True), "text": (b"hello", False), "pdf": (b"%PDF-1.7", False), "none": (b"", False)}  # fmt: skip
    for name, (data, expected) in samples.items():
        file = io.BytesIO(data)
        assert (name, dicom_header.is_dicom(file), file.tell()) == (name, expected, 0)


# ---- what the values measure


def code(value: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "UCUM", "Alleine Mustermann"
    return item


def mapping(unit: str, slope: float, intercept: float) -> Sequence:
    item = Dataset()
    item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, intercept
    item.MeasurementUnitsCodeSequence = Sequence([code(unit)])
    return Sequence([item])


@pytest.mark.parametrize(
    ("fields", "declared"),
    [({}, True), ({"RescaleType": "HU"}, True), ({"RescaleType": "US"}, False), ({"RescaleType": "Mustermann"}, False),
     ({"RescaleSlope": None, "RescaleIntercept": None}, False), ({"RescaleSlope": None}, True)],
)  # fmt: skip
def test_units_are_declared_by_a_rescale_of_known_type(
    write_dicom, tmp_path: Path, fields: dict, declared: bool
) -> None:
    header = read_header(str(write_dicom(tmp_path / "a.dcm", **fields)))
    assert [place.declared for place in header.geometry] == [declared]
    assert "Mustermann" not in str(header)


def test_quantity_comes_from_rescale_type_units_and_image_type(write_dicom, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    assert read_header(str(write_dicom(path))).quantity == ""
    assert read_header(str(write_dicom(path, RescaleType="MGML"))).quantity == "concentration"
    adc = write_dicom(path, Modality="MR", RealWorldValueMappingSequence=mapping("mm2/s", 1e-6, 0.0))
    header = read_header(str(adc))
    assert header.quantity == "diffusion" and "Mustermann" not in str(header)
    assert read_header(str(write_dicom(path, Modality="MR", ComplexImageComponent="PHASE"))).quantity == "phase"
    assert read_header(str(write_dicom(path, ModalityLUTSequence=Sequence([Dataset()])))).modality_lut


def test_quantity_of_any_frame_counts(write_enhanced, tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "e.dcm", FRAMES, [1.0, 2.0, 0.5])
    data = pydicom.dcmread(path)
    data.Modality = "CT"
    data.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence[0].RescaleType = "Z_EFF"
    data.save_as(path)
    assert read_header(str(path)).quantity == "effective atomic number"


def test_real_world_mapping_to_hu_stands_in_for_a_rescale(write_dicom, tmp_path: Path) -> None:
    hu = mapping("[hnsf'U]", 2.0, -1000.0)
    path = write_dicom(tmp_path / "a.dcm", RescaleSlope=None, RescaleIntercept=None, RealWorldValueMappingSequence=hu)
    (place,) = read_header(str(path)).geometry
    assert (place.slope, place.intercept, place.declared) == (2.0, -1000.0, True)
    with pytest.raises(ReadError, match="give different HU"):
        read_header(str(write_dicom(tmp_path / "b.dcm", RealWorldValueMappingSequence=hu)))


def test_real_world_mapping_by_a_table_is_refused(write_dicom, tmp_path: Path) -> None:
    table = mapping("[hnsf'U]", 1.0, 0.0)
    del table[0].RealWorldValueSlope, table[0].RealWorldValueIntercept
    table[0].RealWorldValueLUTData = [-1000.0, 0.0, 40.0]
    path = write_dicom(tmp_path / "a.dcm", RealWorldValueMappingSequence=table)  # beside a rescale, too
    for read in (read_header, read_stored):
        with pytest.raises(ReadError, match="a table of values is not applied: export it with RescaleSlope"):
            read(str(path))
