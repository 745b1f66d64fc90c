import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from curia_common.errors import UserError
from data_pipeline.format import records
from data_pipeline.sources import dicom_header, dicom_pixels
from data_pipeline.sources.base import ReadError, ReadRequest
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.sources.dicom_pixels import read_stored

ROOT = Path(__file__).resolve().parents[3]
PIXELS = np.random.default_rng(0).integers(0, 4096, (34, 38)).astype(np.uint16)
FRAMES = np.stack([np.roll(PIXELS, n) for n in range(3)])


def edit(path: Path, **fields) -> Path:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def with_simpleitk(path: Path) -> list[np.ndarray]:
    return list(dicom_pixels.decode_with_simpleitk(str(path), read_header(str(path)).geometry))


def failing_decoder(error: BaseException | None, after: int = 0) -> Callable:
    """Stands in for get_decoder: decoders raise `error`, or end, after some frames."""

    class Decoder:
        def __init__(self, syntax: str) -> None:
            self._decoder = get_decoder(syntax)

        def iter_array(self, *arguments, **options):
            yield from islice(self._decoder.iter_array(*arguments, **options), after)
            if error is not None:
                raise error

    return Decoder


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_values_round_trip(write_dicom, tmp_path: Path, syntax: str) -> None:
    signed = PIXELS.astype(np.int16) - 2000
    for pixels in (PIXELS, signed):
        data = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
        path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, PixelData=data)
        values, decoder = read_stored(str(path))
        np.testing.assert_array_equal(values[0], pixels)
        assert decoder.startswith("pydicom")


def test_pydicom_and_simpleitk_give_the_same_stored_values(write_dicom, write_enhanced, tmp_path: Path) -> None:
    # GDCM rescales on its own: MR and CT, top-level and per-frame slopes have to be undone alike.
    for modality in ("CT", "MR"):
        path = write_dicom(tmp_path / "a.dcm", PIXELS, Modality=modality, RescaleSlope="0.37", RescaleIntercept="-10.5")
        np.testing.assert_array_equal(with_simpleitk(path), [PIXELS])
    path = write_enhanced(tmp_path / "e.dcm", FRAMES, [2.0, 2.0, 2.0])
    values, _ = read_stored(str(path))
    np.testing.assert_array_equal(values[1], np.roll(PIXELS, 1))
    np.testing.assert_array_equal(with_simpleitk(path), values)
    path = write_enhanced(tmp_path / "e.dcm", FRAMES[:2], [2.0, 1.0])
    with pytest.raises(ReadError, match="several rescale slopes"):
        with_simpleitk(path)


def test_overlay_bits_are_masked_and_other_bits_refused(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS | 0x8000, BitsStored=12, HighBit=11)
    with pytest.raises(ReadError, match="bits outside the 12 of BitsStored"):
        read_stored(str(path))
    data = pydicom.dcmread(path)
    data.add_new(0x60000102, "US", 15)
    data.save_as(path)
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)


def test_high_bit_at_the_top_of_the_word_shifts_the_values(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS << 4, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)


def slices_of(path: Path, **request) -> list:
    wanted = ReadRequest(str(path), scratch=str(path.parent), frames=((0, 0.0),), **({"modality": "CT"} | request))
    with dicom_pixels.open_dicom(wanted) as source:
        return list(source.slices())


@pytest.mark.parametrize(
    ("signed", "value", "named"),
    [(False, 65535, 65535), (False, 4095, 4095), (True, -2000, 63536), (True, -2000, -2000)],
)
def test_declared_padding_becomes_air(write_dicom, tmp_path: Path, signed: bool, value: int, named: int) -> None:
    stored = PIXELS.astype(np.int32) % 2000
    stored[:3] = value
    # Some writers give the padding of signed pixels as an unsigned number.
    path = write_dicom(tmp_path / "a.dcm", stored.astype("<i2" if signed else "<u2"), RescaleIntercept=-1024)
    data = pydicom.dcmread(path)
    data.add_new(0x00280120, "US" if named >= 0 else "SS", named)
    data.save_as(path)
    (one,) = slices_of(path)
    expected = stored - 1024
    expected[:3] = -1024
    np.testing.assert_array_equal(one.pixels * one.slope + one.intercept, expected)
    assert one.flags == records.CLIPPED and one.below == ()


def test_padding_range_covers_all_its_values(write_dicom, tmp_path: Path) -> None:
    stored = PIXELS % 2000
    stored[:3] = 60_000 + np.arange(3)[:, None]
    (one,) = slices_of(write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=60_002, PixelPaddingRangeLimit=60_000))
    assert (one.pixels[:3] == 0).all() and one.pixels.max() < 2000


def test_values_below_air_are_reported_before_they_are_raised(write_dicom, tmp_path: Path) -> None:
    stored = PIXELS.astype(np.int16) % 2000
    stored[0, :5] = -976  # -2000 HU
    (one,) = slices_of(write_dicom(tmp_path / "a.dcm", stored, RescaleIntercept=-1024))
    assert one.below == ((-2000.0, 5),)
    assert one.rescale == (1.0, -1024.0)
    (one,) = slices_of(write_dicom(tmp_path / "a.dcm", stored, RescaleIntercept=-1024, RescaleType="US"))
    assert one.rescale is None
    (one,) = slices_of(write_dicom(tmp_path / "a.dcm", stored, RescaleIntercept=None, RescaleSlope=None))
    assert one.rescale is None


