import hashlib
import io
import time
import tracemalloc
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from curia_common.errors import UserError
from data_pipeline.sources import dicom
from data_pipeline.sources.base import ReadError

PIXELS = np.random.default_rng(0).integers(0, 4096, (34, 38)).astype(np.uint16)


def edit(path: Path, **fields) -> Path:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def by_itk(path: Path) -> list[np.ndarray]:
    return list(dicom._decoded_by_itk(str(path), "x", dicom.read_header(str(path)).geometry))


def failing(error: BaseException):
    """A decoder that raises at its first frame."""

    def decoded(*arguments):
        raise error
        yield

    return decoded


def enhanced(path: Path, slopes: list[float]) -> Path:
    """Turns a file into an Enhanced CT of several frames, each with its own place and slope."""
    data = pydicom.dcmread(path)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    frames = np.stack([np.roll(PIXELS, n) for n in range(len(slopes))])
    data.NumberOfFrames, data.Rows, data.Columns, data.PixelData = len(slopes), *PIXELS.shape, frames.tobytes()
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, name)
    shared, per_frame = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([Dataset()]), Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.75]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for n, slope in enumerate(slopes):
        item = Dataset()
        item.PlanePositionSequence, item.PixelValueTransformationSequence = Sequence([Dataset()]), Sequence([Dataset()])
        item.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * n]
        item.PixelValueTransformationSequence[0].RescaleSlope = slope
        item.PixelValueTransformationSequence[0].RescaleIntercept = -1024
        per_frame.append(item)
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(per_frame)
    data.save_as(path)
    return path


def test_the_header_says_what_and_where(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", PIXELS, ImagePositionPatient=[1, 2, 3], BodyPartExamined="CHEST", Manufacturer="GE MEDICAL"
    )
    header = dicom.read_header(str(path))
    assert (header.modality, header.rows, header.columns, header.frames) == ("CT", 34, 38, 1)
    assert (header.body_part, header.manufacturer, header.lossy, header.has_pixels) == ("chest", "ge", False, True)
    (place,) = header.geometry
    assert place == dicom.FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 2.0, 3.0), (0.5, 0.75), 1.0, -1024.0)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_stored_values_are_those_that_were_written(write_dicom, tmp_path: Path, syntax: str) -> None:
    signed = PIXELS.astype(np.int16) - 2000
    for pixels in (PIXELS, signed):
        data = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
        path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, PixelData=data)
        values, decoder = dicom.read_stored(str(path))
        np.testing.assert_array_equal(values[0], pixels)
        assert decoder.startswith("pydicom")


def test_both_decoders_give_the_stored_values(write_dicom, tmp_path: Path) -> None:
    # GDCM rescales on its own: MR and CT, top-level and per-frame slopes have to be undone alike.
    for modality in ("CT", "MR"):
        path = write_dicom(tmp_path / "a.dcm", PIXELS, Modality=modality, RescaleSlope="0.37", RescaleIntercept="-10.5")
        np.testing.assert_array_equal(by_itk(path), [PIXELS])
    path = enhanced(write_dicom(tmp_path / "e.dcm", PIXELS), [2.0, 2.0, 2.0])
    values, _ = dicom.read_stored(str(path))
    np.testing.assert_array_equal(values[1], np.roll(PIXELS, 1))
    np.testing.assert_array_equal(by_itk(path), values)
    path = enhanced(write_dicom(tmp_path / "e.dcm", PIXELS), [2.0, 1.0])
    with pytest.raises(ReadError, match="several rescale slopes"):
        by_itk(path)


def test_every_frame_of_an_enhanced_file_has_its_place_and_slope(write_dicom, tmp_path: Path) -> None:
    header = dicom.read_header(str(enhanced(write_dicom(tmp_path / "e.dcm", PIXELS), [1.0, 2.0, 0.5])))
    assert header.frames == 3
    assert [place.position for place in header.geometry] == [(0, 0, 0), (0, 0, 3), (0, 0, 6)]
    assert [place.slope for place in header.geometry] == [1.0, 2.0, 0.5]
    assert {place.spacing for place in header.geometry} == {(0.5, 0.75)}


