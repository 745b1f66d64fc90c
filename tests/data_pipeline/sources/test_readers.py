"""The contract of data_pipeline.sources.base, for every reader."""

import copy
import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pydicom.config
import pytest
import SimpleITK
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from data_pipeline.sources import readers
from data_pipeline.sources.base import ImageFacts, ReadError, ReadRequest, Slice
from data_pipeline.sources.dicom_header import read_header

ROOT = Path(__file__).resolve().parents[3]
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 3000, (4, 40, 44)).astype(np.uint16)
VOLUME = RANDOM.integers(-900, 1200, (44, 40, 4)).astype(np.int16)  # axes to the right, front, up
FRACTIONS = RANDOM.normal(0, 1, (44, 40, 4)).astype(np.float32)
SECRET = "Xanthippe Quibbleton"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sound file.

    Attributes:
      real: its real values in spatial order, computed without our code.
      exact: real values are whole numbers times a slope; else they are kept in 65,535 steps.
    """

    kind: str
    request: ReadRequest
    real: np.ndarray
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Read:
    """What a reader says of a file."""

    facts: ImageFacts
    slices: list[Slice]
    decoder: str
    stored_sha256: str


def read(kind: str, request: ReadRequest) -> Read:
    with readers.open_source(kind, request) as source:
        assert source.excluded == ""
        facts = source.facts
        return Read(facts, list(source.slices()), source.decoder, source.stored_sha256)


def as_viewed(values: np.ndarray) -> np.ndarray:
    """Axial slices of a volume in axes right, front, up: the front above, the patient's right on the left."""
    return values[::-1, ::-1].transpose(2, 1, 0)


def write_dicom_ct(path: Path, write_dicom: Callable[..., Path], **unused) -> Sample:
    write_dicom(path, FRAMES[0], RescaleSlope=2, RescaleIntercept=-1000, BodyPartExamined=SECRET)
    real = FRAMES[:1].astype(np.float64) * 2 - 1000
    return Sample("dicom", ReadRequest(str(path), "CT", str(path.parent), frames=((0, 7.5),)), real)


def write_dicom_mr(path: Path, write_dicom: Callable[..., Path], **unused) -> Sample:
    write_dicom(path, FRAMES[0], Modality="MR", RescaleSlope="-0.5", RescaleIntercept="7")
    return Sample("dicom", ReadRequest(str(path), "MR", str(path.parent), frames=((0, 0.0),)), FRAMES[:1] * -0.5 + 7)


def write_dicom_frames(path: Path, write_enhanced: Callable[..., Path], **unused) -> Sample:
    write_enhanced(path, FRAMES, [1.0, 2.0, 3.0, 4.0])
    order = (3, 1, 2, 0)  # in space; as stored in the file: 0, 1, 2, 3
    real = np.stack([FRAMES[n].astype(np.float64) * (n + 1) - 1024 for n in order])
    frames = tuple((n, 3.0 * rank) for rank, n in enumerate(order))
    return Sample("dicom", ReadRequest(str(path), "CT", str(path.parent), frames=frames), real)


def write_dicom_compressed(path: Path, write_dicom: Callable[..., Path], **unused) -> Sample:
    data = pydicom.dcmread(write_dicom(path, FRAMES[1]))
    if "deflated" in path.name:
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    else:
        data.compress(RLELossless if "rle" in path.name else JPEG2000Lossless)
    data.save_as(path)
    real = FRAMES[1:2].astype(np.float64) - 1024
    return Sample("dicom", ReadRequest(str(path), "CT", str(path.parent), frames=((0, 0.0),)), real)


def write_nifti(path: Path, **unused) -> Sample:
    nibabel.Nifti1Image(VOLUME, np.diag([1, 1, 3, 1])).to_filename(path)
    return Sample("volume", ReadRequest(str(path), "auto", str(path.parent)), as_viewed(VOLUME.astype(np.float64)))


def write_mgh(path: Path, **unused) -> Sample:
    nibabel.MGHImage(VOLUME, np.diag([1, 1, 3, 1])).to_filename(path)
    return Sample("volume", ReadRequest(str(path), "auto", str(path.parent)), as_viewed(VOLUME.astype(np.float64)))