@pytest.mark.parametrize("slope", [1, -1, 2, "0.5", "-0.37"])
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"RescaleIntercept": -1024}, {"PixelPaddingValue": 3000, "PixelPaddingRangeLimit": 4095},
        {"PhotometricInterpretation": "MONOCHROME1"},
    ],
    ids=["plain", "below air", "padded", "inverted"],
)  # fmt: skip
def test_histogram_counts_the_pixels_as_they_are_stored(write_dicom, tmp_path: Path, slope, fields: dict) -> None:
    for modality in ("CT", "MR"):
        path = write_dicom(tmp_path / "a.dcm", PIXELS, **{"RescaleSlope": slope, "RescaleIntercept": 0} | fields)
        (one,) = slices_of(path, modality=modality)
        np.testing.assert_array_equal(one.histogram, np.bincount(one.pixels.ravel()))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"PixelData": b"\0" * 100}, "truncated: the pixel data has 100 of 2,584 bytes"),
        ({"PixelData": None}, "no pixel data"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}, "colour image"),
    ],
)
def test_unusable_pixel_data_raises_read_error(write_dicom, tmp_path: Path, fields: dict, reason: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS, **fields)
    with pytest.raises(ReadError) as caught:
        read_stored(str(path))
    assert str(caught.value) == reason


def test_simpleitk_is_not_used_with_a_long_tail_after_the_pixels(write_dicom, tmp_path: Path, monkeypatch) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    monkeypatch.setattr(dicom_pixels, "get_decoder", failing_decoder(RuntimeError()))
    path.write_bytes(path.read_bytes() + bytes(1000))
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)
    path.write_bytes(path.read_bytes() + bytes(2_000_000))
    with pytest.raises(ReadError, match="it reads what follows the pixels too, 2,001,000 bytes"):
        read_stored(str(path))