def test_overlay_bits_above_the_stored_ones_are_no_pixels(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS | 0x8000, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(dicom.read_stored(str(path))[0][0], PIXELS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("CHEST", "chest"), ("C SPINE", "cspine"), ("CHEST_ABDOMEN", "chestabdomen"), ("Miller", ""), ("HEAD MILLER", ""), ("", ""), (None, "")],
)  # fmt: skip
def test_only_defined_terms_pass_as_body_part(write_dicom, tmp_path: Path, value: str | None, expected: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", BodyPartExamined=value)
    assert dicom.read_header(str(path)).body_part == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Localiser sag", True), ("AAHead_Scout", True), ("Topogram  0.6  T80s", True), ("3-plane loc", True), ("THREE PLANE", True),
        ("t2_tse_tra", False), ("Scott^Plane 13 planes", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_a_series_that_is_called_a_localizer_is_known_as_one(write_dicom, tmp_path: Path, text, expected: bool) -> None:
    path = write_dicom(tmp_path / "a.dcm", SeriesDescription=text)
    header = dicom.read_header(str(path))
    assert header.called_localizer == expected
    assert not text or text not in str(header)


def test_lossy_by_tag_where_there_is_one_and_by_syntax_elsewhere(write_dicom, tmp_path: Path) -> None:
    def lossy(syntax: str, tag: str | None) -> bool:
        path = write_dicom(tmp_path / "a.dcm", LossyImageCompression=tag)
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = syntax
        return dicom._header(str(path), data).lossy

    assert not lossy("1.2.840.10008.1.2.1", None)
    assert lossy("1.2.840.10008.1.2.1", "01")  # decompressed, but it was lossy before
    assert lossy("1.2.840.10008.1.2.4.91", None)
    assert not lossy("1.2.840.10008.1.2.4.91", "00")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"PixelData": b"\0" * 100}, "truncated: the pixel data has 100 of 2,584 bytes"),
        ({"PixelData": None}, "no pixel data"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}, "colour image"),
    ],
)
def test_pixels_that_cannot_be_had_have_a_reason(write_dicom, tmp_path: Path, fields: dict, reason: str) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS, **fields)
    with pytest.raises(ReadError) as caught:
        dicom.read_stored(str(path))
    assert str(caught.value) == reason


def test_rescale_values_that_mean_nothing_are_not_replaced_by_a_guess(write_dicom, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="RescaleSlope is 0"):
        dicom.read_header(str(write_dicom(tmp_path / "a.dcm", RescaleSlope=0)))
    path = write_dicom(tmp_path / "b.dcm", RescaleIntercept="-1024")
    path.write_bytes(path.read_bytes().replace(b"-1024", b"nan  "))
    with pytest.raises(ReadError, match="RescaleIntercept is no finite number"):
        dicom.read_header(str(path))
    path = edit(write_dicom(tmp_path / "e.dcm"), NumberOfFrames=77)
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x0077", b"IS\x02\x00x7"))
    with pytest.raises(ReadError, match="malformed header: NumberOfFrames is no whole number"):
        dicom.read_header(str(path))
    # A thickness that is no number is a description that is missing, and no more.
    path = write_dicom(tmp_path / "c.dcm", SliceThickness="2.75")
    path.write_bytes(path.read_bytes().replace(b"2.75", b"thin"))
    assert dicom.read_header(str(path)).thickness == 0.0


def test_a_promise_of_very_many_frames_is_refused_at_once(write_dicom, tmp_path: Path) -> None:
    path = edit(write_dicom(tmp_path / "a.dcm"), NumberOfFrames=2_000_000_000)
    with pytest.raises(ReadError, match="2,000,000,000 frames"):
        dicom.read_header(str(path))


