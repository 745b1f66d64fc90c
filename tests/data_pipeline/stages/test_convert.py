import builtins
import itertools
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from array_record.python import array_record_module
from PIL import Image

from curia_common.errors import DataError, StorageError, UserError
from data_pipeline.format import records
from data_pipeline.sources import archives, dicom_pixels, geometry, retry
from data_pipeline.sources.base import NO_MEMORY, ReadError
from data_pipeline.sources.stored_values import stored_sha256
from data_pipeline.stages import assignment, convert, inventory, pack, statistics
from data_pipeline.stages.assignment import Conversion, PlannedShard

KEY = b"0123456789abcdef"
PIXELS = np.random.default_rng(0).integers(0, 2400, (40, 48)).astype(np.uint16)


def plan_of(sources: list, modality: str = "auto", **settings) -> assignment.Plan:
    options = inventory.Options(KEY, modality=modality)
    entries = inventory.inspect((sources, options), {}, lambda item: None)
    conversion = Conversion("x", **settings)
    return assignment.make(entries, assignment.Options(KEY, 0.0, 0.0, 10**9, frozenset(), conversion))[0]


class Converted:
    """Files converted as one shard: its report, the rows of the index, and slices in order."""

    def __init__(
        self, folder: Path, paths: list[Path], skip: dict | None = None, modality: str = "auto", **settings
    ) -> None:
        plan = plan_of([str(p) for p in paths], modality, **settings)
        whole = PlannedShard("train", 0, tuple(series for shard in plan.shards for series in shard.series))
        self.read: list[str | None] = []
        folder.mkdir(exist_ok=True)
        self.report, self.index = convert.convert_shard(
            str(folder), plan.settings.conversion, whole, skip or {}, self.read.append
        )
        self.path = folder / self.report.file
        reader = array_record_module.ArrayRecordReader(str(self.path), "")
        data = [reader.read([n])[0] for n in range(reader.num_records())]
        self.slices = [
            records.parse_slice(item, slot)
            for item, count in zip(data, self.report.slice_counts, strict=True)
            for slot in range(count)
        ]

    def outcome(self, path: Path) -> tuple[str, str]:
        return self.report.files[str(path)].fate, self.report.files[str(path)].reason


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Converted]:
    return lambda *paths, **settings: Converted(tmp_path / "out", list(paths), **settings)


# ---- pixels


def test_ct_is_stored_as_hu_plus_1024(converted, tmp_path: Path, write_dicom) -> None:
    # The same HU under three ways of storing them.
    hu = PIXELS.astype(np.int16) - 1024
    paths = [
        write_dicom(tmp_path / "a.dcm", PIXELS, SeriesInstanceUID="2.25.10"),
        write_dicom(tmp_path / "b.dcm", hu, SeriesInstanceUID="2.25.11"),
        write_dicom(
            tmp_path / "c.dcm",
            (hu + 1100) * 2,
            SeriesInstanceUID="2.25.12",
            RescaleSlope="0.5",
            RescaleIntercept="-1100",
        ),
    ]
    found = converted(*paths)
    assert len(found.slices) == 3
    for one in found.slices:
        assert one.facts.hu
        np.testing.assert_allclose(one.pixels * one.facts.slope + one.facts.intercept, hu)
    whole = [one for one in found.slices if one.facts.slope == 1]
    assert [one.facts.intercept for one in whole] == [-1024, -1024]
    for one in whole:
        np.testing.assert_array_equal(one.pixels, PIXELS)


def test_padding_below_air_is_clipped_and_flagged(converted, tmp_path: Path, write_dicom) -> None:
    hu = PIXELS.astype(np.int16) - 1024
    hu[:5] = -2000
    (one,) = converted(write_dicom(tmp_path / "a.dcm", hu)).slices
    np.testing.assert_array_equal(one.pixels.astype(int) - 1024, np.maximum(hu, -1024))
    found = converted(write_dicom(tmp_path / "a.dcm", hu))
    assert found.index[0]["flags"] & records.CLIPPED


def test_mr_keeps_its_stored_values(converted, tmp_path: Path, write_dicom) -> None:
    signed = PIXELS.astype(np.int16) - 300
    path = write_dicom(tmp_path / "a.dcm", signed, Modality="MR", RescaleSlope="1.25", RescaleIntercept="3")
    (one,) = converted(path).slices
    assert not one.facts.hu and one.facts.slope == 1.25
    np.testing.assert_allclose(one.pixels * one.facts.slope + one.facts.intercept, signed * 1.25 + 3)