def test_decoder_panic_falls_back_to_simpleitk(write_dicom, tmp_path: Path, monkeypatch) -> None:
    class Panic(BaseException):
        """As Rust's panics arrive in Python."""

    path = write_dicom(tmp_path / "a.dcm", PIXELS)

    monkeypatch.setattr(dicom_pixels, "get_decoder", failing_decoder(Panic()))
    assert read_stored(str(path))[1].startswith("SimpleITK")
    monkeypatch.setattr(dicom_pixels, "get_decoder", failing_decoder(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read_stored(str(path))


def test_truncation_anywhere_raises_or_reads_correct_pixels(write_dicom, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    read = 0
    for length in range(0, len(whole) + 1, 37):
        (tmp_path / "b.dcm").write_bytes(whole[:length])
        for function in (read_header, read_stored):
            try:
                value = function(str(tmp_path / "b.dcm"))
            except ReadError as error:
                assert "P1" not in str(error)
            else:
                read += 1
                if function is read_stored:
                    np.testing.assert_array_equal(value[0][0], PIXELS)
    assert read


def test_random_bytes_in_header_raise_only_read_error(write_dicom, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    random = np.random.default_rng(5)
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(0, len(whole) - PIXELS.nbytes, 6):
            data[at] = random.integers(0, 256)
        (tmp_path / "b.dcm").write_bytes(data)
        for function in (read_header, read_stored):
            try:
                function(str(tmp_path / "b.dcm"))
            except ReadError:
                pass


def test_check_plugins_names_missing_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    dicom_pixels.check_plugins()
    # pylibjpeg-openjpeg alone does nothing: pydicom wants the package pylibjpeg too.
    monkeypatch.setitem(dicom_pixels.PLUGINS, JPEG2000Lossless, "another plugin")
    with pytest.raises(UserError, match=r"no decoder another plugin .*curia-jax\[ingest\]"):
        dicom_pixels.check_plugins()


def test_zero_padding_after_the_pixels_is_skipped(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    # Read as empty elements they would be half a million, which is refused.
    path.write_bytes(path.read_bytes() + bytes(8 * 10 * dicom_header.MAXIMUM_ELEMENTS))
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)


def test_too_many_elements_raise_read_error(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "b.dcm")
    element = b"\x08\x00\x50\x00SH\x00\x00"
    at = path.read_bytes().index(b"\x08\x00\x16\x00UI")
    path.write_bytes(path.read_bytes()[:at] + element * (dicom_header.MAXIMUM_ELEMENTS + 1) + path.read_bytes()[at:])
    for function in (read_header, read_stored):
        with pytest.raises(ReadError, match="more than 50,000 elements before the pixels"):
            function(str(path))


def test_memory_error_becomes_read_error_with_remedy(write_dicom, tmp_path: Path, monkeypatch) -> None:
    path = write_dicom(tmp_path / "a.dcm")

    def out_of_memory(*arguments, **more) -> None:
        raise MemoryError

    for module, name, function in (
        (dicom_pixels, "read_plain", out_of_memory),
        (dicom_header, "read_partial", out_of_memory),
        (dicom_pixels, "get_decoder", failing_decoder(MemoryError())),
    ):
        with monkeypatch.context() as patch:
            if name == "read_partial":
                patch.setattr(dicom_pixels, "read_plain", lambda *unused: None)
            patch.setattr(module, name, function)
            with pytest.raises(ReadError, match="more memory than a worker may take.*--memory-gb"):
                read_stored(str(path))


def test_large_file_is_read_one_frame_at_a_time(write_dicom, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dicom_pixels, "IN_MEMORY_BYTES", 1 << 20)
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    frames = np.random.default_rng(0).integers(0, 4096, (100, 256, 256)).astype(np.uint16)
    edit(path, NumberOfFrames=100, Rows=256, Columns=256, PixelData=frames.tobytes())
    tracemalloc.start()
    try:
        with dicom_pixels.open_image(str(path)) as image:
            for number, frame in enumerate(image.stored()):
                assert number % 33 or np.array_equal(frame, frames[number])
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()
    assert number == 99


def test_simpleitk_continues_where_pydicom_fails(write_enhanced, tmp_path: Path, monkeypatch) -> None:
    path = write_enhanced(tmp_path / "e.dcm", FRAMES, [2.0, 2.0, 2.0])
    values, decoder = read_stored(str(path))
    for error in (None, RuntimeError()):
        monkeypatch.setattr(dicom_pixels, "get_decoder", failing_decoder(error, after=1))
        found, both = read_stored(str(path))
        np.testing.assert_array_equal(found, values)
        assert both.startswith(f"{decoder}, SimpleITK")


# Some programs write zeros for the delimiter at the end of the items, a length in it, or nothing at all.
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize(
    "end",
    [b"", b"\xfe\xff\xdd", bytes(8), bytes(300), b"\xfe\xff\xdd\xe0" + b"\xff" * 4, b"\xfe\xff\xdd\xe0" + bytes(300)],
)
def test_pixels_without_proper_delimiter_are_read(write_dicom, tmp_path: Path, syntax: str, end: bytes) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    data = pydicom.dcmread(path)
    data.compress(syntax)
    data.save_as(path)
    _, decoder = read_stored(str(path))
    path.write_bytes(path.read_bytes().removesuffix(b"\xfe\xff\xdd\xe0" + bytes(4)) + end)
    values, again = read_stored(str(path))
    np.testing.assert_array_equal(values[0], PIXELS)
    assert again == decoder


def test_truncated_compressed_pixels_raise_before_decoding(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    data = pydicom.dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)
    whole = path.read_bytes()
    for cut in (9, 10, 500):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ReadError, match="truncated: the compressed pixel data has no end"):
            read_stored(str(path))


def test_frame_whose_last_fragment_is_missing_is_truncated(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    data = pydicom.dcmread(path)
    data.compress(JPEG2000Lossless)
    (stream,) = generate_frames(data.PixelData, number_of_frames=1)
    halves = [stream[: len(stream) // 4 * 2], stream[len(stream) // 4 * 2 :]]
    data.PixelData = encapsulate(halves, has_bot=False)
    data.save_as(path)
    np.testing.assert_array_equal(read_stored(str(path))[0][0], PIXELS)
    whole = path.read_bytes()
    path.write_bytes(whole[: -8 - len(halves[1]) - 8])  # the second item and the delimiter
    assert path.read_bytes().endswith(halves[0])
    with pytest.raises(ReadError, match="truncated: the compressed pixel data has no end"):
        read_stored(str(path))


@pytest.mark.parametrize(("name", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_floating_point_pixels_are_refused_by_name(write_dicom, tmp_path: Path, name: str, kind: str) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", PIXELS, PixelData=None, BitsAllocated=32, **{name: PIXELS.astype(kind).tobytes()}
    )
    with pytest.raises(ReadError, match="its pixels are floating-point numbers, which are not read"):
        read_stored(str(path))


def test_more_frames_than_stated_raise_read_error(write_dicom, tmp_path: Path) -> None:
    path = edit(
        write_dicom(tmp_path / "a.dcm"), PixelData=bytes(2 * 40 * 44 * 3), NumberOfFrames=2, Rows=40, Columns=44
    )
    with pytest.raises(ReadError, match="states 2 frames, the file holds more"):
        read_stored(str(path))


def test_build_ignores_module_named_dl_in_working_directory(write_series, tmp_path: Path) -> None:
    # python-gdcm imports `dl`, which exists on no current system.
    (tmp_path / "here" / "dl").mkdir(parents=True)
    (tmp_path / "here" / "dl" / "__init__.py").write_text("raise RuntimeError('imported from the working directory')\n")
    write_series(tmp_path / "exams", 2)
    (tmp_path / "key").write_text("a key that everybody may know\n")
    words = (
        "--input",
        tmp_path / "exams",
        "--output",
        tmp_path / "out",
        "--key-file",
        tmp_path / "key",
        "--workers",
        "1",
    )
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.build", *map(str, words)], cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.parquet").is_file()