def write_nifti_float(path: Path, **unused) -> Sample:
    nibabel.Nifti1Image(FRACTIONS, np.diag([1, 1, 3, 1])).to_filename(path)
    return Sample("volume", ReadRequest(str(path), "MR", str(path.parent)), as_viewed(FRACTIONS), exact=False)


def write_itk(path: Path, **unused) -> Sample:
    image = SimpleITK.GetImageFromArray(VOLUME.transpose(2, 1, 0))
    image.SetSpacing((1.0, 1.0, 3.0))
    image.SetMetaData("PatientName", SECRET)
    SimpleITK.WriteImage(image, str(path), path.suffix == ".mha")
    return Sample("volume", ReadRequest(str(path), "CT", str(path.parent)), VOLUME.transpose(2, 1, 0))


def write_picture(path: Path, **unused) -> Sample:
    info = PngInfo()
    info.add_text("Patient", SECRET)
    Image.fromarray(FRAMES[0]).save(path, **({"pnginfo": info} if path.suffix == ".png" else {"description": SECRET}))
    return Sample("image", ReadRequest(str(path), "OT", str(path.parent)), FRAMES[:1])


SAMPLES: dict[str, Callable[..., Sample]] = {
    "ct.dcm": write_dicom_ct, "mr.dcm": write_dicom_mr, "frames.dcm": write_dicom_frames, "rle.dcm": write_dicom_compressed, "deflated.dcm": write_dicom_compressed,
    "j2k.dcm": write_dicom_compressed, "v.nii": write_nifti, "v.nii.gz": write_nifti, "float.nii.gz": write_nifti_float, "v.mgz": write_mgh,
    "v.nrrd": write_itk, "v.mha": write_itk, "p.png": write_picture, "p.tif": write_picture,
}  # fmt: skip


@pytest.fixture(params=SAMPLES)
def sample(request, tmp_path: Path, write_dicom, write_enhanced) -> Sample:
    folder = tmp_path / "in"
    folder.mkdir()
    made = SAMPLES[request.param](folder / request.param, write_dicom=write_dicom, write_enhanced=write_enhanced)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return dataclasses.replace(made, request=dataclasses.replace(made.request, scratch=str(scratch)))


def test_samples_cover_every_reader() -> None:
    kinds = {name.rpartition(".")[2] for name in SAMPLES}
    assert set(readers.READERS) == {"dicom", "volume", "image"} and kinds >= {"dcm", "nii", "png"}


def test_real_values_are_exact_and_pixels_uint16(sample: Sample) -> None:
    slices = sorted(read(sample.kind, sample.request).slices, key=lambda one: one.rank)
    assert len(slices) == len(sample.real)
    step = float(np.ptp(sample.real)) / 65535
    for one, real in zip(slices, sample.real, strict=True):
        assert one.pixels.dtype == np.uint16 and one.slope > 0
        found = one.pixels.astype(np.float64) * one.slope + one.intercept
        np.testing.assert_allclose(found, real, rtol=0, atol=0 if sample.exact else 0.501 * step)
        if one.histogram is not None:
            np.testing.assert_array_equal(one.histogram, np.bincount(one.pixels.ravel()))


def test_ranks_are_a_permutation_in_spatial_order(sample: Sample) -> None:
    slices = read(sample.kind, sample.request).slices
    assert sorted(one.rank for one in slices) == list(range(len(sample.real)))
    positions = [one.position for one in sorted(slices, key=lambda one: one.rank)]
    assert positions == sorted(positions)