def test_negative_slope_is_inverted(converted, tmp_path: Path, write_dicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", PIXELS, Modality="MR", RescaleSlope="-0.5", RescaleIntercept="7")
    (one,) = converted(path).slices
    assert one.facts.slope == 0.5
    np.testing.assert_allclose(one.pixels * one.facts.slope + one.facts.intercept, PIXELS * -0.5 + 7)
    assert one.facts.low < one.facts.high and one.std > 0


def test_monochrome1_inverts_mr_but_not_hu(converted, tmp_path: Path, write_dicom) -> None:
    fields = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    paths = [
        write_dicom(tmp_path / "a.dcm", PIXELS, SeriesInstanceUID="2.25.10", **fields),
        write_dicom(tmp_path / "b.dcm", PIXELS, SeriesInstanceUID="2.25.11", Modality="MR", **fields),
        write_dicom(
            tmp_path / "c.dcm",
            PIXELS // 2,
            SeriesInstanceUID="2.25.11",
            Modality="MR",
            ImagePositionPatient=[0, 0, 9],
            **fields,
        ),
    ]
    found = converted(*paths)
    ct = next(one for one in found.slices if one.facts.hu)
    np.testing.assert_array_equal(ct.pixels, PIXELS)
    # Every slice of a series is turned about the same value.
    first, second = (one for one in found.slices if not one.facts.hu)
    np.testing.assert_array_equal(first.pixels, 4095 - PIXELS)
    np.testing.assert_array_equal(second.pixels, 4095 - PIXELS // 2)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_volume_beyond_16_bits_is_quantized_to_65535_steps(converted, tmp_path: Path, kind: type) -> None:
    values = np.random.default_rng(1).normal(0, 40_000, (40, 44, 3)).astype(kind)
    nibabel.Nifti1Image(values, np.diag([1, 1, 4, 1])).to_filename(tmp_path / "v.nii")
    found = converted(tmp_path / "v.nii")
    assert [one.modality for one in found.slices] == ["MR"] * 3
    real = np.stack([one.pixels * one.facts.slope + one.facts.intercept for one in found.slices])
    step = (float(values.max()) - float(values.min())) / 65535
    # Half a step, and the single precision in which a record holds slope and intercept.
    np.testing.assert_allclose(real, values[::-1, ::-1].transpose(2, 1, 0), atol=0.51 * step + 0.02)


def test_modality_of_volume_is_inferred_unless_given(converted, tmp_path: Path) -> None:
    # Air around soft tissue, each with noise.
    values = np.random.default_rng(1).normal(0, 8, (40, 44, 2)) + np.where(np.arange(44) < 20, 40, -1000)[:, None]
    nibabel.Nifti1Image(values.astype(np.int16), np.eye(4)).to_filename(tmp_path / "v.nii")
    found = converted(tmp_path / "v.nii")
    assert found.slices[0].modality == "CT" and found.slices[0].facts.hu
    assert found.index[0]["flags"] & records.MODALITY_INFERRED
    nibabel.Nifti1Image(values.astype(np.int16) + 1100, np.eye(4)).to_filename(tmp_path / "v.nii")
    assert converted(tmp_path / "v.nii").slices[0].modality == "MR"
    found = converted(tmp_path / "v.nii", modality="MR")
    assert found.slices[0].modality == "MR" and not found.slices[0].facts.hu
    assert not found.index[0]["flags"] & records.MODALITY_INFERRED


def test_reduction_keeps_shape_mean_and_field_of_view(converted, tmp_path: Path, write_dicom) -> None:
    y, x = np.mgrid[:96, :160]
    smooth = (1000 + 400 * np.sin(x / 17) + 300 * np.cos(y / 11)).astype(np.uint16)
    (small,) = converted(write_dicom(tmp_path / "a.dcm", smooth), size=80).slices
    assert small.pixels.shape == (48, 80)
    assert small.spacing[:2] == (1.0, 1.5)
    # Each pixel is close to the mean of the four that it stands for.
    np.testing.assert_allclose(small.pixels, smooth.reshape(48, 2, 80, 2).mean(axis=(1, 3)), atol=4)
    (same,) = converted(write_dicom(tmp_path / "a.dcm", smooth), size=160).slices
    np.testing.assert_array_equal(same.pixels, smooth)


# ---- series and records


def test_slices_are_in_spatial_order_with_their_facts(converted, tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "s", positions=[6.0, 0.0, 9.0, 3.0, 12.0])
    found = converted(*paths)
    assert [row["position"] for row in found.index] == [0, 3, 6, 9, 12]
    assert [row["index"] for row in found.index] == [0, 1, 2, 3, 4]
    stored = [pydicom.dcmread(paths[n]).pixel_array for n in (1, 3, 0, 2, 4)]
    for one, pixels in zip(found.slices, stored, strict=True):
        np.testing.assert_array_equal(one.pixels, pixels)
        assert one.spacing == (0.5, 0.75, 3.0)
        assert (one.modality, one.plane) == ("CT", "axial")
    assert {row["manufacturer"] for row in found.index} == {"siemens"}
    assert not any(row["flags"] for row in found.index)


@pytest.mark.parametrize("per_record", [1, 2, 4, 100])
def test_slices_per_record_changes_places_alone(converted, tmp_path: Path, write_series, per_record: int) -> None:
    found = converted(*write_series(tmp_path / "s", 7), slices_per_record=per_record)
    counts = found.report.slice_counts
    assert sum(counts) == 7 and max(counts) <= per_record and len(counts) == -(-7 // per_record)
    assert [row["index"] for row in found.index] == list(range(7))
    for row, one in zip(found.index, found.slices, strict=True):
        assert (row["mean"], row["patient"]) == (pytest.approx(one.mean, rel=1e-6), one.patient)
    assert [row["slot"] for row in found.index] == [slot for count in counts for slot in range(count)]


def test_slices_of_other_size_or_slope_get_own_records(converted, tmp_path: Path, write_dicom) -> None:
    paths = [
        write_dicom(tmp_path / f"{n}.dcm", PIXELS + n if n < 2 else PIXELS[:36], Modality="MR", ImagePositionPatient=[0, 0, n],
                    RescaleSlope=2 if n == 0 else 1, RescaleIntercept=0)
        for n in range(4)
    ]  # fmt: skip
    # Slices 2 and 3 have the same pixels; the fourth is a duplicate.
    found = converted(*paths, slices_per_record=8)
    assert found.report.slice_counts == [1, 1, 1]
    assert found.outcome(paths[3]) == ("duplicate", convert.SAME_PIXELS)
    assert found.report.largest == (40, 48)


def test_irregular_series_is_kept_and_flagged(converted, tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "s", positions=[0.0, 2.0, 4.0, 8.0, 10.0, 12.0])
    found = converted(*paths)
    assert len(found.slices) == 6
    assert all(row["flags"] == records.IRREGULAR for row in found.index)
    assert {found.outcome(path) for path in paths} == {("kept", geometry.GAP)}
    few = converted(*write_series(tmp_path / "t", 3))
    assert {row["flags"] for row in few.index} == {0}  # three slices in a row are regular, only few
    assert {outcome.reason for outcome in few.report.files.values()} == {geometry.FEW}


def test_excluded_files_have_problems_of_their_series(converted, tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "s", positions=[0.0, 2.0, 4.0, 8.0, 10.0, 12.0], pixels=np.full((40, 40), 300))
    found = converted(*paths)
    assert found.slices == []
    assert {(o.fate, o.reason, o.problems) for o in found.report.files.values()} == {
        ("excluded", "constant", geometry.GAP)
    }


def test_pictures_have_no_hu(converted, tmp_path: Path) -> None:
    Image.fromarray((PIXELS % 256).astype(np.uint8)).save(tmp_path / "a.png")
    (one,) = converted(tmp_path / "a.png", modality="CT").slices
    assert (one.modality, one.facts.hu, one.facts.slope, one.facts.intercept) == ("CT", False, 1.0, 0.0)
    np.testing.assert_array_equal(one.pixels, PIXELS % 256)


# ---- several slices in a file


def multiframe(path: Path, frames: np.ndarray, positions: list[float]) -> Path:
    """Turns a DICOM file into an Enhanced CT with these frames at these heights."""
    data = pydicom.dcmread(path)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    data.NumberOfFrames, data.Rows, data.Columns, data.PixelData = *frames.shape, frames.tobytes()
    del data.ImagePositionPatient
    items = []
    for z in positions:
        item, place = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [0, 0, z]
        item.PlanePositionSequence = pydicom.Sequence([place])
        items.append(item)
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(items)
    data.save_as(path)
    return path


def test_frames_are_in_spatial_order(converted, tmp_path: Path, write_dicom) -> None:
    frames = np.stack([np.roll(PIXELS, n) + np.uint16(n) for n in range(6)])
    frames[0] = frames[4]  # of two alike the lower one stays, which is read later
    heights = [9.0, 7.5, 6.0, 4.5, 3.0, 1.5]
    path = multiframe(write_dicom(tmp_path / "a.dcm", PIXELS), frames, heights)
    found = converted(path, slices_per_record=16)
    np.testing.assert_array_equal([one.pixels for one in found.slices], frames[:0:-1])
    assert [row["index"] for row in found.index] == [0, 1, 2, 3, 4]
    assert [row["position"] for row in found.index] == heights[:0:-1]
    assert found.report.left_out == {convert.SAME_PIXELS: 1}
    assert found.report.files[str(path)].stored_sha256 == stored_sha256(frames)
    assert [row["source"] for row in found.index] == [stored_sha256(frame) for frame in frames[:0:-1]]
    # The one that is left out does not count for the series.
    series = statistics.series_statistics({(1.0, -1024.0): np.bincount(frames[1:].ravel())})
    assert found.index[0]["series_mean"] == pytest.approx(series.mean, rel=1e-6)
    assert sum(found.report.intensity["HU"]) == frames[1:].size


@pytest.mark.parametrize("kind", ["files", "frames", "volume"])
def test_statistics_are_those_of_the_pixels(converted, tmp_path: Path, write_dicom, kind: str) -> None:
    # Brighter and brighter, so that what is known of one slice fits no other, and the histograms grow.
    frames = np.stack([np.roll(PIXELS, n) * np.uint16(n + 1) for n in range(5)])
    if kind == "files":
        place = tmp_path / "in"
        place.mkdir()
        paths = [
            write_dicom(place / f"{n}.dcm", frame, ImagePositionPatient=[0, 0, n]) for n, frame in enumerate(frames)
        ]
    elif kind == "frames":
        paths = [multiframe(write_dicom(tmp_path / "a.dcm", PIXELS), frames, [0.0, 1.0, 2.0, 3.0, 4.0])]
    else:
        paths = [tmp_path / "v.nii"]
        nibabel.Nifti1Image(frames.T.astype(np.int32), np.diag([1, 1, 4, 1])).to_filename(paths[0])
    found = converted(*paths, slices_per_record=16)
    assert len(found.slices) == 5
    for one in found.slices:
        wanted = statistics.slice_statistics(one.pixels, one.facts.slope, one.facts.intercept)
        measured = (one.facts.low, one.facts.high, one.mean, one.std)
        assert measured == pytest.approx((wanted.low, wanted.high, wanted.mean, wanted.std), rel=1e-6)
        assert one.body_box == wanted.body_box
        assert one.mean == pytest.approx(float(np.mean(one.pixels)) * one.facts.slope + one.facts.intercept, rel=1e-6)
    whole = np.concatenate([one.pixels.ravel() for one in found.slices])
    assert found.index[0]["series_mean"] == pytest.approx(whole.mean() + one.facts.intercept, rel=1e-6)
    assert found.index[0]["series_std"] == pytest.approx(whole.std(), rel=1e-6)


# ---- what can go wrong


def test_bad_file_is_quarantined_alone(converted, tmp_path: Path, write_series, monkeypatch) -> None:
    paths = write_series(tmp_path / "s", 7)
    paths[1].write_bytes(paths[1].read_bytes()[:-500])
    read = dicom_pixels.open_image

    def fail(path: str):
        if path == str(paths[2]):
            raise LookupError("DOE^JOHN")
        if path == str(paths[5]):
            raise MemoryError
        if path == str(paths[4]):
            raise OSError(13, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(dicom_pixels, "open_image", fail)
    found = converted(*paths, skip={str(paths[3]): "the decoder crashed on it (SIGSEGV)"})
    assert [row["index"] for row in found.index] == [0, 6]
    assert found.outcome(paths[1]) == ("quarantined", "truncated: the pixel data has 3,020 of 3,520 bytes")
    fate, reason = found.outcome(paths[2])
    assert fate == "quarantined" and "LookupError" in reason and "DOE" not in reason
    assert found.outcome(paths[3]) == ("quarantined", "the decoder crashed on it (SIGSEGV)")
    assert found.outcome(paths[4]) == ("quarantined", "cannot be read (Permission denied)")
    assert found.outcome(paths[5]) == ("quarantined", NO_MEMORY)
    assert str(paths[3]) not in found.read and found.read[-1] is None


@pytest.mark.parametrize("number", [2, 3])
def test_transient_storage_error_is_retried_then_fatal(
    converted, tmp_path: Path, write_series, monkeypatch, number
) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    paths = write_series(tmp_path / "s", 5)
    wanted = converted(*paths).index
    read, failed = dicom_pixels.Image.stored, []

    def fail(image):
        if image.path == str(paths[2]) and len(failed) < number:
            failed.append(image)
            raise OSError(5, "Input/output error", image.path)
        yield from read(image)

    monkeypatch.setattr(dicom_pixels.Image, "stored", fail)
    if number < 3:
        assert converted(*paths).index == wanted and len(failed) == number
    else:
        with pytest.raises(
            StorageError, match="cannot be read, tried 3 times .Input/output error.; rerun the same command"
        ):
            converted(*paths)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.nrrd", "p.png"])
def test_readers_tell_storage_errors_from_damage(converted, tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.setattr(retry, "PAUSES", ())
    values = np.random.default_rng(1).integers(0, 900, (40, 44, 4)).astype(np.int16)
    path = tmp_path / name
    if name.endswith("png"):
        Image.fromarray(values[:, :, 0].astype(np.uint16)).save(path)
    elif name.endswith("nrrd"):
        path.write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 40 44 4\nencoding: gzip\n\nno gzip")
    else:
        path.write_bytes(b"no volume" * 100)
    opened, count = builtins.open, itertools.count()

    def fail(file, *words, **named):
        # Of an NRRD volume Python reads the header, and the rest once SimpleITK could not.
        if str(file) == str(path) and next(count) >= name.endswith("nrrd"):
            raise OSError(5, "Input/output error", str(file))
        return opened(file, *words, **named)

    monkeypatch.setattr(builtins, "open", fail)
    with pytest.raises(StorageError, match="cannot be read, tried 1 times .Input/output error."):
        converted(path)


def test_full_scratch_disk_is_a_storage_error(converted, tmp_path: Path, write_series, monkeypatch) -> None:
    paths = write_series(tmp_path / "s", 5)

    def full(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(StorageError, match="scratch disk is full .No space left on device."):
        converted(*paths)


def test_multiframe_file_is_kept_whole_or_not_at_all(converted, tmp_path: Path) -> None:
    # The second slice of a volume fails: none of it may stay, or the manifest would lie.
    values = np.random.default_rng(1).integers(-1000, 1200, (40, 44, 4)).astype(np.int16)
    nibabel.Nifti1Image(values, np.diag([1, 1, 4, 1])).to_filename(tmp_path / "v.nii")
    rule = convert.exclusion.exclude_pixels

    def fail(pixels, stored, counts, to_hu):
        if abs(float(pixels.mean()) * to_hu[0] + to_hu[1] - float(values[..., 1].mean())) < 1e-3:
            raise ReadError("damaged")
        return rule(pixels, stored, counts, to_hu)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert.exclusion, "exclude_pixels", fail)
        found = converted(tmp_path / "v.nii", modality="CT")
    assert found.slices == [] and found.report.records == 0
    assert found.outcome(tmp_path / "v.nii") == ("quarantined", "damaged")


def test_file_is_kept_if_any_slice_is(converted, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(-1000, 1200, (40, 44, 4)).astype(np.int16)
    values[..., 0], values[..., 3] = values[..., 1], -1000
    nibabel.Nifti1Image(values, np.diag([1, 1, 4, 1])).to_filename(tmp_path / "v.nii")
    found = converted(tmp_path / "v.nii")
    assert [row["index"] for row in found.index] == [0, 2]  # the second repeats the first, the last is empty
    assert found.outcome(tmp_path / "v.nii") == ("kept", "")
    outcome = None
    for fate in ("excluded", "kept", "quarantined"):
        outcome = convert.better_outcome(outcome, convert.FileOutcome(fate, "", "", "train", "x"))
    assert outcome is not None and outcome.fate == "kept"


@pytest.mark.parametrize("when", ["before", "while"])
def test_input_changed_during_build_is_an_error(tmp_path: Path, write_series, monkeypatch, when: str) -> None:
    paths = write_series(tmp_path / "s", 5)
    plan = plan_of([str(p) for p in paths])
    read = dicom_pixels.open_image

    def change(path: str):
        os.utime(path, ns=(1, 1))  # the very file that is being read
        return read(path)

    if when == "before":
        os.utime(paths[3], ns=(1, 1))
    else:
        monkeypatch.setattr(dicom_pixels, "open_image", change)
    (tmp_path / "out").mkdir()

    def run() -> None:
        convert.convert_shard(str(tmp_path / "out"), plan.settings.conversion, plan.shards[0], {}, lambda item: None)

    with pytest.raises(DataError, match="an input changed while the build ran") as caught:
        run()
    assert "/" not in str(caught.value)  # paths can hold names
    paths[3].unlink()
    with pytest.raises((DataError, StorageError), match="an input (can no longer be read|changed)"):
        run()
    assert list((tmp_path / "out").iterdir()) == []


def test_conversion_is_deterministic(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "s", 6)
    first, second = (Converted(tmp_path / name, paths, slices_per_record=4) for name in ("a", "b"))
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.report == second.report and first.index == second.index


def test_scratch_folder_keeps_temporary_files_off_the_output(tmp_path: Path, write_series, monkeypatch) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for path in write_series(tmp_path / "s", 6):
            archive.write(path, path.name)
    whole = Converted(tmp_path / "plain", sorted((tmp_path / "s").iterdir()), planes=("coronal",))
    listing = archives.list_members((str(tmp_path / "s.zip"), str(tmp_path / "unpacked"), 0), {}, lambda item: None)
    plan = plan_of(list(listing.members), planes=("coronal",))
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    (out / "sidecars").mkdir(parents=True)
    stored = assignment.write(tmp_path, plan)
    lines = assignment.lines_of(tmp_path, plan.hash)
    job = convert.Job(
        str(out), str(out / "sidecars"), str(scratch), plan.hash, str(lines), plan.settings.conversion
    )  # fmt: skip
    task = convert.ShardTask(job, stored.shards[0].at)
    seen: set[Path] = set()
    convert.publish(task, {}, lambda item: seen.update(out.rglob("*")))
    assert seen == {out / "sidecars"}
    name = "x-train.array_record-00000"
    assert {path.name for path in out.rglob("*")} == {"sidecars", name, f"{name}.json", f"{name}.parquet"}
    assert (out / name).read_bytes() == whole.path.read_bytes()
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    # A build that replaced this one must not find shards of it.
    (out / name).unlink()
    with pytest.raises(UserError, match="another build into the same output replaced it"):
        convert.publish(task, {}, lambda item: lines.unlink(missing_ok=True))
    assert not (out / name).exists()


# ---- memory


@pytest.mark.long
def test_memory_does_not_grow_with_series_length(tmp_path: Path, write_series, monkeypatch) -> None:
    monkeypatch.setattr(pack, "SPOOL_BYTES", 1)
    rng = np.random.default_rng(1)

    def peak(count: int) -> int:
        paths = []
        for n in range(count):
            pixels, place = rng.integers(0, 1900, (256, 256)), [0, 0, 2.0 * n]
            paths += write_series(
                tmp_path / f"{count}" / f"{n}", positions=[2.0 * n], pixels=pixels, ImagePositionPatient=place
            )
        Converted(tmp_path / f"out{count}", paths)
        return peaks[-1]

    work, peaks = convert.convert_shard, []

    def traced(*arguments):
        tracemalloc.start()
        try:
            return work(*arguments)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(convert, "convert_shard", traced)
    peak(6)  # what is loaded at the first use
    # A slice has 131,072 bytes of pixels.
    assert peak(46) - peak(6) < 40 * 131_072 / 4


def test_side_longer_than_the_codec_holds_quarantines_the_file(converted, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70_000)).astype(np.uint8)).save(path)
    assert converted(path).outcome(path) == ("quarantined", "40 x 70,000 px; a side of a slice may have 65,535")
