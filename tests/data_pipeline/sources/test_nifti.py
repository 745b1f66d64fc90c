import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.sources import volumes
from data_pipeline.sources.base import ReadError

VALUES = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 5)).astype(np.int16)
SIZES = (0.8, 0.9, 2.5)
# Places of fields in a NIfTI-1 header (nifti1.h).
DIM, VOX_OFFSET, XYZT_UNITS, QFORM_CODE, SFORM_CODE, SROW_X = 40, 108, 123, 252, 254, 280


def nifti(scale: float = 1.0) -> bytearray:
    return bytearray(nibabel.Nifti1Image(VALUES, np.diag([size * scale for size in SIZES] + [1.0])).to_bytes())


def read(path: Path) -> tuple[volumes.Volume, np.ndarray]:
    with volumes.open_volume(str(path)) as volume:
        return volume, np.stack(list(volume.slices()))


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ReadError) as caught:
        read(path)
    return str(caught.value)


AS_VIEWED = VALUES[::-1, ::-1].transpose(2, 1, 0)


@pytest.mark.parametrize(
    ("code", "scale"), [(0, 1.0), (1, 0.001), (2, 1.0), (3, 1000.0), (2 | 8, 1.0), (3 | 16, 1000.0)]
)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_spacing_is_in_mm_whatever_the_unit(tmp_path: Path, code: int, scale: float, kind) -> None:
    image = kind(VALUES, np.diag([size * scale for size in SIZES] + [1.0]))
    image.header["xyzt_units"] = code  # with the unit of time
    image.to_filename(tmp_path / "v.nii")
    volume, values = read(tmp_path / "v.nii")
    assert volume.spacing == pytest.approx((0.9, 0.8, 2.5), rel=1e-6)
    np.testing.assert_array_equal(values, AS_VIEWED)


def test_unknown_or_contradicted_unit_is_refused(tmp_path: Path) -> None:
    data = nifti()
    data[XYZT_UNITS] = 5
    assert "unknown unit of length" in refused(tmp_path / "v.nii", data)
    for code, scale in ((3, 1e-3), (1, 1.0), (2, 1000.0), (0, 1e-4)):
        data = nifti(scale)
        data[XYZT_UNITS] = code
        assert "correct the spacing or its unit" in refused(tmp_path / "v.nii", data)


@pytest.mark.parametrize("offset", [352, 368, 1000, 0])
def test_values_begin_at_vox_offset(tmp_path: Path, offset: int) -> None:
    data = nifti()
    values = data[352:]
    data[VOX_OFFSET : VOX_OFFSET + 4] = struct.pack("<f", offset)
    (tmp_path / "v.nii").write_bytes(data[:352] + bytes(max(0, offset - 352)) + values)
    np.testing.assert_array_equal(read(tmp_path / "v.nii")[1], AS_VIEWED)


@pytest.mark.parametrize("offset", [348.0, 100.0, -1.0, 352.5, float("nan"), float("inf")])
def test_vox_offset_within_the_header_is_refused(tmp_path: Path, offset: float) -> None:
    data = nifti()
    data[VOX_OFFSET : VOX_OFFSET + 4] = struct.pack("<f", offset)
    assert "vox_offset" in refused(tmp_path / "v.nii", data)


def test_vox_offset_beyond_the_file_is_cut_off(tmp_path: Path) -> None:
    data = nifti()
    data[VOX_OFFSET : VOX_OFFSET + 4] = struct.pack("<f", 4096)
    assert refused(tmp_path / "v.nii", data) == "damaged volume: it is cut off"
    assert refused(tmp_path / "v.nii.gz", gzip.compress(data)) == "damaged volume: it is cut off"


def test_sform_of_zeros_leaves_the_qform(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES, np.diag([-0.8, -0.9, 2.5, 1.0]))
    image.set_qform(image.affine, code=1)
    image.to_filename(tmp_path / "sound.nii")
    data = bytearray((tmp_path / "sound.nii").read_bytes())
    data[SROW_X : SROW_X + 48] = bytes(48)
    (tmp_path / "v.nii").write_bytes(data)
    assert struct.unpack_from("<h", data, SFORM_CODE)[0] > 0
    (volume, values), (sound, wanted) = read(tmp_path / "v.nii"), read(tmp_path / "sound.nii")
    np.testing.assert_array_equal(values, wanted)
    assert volume.spacing == pytest.approx(sound.spacing)
    data[QFORM_CODE : QFORM_CODE + 2] = bytes(2)
    assert "its affine is singular" in refused(tmp_path / "v.nii", data)