def test_frames_without_items_of_their_own_share_one_geometry_and_cost_nothing(write_dicom, tmp_path: Path) -> None:
    path = edit(write_dicom(tmp_path / "a.dcm"), NumberOfFrames=65536)
    began = time.process_time()
    places = dicom.read_header(str(path)).geometry
    assert len(places) == 65536 and len(set(map(id, places))) == 1
    assert time.process_time() - began < 0.5
    path = edit(enhanced(write_dicom(tmp_path / "e.dcm", PIXELS), [2.0, 3.0]), NumberOfFrames=4)
    assert [place.slope for place in dicom.read_header(str(path)).geometry] == [2.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_what_is_absurdly_large_is_no_geometry(name: str, write_dicom, tmp_path: Path) -> None:
    """It overflows where distances are taken. The slice stays, as one without that value."""
    path = write_dicom(tmp_path / "a.dcm")
    count = len(pydicom.dcmread(path)[name].value)
    found = [
        dicom.read_header(str(edit(path, **{name: [value] + [0.5] * (count - 1)}))).geometry[0]
        for value in (2e5, 1e200)
    ]
    field = {"ImagePositionPatient": "position", "ImageOrientationPatient": "orientation", "PixelSpacing": "spacing"}[
        name
    ]
    assert getattr(found[0], field)[0] == 2e5 and getattr(found[1], field) is None


def test_the_second_decoder_is_not_asked_to_read_what_follows_the_pixels(
    write_dicom, tmp_path: Path, monkeypatch
) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    monkeypatch.setattr(dicom, "_decoded", failing(RuntimeError()))
    path.write_bytes(path.read_bytes() + bytes(1000))
    np.testing.assert_array_equal(dicom.read_stored(str(path))[0][0], PIXELS)
    path.write_bytes(path.read_bytes() + bytes(2_000_000))
    began = time.process_time()
    with pytest.raises(ReadError, match="it reads what follows the pixels too, 2,001,000 bytes"):
        dicom.read_stored(str(path))
    assert time.process_time() - began < 0.5


def test_a_decoder_that_panics_costs_its_file_and_not_the_worker(write_dicom, tmp_path: Path, monkeypatch) -> None:
    class Panic(BaseException):
        """As Rust's panics arrive in Python."""

    path = write_dicom(tmp_path / "a.dcm", PIXELS)

    monkeypatch.setattr(dicom, "_decoded", failing(Panic()))
    assert dicom.read_stored(str(path))[1].startswith("SimpleITK")
    monkeypatch.setattr(dicom, "_decoded", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        dicom.read_stored(str(path))


def test_damage_in_the_file_meta_information_is_a_reason(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm")
    data = path.read_bytes()
    # The SOP class of the meta information gets a representation that does not exist, and that of the data set vanishes.
    data = data.replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00ZZ").replace(
        b"\x08\x00\x16\x00UI", b"\x08\x00\x17\x00UI"
    )
    path.write_bytes(data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x12\x00US"))
    with pytest.raises(ReadError):
        dicom.read_header(str(path))


def test_cut_off_anywhere_it_is_a_reason_or_the_whole_truth(write_dicom, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    read = 0
    for length in range(0, len(whole) + 1, 37):
        (tmp_path / "b.dcm").write_bytes(whole[:length])
        for function in (dicom.read_header, dicom.read_stored):
            try:
                value = function(str(tmp_path / "b.dcm"))
            except ReadError as error:
                assert "P1" not in str(error)
            else:
                read += 1
                if function is dicom.read_stored:
                    np.testing.assert_array_equal(value[0][0], PIXELS)
    assert read


def test_noise_in_any_place_never_crashes_the_reader(write_dicom, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "a.dcm", PIXELS).read_bytes()
    random = np.random.default_rng(5)
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(0, len(whole) - PIXELS.nbytes, 6):
            data[at] = random.integers(0, 256)
        (tmp_path / "b.dcm").write_bytes(data)
        for function in (dicom.read_header, dicom.read_stored):
            try:
                function(str(tmp_path / "b.dcm"))
            except ReadError:
                pass


def test_what_is_dicom_by_its_first_bytes(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm")
    assert dicom.is_dicom(io.BytesIO(path.read_bytes()))
    old = path.read_bytes()[132:]
    for name, data, expected in (
        ("old", old, True),
        ("text", b"hello", False),
        ("pdf", b"%PDF-1.7", False),
        ("none", b"", False),
    ):
        file = io.BytesIO(data)
        assert (name, dicom.is_dicom(file), file.tell()) == (name, expected, 0)


def test_a_missing_decoder_is_named_before_the_build_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    dicom.check_plugins()
    # pylibjpeg-openjpeg alone does nothing: pydicom wants the package pylibjpeg too.
    monkeypatch.setitem(dicom.PLUGINS, "1.2.840.10008.1.2.4.90", "another plugin")
    with pytest.raises(UserError, match=r"no decoder another plugin .*curia-jax\[ingest\]"):
        dicom.check_plugins()


def test_zeros_after_the_pixels_are_padding_and_cost_nothing(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    path.write_bytes(path.read_bytes() + bytes(4_000_000))
    began = time.process_time()
    np.testing.assert_array_equal(dicom.read_stored(str(path))[0][0], PIXELS)
    assert time.process_time() - began < 0.5  # as empty elements they are half a million


def test_absurd_sizes_and_numbers_of_elements_are_refused(write_dicom, tmp_path: Path) -> None:
    path = edit(write_dicom(tmp_path / "a.dcm"), Rows=65535, Columns=65535)
    with pytest.raises(ReadError, match="promises 65,535 x 65,535 px; a frame may have 67,108,864"):
        dicom.read_header(str(path))
    path = write_dicom(tmp_path / "b.dcm")
    element = b"\x08\x00\x50\x00SH\x00\x00"
    at = path.read_bytes().index(b"\x08\x00\x16\x00UI")
    path.write_bytes(path.read_bytes()[:at] + element * (dicom.MAXIMUM_ELEMENTS + 1) + path.read_bytes()[at:])
    for function in (dicom.read_header, dicom.read_stored):
        with pytest.raises(ReadError, match="more than 50,000 elements before the pixels"):
            function(str(path))


def test_want_of_memory_is_a_reason_with_a_remedy(write_dicom, tmp_path: Path, monkeypatch) -> None:
    path = write_dicom(tmp_path / "a.dcm")

    def read_partial(*arguments, **more) -> None:
        raise MemoryError

    for name, function in (("read_partial", read_partial), ("_decoded", failing(MemoryError()))):
        with monkeypatch.context() as patch:
            patch.setattr(dicom, name, function)
            with pytest.raises(ReadError, match="more memory than a worker may take.*--memory-gb"):
                dicom.read_stored(str(path))


def test_no_more_than_a_frame_of_a_large_file_is_in_memory(write_dicom, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dicom, "IN_MEMORY_BYTES", 1 << 20)
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    frames = np.random.default_rng(0).integers(0, 4096, (100, 256, 256)).astype(np.uint16)
    edit(path, NumberOfFrames=100, Rows=256, Columns=256, PixelData=frames.tobytes())
    tracemalloc.start()
    try:
        with dicom.open_image(str(path)) as image:
            for number, frame in enumerate(image.stored()):
                assert number % 33 or np.array_equal(frame, frames[number])
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()
    assert number == 99


def test_where_the_first_decoder_stops_the_second_goes_on(write_dicom, tmp_path: Path, monkeypatch) -> None:
    path = enhanced(write_dicom(tmp_path / "e.dcm", PIXELS), [2.0, 2.0, 2.0])
    values, decoder = dicom.read_stored(str(path))
    decoded = dicom._decoded
    for how in (lambda: iter(()), lambda: failing(RuntimeError())()):
        monkeypatch.setattr(dicom, "_decoded", lambda *a, how=how: chain(islice(decoded(*a), 1), how()))
        found, both = dicom.read_stored(str(path))
        np.testing.assert_array_equal(found, values)
        assert both.startswith(f"{decoder}, SimpleITK")


def test_compressed_pixels_that_are_cut_off_are_refused_before_they_are_decoded(write_dicom, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    data = pydicom.dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)
    np.testing.assert_array_equal(dicom.read_stored(str(path))[0][0], PIXELS)
    whole = path.read_bytes()
    for cut in (1, 8, 9, 500):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ReadError, match="truncated: the compressed pixel data has no end"):
            dicom.read_stored(str(path))


def test_more_frames_than_promised_are_refused(write_dicom, tmp_path: Path) -> None:
    path = edit(
        write_dicom(tmp_path / "a.dcm"), PixelData=bytes(2 * 40 * 44 * 3), NumberOfFrames=2, Rows=40, Columns=44
    )
    with pytest.raises(ReadError, match="promises 2 frames, the file holds more"):
        dicom.read_stored(str(path))


def test_frames_are_hashed_like_the_whole(write_dicom, tmp_path: Path) -> None:
    values = np.stack([PIXELS, PIXELS + 1])
    whole = hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:16]
    assert dicom.stored_sha256(values) == whole == dicom.stored_sha256(np.asfortranarray(values))
