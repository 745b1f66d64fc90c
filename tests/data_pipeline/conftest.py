"""What the pipeline's tests share: a phantom, single DICOM files, and builds as a user runs them."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from data_pipeline import build, inspect, phantom, synthetic_exams, verify, workers
from data_pipeline.format import shards

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key that everybody may know"
# The date on dataset cards, so that builds can be compared byte for byte at any hour.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")


@dataclasses.dataclass
class Result:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def _run(main: Callable[[list[str]], int], words: tuple[Any, ...]) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "site.key"
    path.write_text(KEY + "\n")
    return path


def _inline(function: workers.Work, tasks: list[Any], **unused: Any) -> Iterator[workers.Progress | workers.Done]:
    for number, task in enumerate(tasks):
        touched: list[str | None] = []
        result = function(task, {}, touched.append)
        yield from (workers.Progress(item) for item in touched if item is not None)
        yield workers.Done(number, result)


@pytest.fixture
def inline_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of the worker processes is done in this one, which spares seconds of starting them."""
    monkeypatch.setattr(workers, "run", _inline)


@pytest.fixture(scope="session")
def run_build(key_file: Path) -> Callable[..., Result]:
    """Builds in this process, with the tests' key unless another one is named. Without `processes`, the work of the worker
    processes is done here as well, which spares seconds of starting them."""

    def run(*words: Any, processes: int = 0, key: bool = True) -> Result:
        given = ("--key-file", key_file) if key and "--key-file" not in words else ()
        with pytest.MonkeyPatch.context() as patch:
            if not processes:
                patch.setattr(workers, "run", _inline)
            return _run(build.main, (*words, *given, "--workers", processes or 1))

    return run


@pytest.fixture(scope="session")
def run_verify() -> Callable[..., Result]:
    """Verifies in this process, like run_build."""

    def run(*words: Any, processes: int = 0) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            if not processes:
                patch.setattr(workers, "run", _inline)
            return _run(verify.main, (*words, "--workers", processes or 1))

    return run


@pytest.fixture(scope="session")
def run_inspect() -> Callable[..., Result]:
    return lambda *words: _run(inspect.main, words)


@pytest.fixture(scope="session")
def run_phantom() -> Callable[..., Result]:
    return lambda *words: _run(phantom.main, words)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 8 patients: 32 series of 5 slices, 40 px."""
    folder = tmp_path_factory.mktemp("phantom")
    synthetic_exams.write_study(folder, patients=8, seed=3, size=40, slices=5)
    return folder


@pytest.fixture(scope="session")
def dataset(study: Path, tmp_path_factory: pytest.TempPathFactory, run_build: Callable[..., Result]) -> Path:
    """The phantom, built with all splits and two slices a record. Tests must not change it."""
    folder = tmp_path_factory.mktemp("dataset") / "out"
    result = run_build(
        "--input", study / "dicom", "--output", folder, "--slices-per-record", 2, "--validation", 0.25, "--test", 0.25, processes=2
    )  # fmt: skip
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="session")
def manifest() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """Rows of a dataset's manifest by path."""
    return lambda folder: {row["path"]: row for row in pq.read_table(folder / shards.MANIFEST).to_pylist()}


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a finished dataset, hidden ones too, but for the lock."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., Path]:
    """Writes one CT or MR slice. Keywords are DICOM attributes; None leaves one out."""

    def write(
        path: Path, pixels: np.ndarray | None = None, *, syntax: str = ExplicitVRLittleEndian, **fields: Any
    ) -> Path:
        if pixels is None:
            # Air, fat and bone, different in every file.
            seed = zlib.crc32(os.fsencode(os.path.join(*path.parts[-2:])))
            pixels = np.random.default_rng(seed).integers(0, 1900, (40, 44))
        pixels = np.asarray(pixels)
        mr = fields.get("Modality") == "MR"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage if mr else CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = syntax
        data = FileDataset(
            None, {}, file_meta=meta, preamble=b"\0" * 128,
            is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=syntax != ExplicitVRBigEndian,
        )  # fmt: skip
        signed = pixels.dtype.kind == "i" and int(pixels.min()) < 0
        defaults: dict[str, Any] = {
            "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2", "PatientID": "P1", "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Manufacturer": "Siemens", "PixelSpacing": [0.5, 0.75],
            "SliceThickness": 2, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0],
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": pixels.shape[-2], "Columns": pixels.shape[-1],
            "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(signed),
            "PixelData": pixels.astype("<i2" if signed else "<u2").tobytes(),
        }  # fmt: skip
        if not mr:
            defaults |= {"RescaleSlope": 1, "RescaleIntercept": 0 if signed else -1024}
        for name, value in (defaults | fields).items():
            if value is not None:
                setattr(data, name, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def write_series(write_dicom: Callable[..., Path]) -> Callable[..., list[Path]]:
    """A regular axial CT series, 2 mm apart."""

    def write(folder: Path, count: int = 6, *, positions: list[float] | None = None, **fields: Any) -> list[Path]:
        places = positions if positions is not None else [2.0 * n for n in range(count)]
        return [
            write_dicom(folder / f"{n:03d}.dcm", **({"ImagePositionPatient": [0, 0, z]} | fields))
            for n, z in enumerate(places)
        ]

    return write


@dataclasses.dataclass
class Running:
    """A build in a process of its own, which can be stopped in the middle."""

    process: subprocess.Popen
    output: Path

    def finished_shards(self) -> list[str]:
        return sorted(
            path.name.removesuffix(".json")
            for path in self.output.glob(".build/addition-*/shards/*.array_record-?????.json")
        )

    def wait_for_shards(self, count: int) -> list[str]:
        """Waits until so many shards are published."""
        end = time.monotonic() + 60
        while len(self.finished_shards()) < count:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        return self.finished_shards()

    def stop(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


# Loaded by every Python process of a build that has it on its path; makes single files hang, crash or take their time.
_TROUBLE = """
import os, time
settings = os.environ.get("TROUBLE")
if settings:
    import json
    from data_pipeline.sources import dicom_pixels
    trouble, read = json.loads(settings), dicom_pixels.open_image
    def open_image(path):
        what = trouble.get(os.path.basename(path), trouble.get("*"))
        if what == "crash": os.abort()
        if what == "hang": time.sleep(1000)
        if what == "bug": raise KeyError(open(path, "rb").read())
        if isinstance(what, float): time.sleep(what)
        return read(path)
    dicom_pixels.open_image = open_image
"""


@pytest.fixture
def exams(tmp_path: Path, write_series: Callable[..., list[Path]]) -> Path:
    """Twelve patients with a series of five slices each: four shards."""
    for patient in range(12):
        write_series(
            tmp_path / "exams" / f"p{patient}", 5, PatientID=f"P{patient}", SeriesInstanceUID=f"2.25.{patient + 1}00"
        )
    return tmp_path / "exams"


@pytest.fixture
def start_build(tmp_path: Path, key_file: Path) -> Any:
    """Starts a build; `trouble` maps file names, or * for all, to hang, crash, bug or seconds to wait."""
    running: list[Running] = []

    def start(*words: Any, trouble: dict[str, Any] | None = None) -> Running:
        place = tmp_path / "site"
        place.mkdir(exist_ok=True)
        (place / "sitecustomize.py").write_text(_TROUBLE)
        output = Path(words[words.index("--output") + 1])
        environment = os.environ | {"PYTHONPATH": f"{place}:{ROOT}", "TROUBLE": json.dumps(trouble or {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.build", *map(str, words), "--key-file", str(key_file)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(Running(process, output))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
        one.process.communicate()
