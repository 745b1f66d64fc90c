"""Read plain files and compare with pydicom, which reads all others too."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from data_pipeline.sources.dicom_elements import PlainFile, read_plain
from data_pipeline.sources.dicom_header import FLOAT_PIXEL_DATA, MAXIMUM_ELEMENTS, PIXEL_DATA

PIXELS = np.random.default_rng(0).integers(0, 4096, (34, 38)).astype(np.uint16)
NAMES = (
    "Rows", "Columns", "BitsStored", "PixelSpacing", "RescaleIntercept", "RescaleType", "PhotometricInterpretation",
    "RealWorldValueMappingSequence", "PixelPaddingValue", "WindowCenter",
)  # fmt: skip
TAGS = frozenset(int(Tag(name)) for name in NAMES)


def plain(path: Path) -> PlainFile | None:
    return read_plain(path.read_bytes(), TAGS, FLOAT_PIXEL_DATA, {RLELossless})


def nested(depth: int, undefined: bool) -> Sequence:
    """A sequence of two items, with sequences in them."""
    items = []
    for number in range(2):
        item = Dataset()
        item.StudyDescription = f"item {number}"
        if depth:
            item.add_new("ReferencedSeriesSequence", "SQ", nested(depth - 1, undefined))
            item["ReferencedSeriesSequence"].is_undefined_length = undefined
        item.is_undefined_length_sequence_item = undefined
        items.append(item)
    return Sequence(items)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_plain_file_gives_the_elements_that_pydicom_reads(write_dicom, tmp_path: Path, syntax, undefined: bool) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS, PixelPaddingValue=7, RescaleType="HU", PixelSpacing=[0.5, 0.25])
    data = pydicom.dcmread(path)
    data.add_new("ReferencedStudySequence", "SQ", nested(3, undefined))
    data["ReferencedStudySequence"].is_undefined_length = undefined
    mapping = Dataset()
    mapping.LUTLabel = "x"
    data.RealWorldValueMappingSequence = [mapping]
    data.WindowCenter = None
    if syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)

    found, expected = plain(path), pydicom.dcmread(path)
    assert found is not None and found.syntax == syntax
    fields = Dataset({field.tag: field for field in found.fields})
    assert [int(field.tag) for field in found.fields] == sorted(TAGS & {int(element.tag) for element in expected})
    for name in NAMES:
        assert fields.get(name) == expected.get(name)
    assert found.last.tag == PIXEL_DATA
    if syntax != RLELossless:
        assert found.content[found.begin :][: PIXELS.nbytes] == PIXELS.tobytes() and found.last.length == PIXELS.nbytes
    else:
        assert found.content[found.begin :][:4] == b"\xfe\xff\x00\xe0"  # the first item


def test_slices_that_differ_elsewhere_have_equal_fields(write_dicom, tmp_path: Path) -> None:
    paths = [
        write_dicom(tmp_path / name, PIXELS, SliceLocation=1, SeriesDescription=text)
        for name, text in (("a.dcm", "short"), ("b.dcm", "a longer description"))
    ]
    first, second = map(plain, paths)
    assert first is not None and second is not None and first.begin != second.begin
    assert hash(first.fields) == hash(second.fields) and first.fields == second.fields


def test_files_that_are_not_plain_give_none(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    content = path.read_bytes()
    assert plain(path) is not None
    rows = content.index(b"\x28\0\x10\0US")
    head = b"\x08\0\x18\0UI\x02\x001\0"  # a tag that came before
    damaged = {
        "without preamble": content[132:],
        "tags that descend": content[:rows] + head + content[rows:],
        "an unknown representation": content[:rows] + b"\x28\0\x05\0??\0\0" + content[rows:],
        "zeros": content[:rows] + bytes(64) + content[rows:],
        "cut off": content[:rows],
        "a length beyond the end": content[:rows] + b"\x28\0\x05\0LO\xff\xff" + content[rows:][:50],
        "undefined length of a wanted element": content[:rows] + b"\x28\0\x05\0UN\0\0\xff\xff\xff\xff" + content[rows:],
        "too many elements": content[:rows]
        + b"".join(b"\x28\0" + n.to_bytes(2, "little") + b"OB\0\0\0\0\0\0" for n in range(6, 10))
        + b"".join(
            (0x00290000 + n).to_bytes(4, "little")[2:] + n.to_bytes(2, "little") + b"US\0\0"
            for n in range(MAXIMUM_ELEMENTS)
        ),
    }
    for what, changed in damaged.items():
        path.write_bytes(changed)
        assert plain(path) is None, what
    big_endian = PIXELS.astype(">u2").tobytes()
    assert plain(write_dicom(path, PIXELS, syntax=ExplicitVRBigEndian, PixelData=big_endian)) is None
    # Explicit elements under an implicit syntax, a known fault of writers.
    path.write_bytes(
        content.replace(ExplicitVRLittleEndian.encode() + b"\0", ImplicitVRLittleEndian.encode() + bytes(3))
    )
    assert plain(path) is None


def test_any_cut_or_flipped_byte_gives_none_or_sound_fields(write_dicom, tmp_path: Path) -> None:
    content = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    end = content.index(PIXELS.tobytes()[:64])
    for at in range(132, end):
        for changed in (content[:at], content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]):
            found = read_plain(changed, TAGS, FLOAT_PIXEL_DATA, {RLELossless})
            assert found is None or found.begin <= len(changed)
