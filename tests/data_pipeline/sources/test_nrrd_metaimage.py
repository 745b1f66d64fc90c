import bz2
import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sources import volumes
from data_pipeline.sources.base import ReadError

VALUES = (
    np.random.default_rng(0).integers(-1000, 1000, (8, 9, 5)).astype("<i2")
)  # columns to the left, rows to the back, slices up
RAW = VALUES.tobytes(order="F")
AS_VIEWED = VALUES.transpose(2, 1, 0)


def nrrd(path: Path, data: bytes = RAW, encoding: str = "raw", more: str = "", scale: float = 1.0) -> Path:
    directions = " ".join(
        f"({','.join(str(size * scale * (n == m)) for m in range(3))})" for n, size in enumerate((0.8, 0.9, 2.5))
    )
    head = f"NRRD0005\ntype: short\ndimension: 3\nspace: LPS\nsizes: 8 9 5\nspace directions: {directions}\nendian: little\nencoding: {encoding}\n{more}\n"
    path.write_bytes(head.encode() + data)
    return path


def mha(path: Path, data: bytes = RAW, more: str = "", scale: float = 1.0) -> Path:
    spacing = " ".join(str(size * scale) for size in (0.8, 0.9, 2.5))
    head = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{more}ElementSpacing = {spacing}\nDimSize = 8 9 5\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    path.write_bytes(head.encode() + data)
    return path


def read(path: Path) -> tuple[volumes.Volume, np.ndarray]:
    with volumes.open_volume(str(path)) as volume:
        return volume, np.stack(list(volume.slices()))


@pytest.mark.parametrize(
    ("more", "scale"),
    [
        ("", 1), ('space units: "mm" "mm" "mm"\n', 1), ('space units: "um" "um" "um"\n', 1000), ('space units: "µm" "µm" "µm"\n', 1000),
        ('space units: "microns" "microns" "microns"\n', 1000), ('space units: "m" "m" "m"\n', 0.001), ('space units: "" "" ""\n', 1),
    ],
)  # fmt: skip
def test_nrrd_spacing_is_in_mm_whatever_the_unit(tmp_path: Path, more: str, scale: float) -> None:
    volume, values = read(nrrd(tmp_path / "v.nrrd", more=more, scale=scale))
    assert volume.spacing == pytest.approx((0.9, 0.8, 2.5))
    np.testing.assert_array_equal(values, AS_VIEWED)


def test_nrrd_units_of_axes_without_space_are_applied(tmp_path: Path) -> None:
    head = 'NRRD0004\ntype: short\ndimension: 3\nsizes: 8 9 5\nspacings: 0.08 0.09 0.25\nunits: "cm" "cm" "cm"\nendian: little\nencoding: raw\n\n'
    (tmp_path / "v.nrrd").write_bytes(head.encode() + RAW)
    assert read(tmp_path / "v.nrrd")[0].spacing == pytest.approx((0.9, 0.8, 2.5))


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("um", 1000), ("cm", 0.1), ("?", 1)])
def test_metaimage_spacing_is_in_mm_whatever_the_unit(tmp_path: Path, unit: str, scale: float) -> None:
    volume, values = read(mha(tmp_path / "v.mha", more=f"DistanceUnits = {unit}\n", scale=scale))
    assert volume.spacing == pytest.approx((0.9, 0.8, 2.5))
    np.testing.assert_array_equal(values, AS_VIEWED)


def test_unknown_units_and_impossible_spacing_are_refused(tmp_path: Path) -> None:
    for more in ('space units: "px" "px" "px"\n', 'space units: "mm" "mm" "um"\n'):
        with pytest.raises(ReadError, match="unknown unit of length, or several"):
            read(nrrd(tmp_path / "v.nrrd", more=more))
    for path in (nrrd(tmp_path / "v.nrrd", scale=1000), mha(tmp_path / "v.mha", scale=1e-5)):
        with pytest.raises(ReadError, match="correct the spacing or its unit"):
            read(path)


def test_intensity_function_of_metaimage_is_applied(tmp_path: Path) -> None:
    more = "ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = -1000\n"
    np.testing.assert_array_equal(read(mha(tmp_path / "v.mha", more=more))[1], AS_VIEWED.astype(int) * 2 - 1000)
    for slope in ("0", "nan", "steep"):
        with pytest.raises(ReadError, match="ElementToIntensityFunction"):
            read(mha(tmp_path / "v.mha", more=f"ElementToIntensityFunctionSlope = {slope}\n"))


def test_quantised_nrrd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="its values were quantised"):
        read(nrrd(tmp_path / "v.nrrd", more="old min: 0\nold max: 1\n"))


@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("form", ["nrrd", "mha"])
def test_flipped_bit_in_compressed_data_is_damage(tmp_path: Path, form: str, level: int) -> None:
    packed = gzip.compress(RAW, level) if form == "nrrd" else zlib.compress(RAW, level)

    def write(data: bytes) -> Path:
        if form == "nrrd":
            return nrrd(tmp_path / "v.nrrd", data, "gzip")
        return mha(tmp_path / "v.mha", data, f"CompressedData = True\nCompressedDataSize = {len(data)}\n")

    np.testing.assert_array_equal(read(write(packed))[1], AS_VIEWED)
    for at in (len(packed) // 2, len(packed) - 6 if form == "nrrd" else len(packed) - 2):
        data = bytearray(packed)
        data[at] ^= 0x40
        with pytest.raises(ReadError, match="damaged volume: its compressed data does not unpack"):
            read(write(bytes(data)))
    with pytest.raises(ReadError, match="cut off"):
        read(write(packed[:-2]))


def test_skipped_bytes_and_lines_and_other_encodings_are_read(tmp_path: Path) -> None:
    forms = [
        nrrd(tmp_path / "a.nrrd", bytes(7) + RAW, more="byte skip: 7\n"), nrrd(tmp_path / "b.nrrd", bytes(7) + RAW, more="byte skip: -1\n"),
        nrrd(tmp_path / "c.nrrd", gzip.compress(bytes(7) + RAW), "gzip", "byte skip: 7\n"),
        nrrd(tmp_path / "d.nrrd", b"one line\n" + RAW, more="line skip: 1\n"), nrrd(tmp_path / "e.nrrd", bz2.compress(RAW), "bzip2"),
        nrrd(tmp_path / "f.nrrd", " ".join(map(str, VALUES.ravel(order="F"))).encode(), "text"),
    ]  # fmt: skip
    for path in forms:
        np.testing.assert_array_equal(read(path)[1], AS_VIEWED, err_msg=path.name)


def test_damaged_bzip2_is_damage(tmp_path: Path) -> None:
    packed = bytearray(bz2.compress(RAW))
    for data in (packed[:-5], packed[:40] + bytes([packed[40] ^ 1]) + packed[41:]):
        with pytest.raises(ReadError, match="damaged volume: (it is cut off|its compressed data does not unpack)"):
            read(nrrd(tmp_path / "v.nrrd", bytes(data), "bzip2"))


def test_several_values_per_voxel_are_refused_by_their_number(tmp_path: Path) -> None:
    head = "NRRD0005\ntype: short\ndimension: 4\nspace: LPS\nsizes: 2 8 9 5\nkinds: list domain domain domain\nspace directions: none (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: raw\n\n"
    (tmp_path / "v.nrrd").write_bytes(head.encode() + RAW * 2)
    with pytest.raises(ReadError, match="^2 values per voxel .*a time series.*write one volume per file"):
        read(tmp_path / "v.nrrd")