def test_digests_are_deterministic_and_independent_of_the_folder(sample: Sample, tmp_path: Path) -> None:
    first = read(sample.kind, sample.request)
    copied = tmp_path / "copy" / os.path.basename(sample.request.path)
    copied.parent.mkdir()
    copied.write_bytes(Path(sample.request.path).read_bytes())
    again = read(sample.kind, dataclasses.replace(sample.request, path=str(copied)))
    assert first.facts == again.facts and first.decoder == again.decoder != ""
    assert first.stored_sha256 == again.stored_sha256 and bool(first.stored_sha256) == sample.exact
    assert [one.source for one in first.slices] == [one.source for one in again.slices]
    assert len({one.source for one in first.slices}) == len(first.slices) and first.slices[0].source
    for one, other in zip(first.slices, again.slices, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def global_state() -> dict:
    """Settings of the libraries, and of Python, that readers could change."""
    loggers = {n: o for n, o in logging.Logger.manager.loggerDict.items() if isinstance(o, logging.Logger)}
    return {
        "loggers": {name: (one.disabled, one.level, list(one.handlers)) for name, one in loggers.items()},
        "validation": pydicom.config.settings.reading_validation_mode,
        "pillow": Image.MAX_IMAGE_PIXELS,
        "itk": SimpleITK.ProcessObject.GetGlobalWarningDisplay(),
        "filters": list(warnings.filters),
        "numpy": np.geterr(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


def test_reading_changes_neither_arguments_nor_global_state(sample: Sample) -> None:
    read(sample.kind, sample.request)  # libraries import parts of themselves, with loggers of their own
    request, content, state = copy.deepcopy(sample.request), Path(sample.request.path).read_bytes(), global_state()
    with readers.open_source(sample.kind, sample.request) as source:
        for _ in source.slices():
            assert global_state() == state  # nor does its consumer see other settings
    Path(sample.request.path).write_bytes(content[: len(content) // 2])
    with pytest.raises(ReadError):
        read(sample.kind, sample.request)
    assert global_state() == state and sample.request == request
    assert os.listdir(sample.request.scratch) == []


def test_importing_readers_changes_no_global_state() -> None:
    program = """
import json, logging, warnings
import pydicom, pydicom.config, SimpleITK, nibabel, pyarrow, PIL.Image, scipy.ndimage, scipy.special, tensorflow_datasets

def state():
    return [
        logging.getLogger("pydicom").disabled, pydicom.config.settings.reading_validation_mode, PIL.Image.MAX_IMAGE_PIXELS,
        SimpleITK.ProcessObject.GetGlobalWarningDisplay(), [str(one) for one in warnings.filters],
    ]

before = state()
from data_pipeline.sources import archives, object_stores, readers
from data_pipeline.stages import inventory, labels
print(json.dumps([before, state()]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before == after


def test_truncation_raises_read_error_or_reads_correct_values(sample: Sample) -> None:
    whole = Path(sample.request.path).read_bytes()
    wanted = read(sample.kind, sample.request)
    refused = 0
    for length in np.linspace(0, len(whole) - 1, 23).astype(int):
        Path(sample.request.path).write_bytes(whole[:length])
        try:
            found = read(sample.kind, sample.request)
        except ReadError as error:
            refused += 1
            assert SECRET not in str(error)
        else:  # a few bytes after the pixels are missing
            assert [one.source for one in found.slices] == [one.source for one in wanted.slices]
    assert refused >= 20


def test_garbage_raises_read_error(sample: Sample) -> None:
    whole = Path(sample.request.path).read_bytes()
    for data in (b"", b"no image", RANDOM.bytes(5000), whole[:300] + RANDOM.bytes(200), bytes(3000)):
        Path(sample.request.path).write_bytes(data)
        with pytest.raises(ReadError):
            read(sample.kind, sample.request)


def test_missing_file_raises_os_error_with_errno(sample: Sample) -> None:
    os.unlink(sample.request.path)
    with pytest.raises(OSError) as caught:
        read(sample.kind, sample.request)
    assert caught.value.errno


def test_header_values_reach_no_log_warning_or_stream(sample: Sample, caplog, capfd) -> None:
    content = Path(sample.request.path).read_bytes()
    with warnings.catch_warnings(record=True) as told, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        for data in (content, content[: len(content) * 2 // 3]):
            Path(sample.request.path).write_bytes(data)
            try:
                if sample.kind == "dicom":
                    read_header(sample.request.path)
                read(sample.kind, sample.request)
            except ReadError:
                pass
    assert caplog.text + "".join(str(one.message) for one in told) == ""
    out, err = capfd.readouterr()  # MetaImage prints sizes
    assert not any(word in out + err for word in SECRET.split())
