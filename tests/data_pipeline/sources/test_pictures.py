import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.base import ReadError, ReadRequest
from data_pipeline.sources.pictures import open_picture, read_picture

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (37, 41)).astype(np.uint8)
WORDS = RANDOM.integers(0, 65536, (37, 41)).astype(np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("values", [BYTES, WORDS], ids=["8 bit", "16 bit"])
def test_grey_values_round_trip(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    read = read_picture(str(tmp_path / name))
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


ROUND = ((np.add.outer(np.arange(-40, 41) ** 2, np.arange(-40, 41) ** 2) < 900) * 255).astype(np.uint8)
NOISE = RANDOM.integers(0, 256, (81, 81)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "values", "excluded"),
    [
        ("benign (1)_mask.png", ROUND, True), ("masks/1.png", ROUND, True), ("case_segmentation.png", ROUND // 255, True),
        ("masks/2.png", ROUND // 255 * 7 + np.roll(ROUND, 45, 0) // 255 * 90, True), ("masks/empty.png", ROUND * 0, True),
        ("masks/image.png", NOISE, False), ("images/1.png", NOISE, False),
    ],
)  # fmt: skip
def test_masks_beside_pictures_are_label_maps(tmp_path: Path, name: str, values: np.ndarray, excluded: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(tmp_path / name)
    with open_picture(ReadRequest(str(tmp_path / name), "auto", str(tmp_path))) as picture:
        assert len(list(picture.slices())) == (not excluded)
        assert picture.excluded == ("label map: whole numbers in regions of one value" if excluded else "")


def test_big_endian_tiff_is_read(tmp_path: Path) -> None:
    Image.fromarray(WORDS.astype(">u2")).save(tmp_path / "a.tif")  # as ImageJ writes them
    read = read_picture(str(tmp_path / "a.tif"))
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, WORDS)


def test_grey_jpeg_in_three_channels_is_grey(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    Image.fromarray(smooth).convert("RGB").save(tmp_path / "a.jpg", quality=90)
    assert np.abs(read_picture(str(tmp_path / "a.jpg")).astype(int) - smooth).max() <= 6


def test_grey_with_alpha_palette_or_one_bit_is_grey(tmp_path: Path) -> None:
    grey = Image.fromarray(BYTES)
    for mode in ("LA", "P"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(read_picture(str(tmp_path / f"{mode}.png")), BYTES)
    Image.fromarray(BYTES > 127).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_picture(str(tmp_path / "1.png")), np.where(BYTES > 127, 255, 0))


# Where the first row and column of what is stored are to be seen (TIFF 6.0, Orientation).
SHOWN = {
    1: lambda v: v, 2: np.fliplr, 3: lambda v: np.rot90(v, 2), 4: np.flipud, 5: np.transpose, 6: lambda v: np.rot90(v, -1),
    7: lambda v: np.rot90(v, 2).T, 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_picture_is_turned_as_its_orientation_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    smooth = (np.add.outer(3 * np.arange(40), np.arange(64)) + 10).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", exif=exif)
    found = read_picture(str(tmp_path / f"a.{suffix}")).astype(int)
    wanted = SHOWN[orientation](smooth)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= (4 if suffix == "jpg" else 0)


@pytest.mark.parametrize("values", [BYTES, WORDS])
def test_white_is_zero_tiff_is_inverted(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = [start + 2 + 12 * n for n in range(count)]
    (photometric,) = [at for at in entries if struct.unpack_from("<H", data, at)[0] == 262]
    assert struct.unpack_from("<H", data, photometric + 8) == (1,)
    struct.pack_into("<H", data, photometric + 8, 0)
    path.write_bytes(data)
    np.testing.assert_array_equal(read_picture(str(path)), np.iinfo(values.dtype).max - values)


def test_unusable_picture_raises_read_error_with_reason(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ReadError) as caught:
            read_picture(str(tmp_path / name))
        return str(caught.value)

    colour = RANDOM.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    assert refused("colour.png") == "colour image"
    Image.fromarray(BYTES).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(BYTES)] * 2)
    assert refused("pages.tif") == "3 pages; a picture holds one slice: save each page as a file"
    Image.fromarray(RANDOM.random((40, 40)).astype(np.float32)).save(tmp_path / "float.tif")
    assert "float32" in refused("float.tif")
    Image.fromarray(WORDS).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, data in (
        ("cut.png", whole[: len(whole) // 2]),
        ("header.png", whole[:20]),
        ("broken.png", whole[:60] + b"\0" * 40 + whole[100:]),
        ("text.png", b"no picture at all"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(data)
        assert "cannot be read" in refused(name)


def test_absurd_size_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 2_000_000, 1_000_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ReadError, match="2,000,000 x 1,000,000 px; a picture may have 67,108,864"):
        read_picture(str(tmp_path / "a.png"))