@pytest.mark.parametrize("sides", [(-8, -9, 5), (8, 9, -5), (0, 9, 5)])
def test_side_of_less_than_one_voxel_is_damage(tmp_path: Path, sides: tuple[int, int, int]) -> None:
    data = nifti()
    struct.pack_into("<4h", data, DIM, 3, *sides)
    assert refused(tmp_path / "v.nii", data).startswith("damaged volume: its header ")


# ---- compression


@pytest.mark.parametrize("level", [0, 6])
def test_flipped_bit_in_compressed_file_is_damage(tmp_path: Path, level: int) -> None:
    packed = gzip.compress(bytes(nifti()), level)
    (tmp_path / "v.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(read(tmp_path / "v.nii.gz")[1], AS_VIEWED)
    for at in (len(packed) // 2, len(packed) - 6):  # among the values, and in the CRC-32
        data = bytearray(packed)
        data[at] ^= 0x40
        assert "damaged volume: its compressed data does not unpack" in refused(tmp_path / "v.nii.gz", data)
    assert refused(tmp_path / "v.nii.gz", packed[:-3]) == "damaged volume: it is cut off"  # within the checksum


def test_compression_is_seen_in_the_content(tmp_path: Path) -> None:
    data = bytes(nifti())
    forms = {
        "plain.nii.gz": data, "packed.nii": gzip.compress(data), "packed.nii.gz": gzip.compress(data),
        "members.nii.gz": gzip.compress(data[:700]) + gzip.compress(data[700:]),  # as bgzip and pigz write them
        "padded.nii.gz": gzip.compress(data) + bytes(512), "longer.nii.gz": gzip.compress(data + bytes(1000)),
    }  # fmt: skip
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read(tmp_path / name)[1], AS_VIEWED, err_msg=name)


def test_stream_far_longer_than_stated_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes.voxels, "TAIL_BYTES", 10_000)
    packed = gzip.compress(bytes(nifti()) + bytes(20_000))
    assert refused(tmp_path / "v.nii.gz", packed) == "damaged volume: it unpacks to more than its header states"


# ---- other forms


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_pair_of_hdr_and_img_is_read(tmp_path: Path, kind, packed: bool) -> None:
    kind(VALUES, np.diag([*SIZES, 1.0])).to_filename(tmp_path / "v.img")
    if packed:
        (tmp_path / "v.img.gz").write_bytes(gzip.compress((tmp_path / "v.img").read_bytes()))
        (tmp_path / "v.img").unlink()
    volume, values = read(tmp_path / "v.hdr")
    np.testing.assert_array_equal(values, AS_VIEWED)
    assert volume.spacing == pytest.approx((0.9, 0.8, 2.5))
    for path in tmp_path.glob("*.img*"):
        path.unlink()
    with pytest.raises(ReadError, match=r"its .img file is missing"):
        read(tmp_path / "v.hdr")


def test_analyze_volume_is_refused_because_left_is_unknown(tmp_path: Path) -> None:
    nibabel.AnalyzeImage(VALUES, np.eye(4)).to_filename(tmp_path / "v.img")
    with pytest.raises(ReadError, match="an Analyze volume: it does not say where left is; convert it to NIfTI"):
        read(tmp_path / "v.hdr")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_mgh_and_mgz_are_read(tmp_path: Path, kind: type) -> None:
    values = (np.random.default_rng(1).integers(0, 250, (8, 9, 5)) / (2 if kind == np.float32 else 1)).astype(kind)
    # FreeSurfer's axes run to the left, down and to the front.
    affine = np.array([[-1.0, 0, 0, 4], [0, 0, 1.5, 5], [0, -1.2, 0, 6], [0, 0, 0, 1]])
    for name in ("v.mgh", "v.mgz"):
        nibabel.MGHImage(values, affine).to_filename(tmp_path / name)
        volume, found = read(tmp_path / name)
        # Coronal, the largest spacing being through the front: rows run down, columns from the right.
        assert (volume.plane, volume.spacing) == ("coronal", pytest.approx((1.2, 1.0, 1.5)))
        right_to_left = values  # the first array axis runs to the left already
        np.testing.assert_array_equal(found, right_to_left.transpose(2, 1, 0))
    data = bytearray((tmp_path / "v.mgz").read_bytes())
    data[-6] ^= 1  # in the checksum
    assert "damaged volume" in refused(tmp_path / "v.mgz", data)


@pytest.mark.parametrize(
    "data", [b"", b"text", bytes(600), b"\x1f\x8b" + bytes(600), struct.pack("<i", 348) + bytes(100)]
)
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.hdr", "v.mgz"])
def test_no_header_is_damage(tmp_path: Path, name: str, data: bytes) -> None:
    assert refused(tmp_path / name, data).startswith("damaged volume")
