"""Mosaics against nibabel's reader of them, which was written by others."""

import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from nibabel.nicom import dicomwrappers

from data_pipeline.format import shards
from data_pipeline.sources import dicom_pixels
from data_pipeline.sources.base import ReadRequest
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.stages import exclusion

COUNT, ROWS, COLUMNS = 7, 40, 36
TILES = np.random.default_rng(0).integers(1, 2000, (COUNT, ROWS, COLUMNS)).astype(np.uint16)
OBLIQUE = [0.6, 0.8, 0.0, 0.0, 0.0, -1.0]
NORMAL = np.cross(OBLIQUE[:3], OBLIQUE[3:])
UNKNOWN = "a mosaic of slices whose places are unknown"


_KINDS = {"AcquisitionMatrixText": b"SH\0\0", "NumberOfImagesInMosaic": b"US\0\0", "SliceNormalVector": b"FD\0\0"}


def csa_header(**tags: list[str]) -> bytes:
    """A CSA2 header with these tags (layout as nibabel documents it)."""
    data = b"SV10\4\3\2\1" + struct.pack("<II", len(tags), 77)
    for name, items in tags.items():
        data += struct.pack(
            "<64si4siii",
            name.encode(),
            len(items),
            _KINDS[name],
            4,
            len(items),
            77,
        )
        for item in items:
            text = item.encode() + b"\0"
            data += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return data


def write_mosaic(
    write_dicom, path: Path, *, tiles: np.ndarray = TILES, sign: int = 1, csa: bool = True, count: bool = True, **fields
) -> Path:
    matrix = np.zeros((3 * ROWS, 3 * COLUMNS), np.uint16)
    for n, tile in enumerate(tiles):
        row, column = divmod(n, 3)
        matrix[row * ROWS : (row + 1) * ROWS, column * COLUMNS : (column + 1) * COLUMNS] = tile
    named = {
        "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "ImageOrientationPatient": OBLIQUE,
        "ImagePositionPatient": [-70, -60, 35.5], "PixelSpacing": [1.5, 2], "SliceThickness": 3, "SpacingBetweenSlices": 3.6,
    }  # fmt: skip
    write_dicom(path, matrix, **(named | fields))
    data = pydicom.dcmread(path)
    tags = {
        "AcquisitionMatrixText": [f"{COLUMNS}*{ROWS}"],
        "SliceNormalVector": [f"{sign * value:.8f}" for value in NORMAL],
    }
    if count:
        tags["NumberOfImagesInMosaic"] = [str(len(tiles))]
    else:
        data.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", len(tiles))
    if csa:
        data.private_block(0x29, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa_header(**tags))
    data.save_as(path)
    return path


@pytest.mark.parametrize("sign", [1, -1])
def test_slices_of_a_mosaic_lie_where_nibabel_has_them(write_dicom, tmp_path: Path, sign: int) -> None:
    path = write_mosaic(write_dicom, tmp_path / "m.dcm", sign=sign)
    header = read_header(str(path))
    assert (header.tiles, header.frames, header.rows, header.columns) == (COUNT, COUNT, ROWS, COLUMNS)
    assert exclusion.exclude_header(header) is None
    reference = dicomwrappers.wrapper_from_file(path)
    assert isinstance(reference, dicomwrappers.MosaicWrapper)
    for n, place in enumerate(header.geometry):
        wanted = reference.affine[:3] @ [0, 0, n, 1]
        np.testing.assert_allclose(place.position, wanted, atol=1e-5)
        assert place.orientation == tuple(OBLIQUE)
    request = ReadRequest(str(path), "MR", str(tmp_path), tuple((n, 0.0) for n in range(COUNT)), tiles=COUNT)
    with dicom_pixels.open_dicom(request) as source:
        slices = list(source.slices())
    np.testing.assert_array_equal([one.pixels for one in slices], reference.get_data().transpose(2, 0, 1))
    np.testing.assert_array_equal([one.pixels for one in slices], TILES)
    assert {one.spacing for one in slices} == {(1.5, 2.0)}


def test_count_may_stand_in_its_own_private_element(write_dicom, tmp_path: Path) -> None:
    header = read_header(str(write_mosaic(write_dicom, tmp_path / "m.dcm", count=False)))
    assert header.tiles == COUNT


@pytest.mark.parametrize(
    "changes",
    [
        {"csa": False}, {"csa": False, "count": False}, {"ImagePositionPatient": None}, {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        {"SpacingBetweenSlices": None, "SliceThickness": None}, {"tiles": TILES[:1]}, {"PixelSpacing": None},
    ],
)  # fmt: skip
def test_mosaic_whose_layout_is_unknown_is_excluded_by_name(write_dicom, tmp_path: Path, changes: dict) -> None:
    header = read_header(str(write_mosaic(write_dicom, tmp_path / "m.dcm", **changes)))
    assert header.tiles == 0 and exclusion.exclude_header(header) == UNKNOWN


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 150])
def test_damaged_csa_header_is_no_layout(write_dicom, tmp_path: Path, cut: int) -> None:
    path = write_mosaic(write_dicom, tmp_path / "m.dcm")
    data = pydicom.dcmread(path)
    element = data.private_block(0x29, "SIEMENS CSA HEADER")[0x10]
    element.value = element.value[:cut]
    data.save_as(path)
    assert exclusion.exclude_header(read_header(str(path))) == UNKNOWN


def test_volumes_of_mosaics_become_their_slices(write_dicom, tmp_path: Path, run_build, run_verify, manifest) -> None:
    volumes = [TILES, np.roll(TILES, 3, axis=1)]
    for n, tiles in enumerate(volumes):
        write_mosaic(write_dicom, tmp_path / "in" / f"{n}.dcm", tiles=tiles, SOPInstanceUID=f"2.25.5{n}")
    words = ("--validation", 0, "--test", 0)
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out", *words).code == 0
    assert run_verify(tmp_path / "out").code == 0
    source = shards.SliceSource(tmp_path / "out", "train")
    np.testing.assert_array_equal([source[n].pixels for n in range(2 * COUNT)], np.concatenate(volumes))
    rows = pq.read_table(tmp_path / "out" / shards.INDEX).to_pylist()
    assert [row["index"] for row in rows] == list(range(2 * COUNT))
    steps = np.diff([row["position"] for row in rows])
    np.testing.assert_allclose(np.delete(steps, COUNT - 1), 3.6, atol=1e-4)
    assert {row["fate"] for row in manifest(tmp_path / "out").values()} == {"kept"}
