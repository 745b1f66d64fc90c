"""Speed of the ingest beside its bounds, memory, the codec, and what 130 TB cost. Prints the tables of docs/ingest_scale.md.

  python -m benchmarks.ingest                           all of it, some minutes
  python -m benchmarks.ingest --only syntaxes codec     parts of it: syntaxes, stages, png, scaling, memory, codec

Rates count CPU seconds, not those of the clock, so that a machine shared with others gives the same ratios; each rate is
the median of several rounds in which all candidates take turns. Slices are 512 x 512 px of 16 bit.
"""

import argparse
import dataclasses
import functools
import gzip
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gdcm
import nibabel
import numpy as np
import pyarrow as pa
import pydicom
import SimpleITK
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] - an extension module
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.pixels.processing import apply_rescale
from pydicom.pixels.utils import pixel_array

from data_pipeline import workers
from data_pipeline.format import codec, shards
from data_pipeline.sources import dicom_pixels
from data_pipeline.sources.base import Heartbeat
from data_pipeline.sources.stored_values import stored_sha256, to_uint16
from data_pipeline.stages import assignment, convert, exclusion, inventory
from data_pipeline.stages.assignment import Conversion, PlannedShard
from data_pipeline.stages.statistics import slice_statistics

try:
    import imagecodecs  # pyright: ignore[reportMissingImports] - optional; OpenJPH encodes, pylibjpeg-openjpeg only decodes
except ImportError:
    imagecodecs = None

KEY = b"a key that everybody may know"
ONE_CT = "dicom/transfer_syntaxes/ct_hispeed_13ts"
CONTRAST = "labelled/ct_luad_contrast"
TABLES = ("syntaxes", "stages", "png", "scaling", "memory", "codec")
ROUNDS = 5
TOTAL_BYTES = 130e12
# n2d-standard-8 (8 vCPU of AMD EPYC, 32 GB), us-central1, on demand: $0.338 an hour. List price as remembered in November
# 2026, not looked up; give yours with --price.
PRICE = 0.338 / 8
HEAD = "dicom/ct_ge_head_tilt18"  # 16 slices, uncompressed
COPIES = 4  # of them
SYNTAXES = {
    "implicit VR": uid.ImplicitVRLittleEndian, "explicit VR": uid.ExplicitVRLittleEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian, "RLE": uid.RLELossless, "JPEG lossless .57": uid.JPEGLossless,
    "JPEG lossless .70": uid.JPEGLosslessSV1, "JPEG-LS": uid.JPEGLSLossless, "JPEG 2000": uid.JPEG2000Lossless,
    "HTJ2K": uid.HTJ2KLossless,
}  # fmt: skip


def rates(functions: dict[str, Callable[[], object]], slices: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Slices per CPU second of each, the median of rounds in which all of them take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    return {name: slices / statistics.median(values) for name, values in seconds.items()}


def copies(source: Path, folder: Path, count: int) -> list[Path]:
    """Copies of a file that differ in their UIDs, each a series of its own, because equal slices of one are dropped."""
    folder.mkdir(parents=True)
    image = pydicom.dcmread(source)
    paths = []
    for n in range(count):
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = uid.UID(f"2.25.1{n:05d}")
        image.SeriesInstanceUID = f"2.25.2{n:05d}"
        paths.append(folder / f"{n:04d}.dcm")
        image.save_as(paths[-1])
    return paths


def plain_series(source: Path, folder: Path) -> list[Path]:
    """The slices of a series as they are, and again shifted by some pixels, so that it is as long as they are in practice."""
    folder.mkdir(parents=True)
    paths = []
    for shift in range(COPIES):
        for number, path in enumerate(sorted(source.iterdir())):
            image = pydicom.dcmread(path)
            image.PixelData = np.roll(image.pixel_array, shift, axis=1).tobytes()
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = uid.UID(f"2.25.{shift + 1}{number:04d}")
            image.ImagePositionPatient = [0, 0, 1000 * shift + number]
            paths.append(folder / f"{len(paths):04d}.dcm")
            image.save_as(paths[-1])
    return paths


def encoded(sources: Sequence[Path], folder: Path, syntax: str) -> list[Path]:
    """The same slices in a transfer syntax without loss."""
    folder.mkdir(parents=True)
    paths = []
    for path in sources:
        image = pydicom.dcmread(path)
        paths.append(folder / path.name)
        if syntax in (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless):
            image.compress(syntax, generate_instance_uid=False)
        elif syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
            _with_gdcm(path, paths[-1], syntax)
            continue
        elif syntax == uid.HTJ2KLossless:
            assert imagecodecs is not None
            image.PixelData = encapsulate([imagecodecs.htj2k_encode(image.pixel_array)])
            image["PixelData"].is_undefined_length = True
        image.file_meta.TransferSyntaxUID = uid.UID(syntax)
        image.save_as(paths[-1], implicit_vr=syntax == uid.ImplicitVRLittleEndian, little_endian=True)
    return paths


def _with_gdcm(source: Path, target: Path, syntax: str) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to convert into a folder."""

    folder: str
    conversion: Conversion
    shard: PlannedShard


def task_of(paths: Sequence[Path], folder: Path, number: int = 0) -> Task:
    """The conversion of these files to one shard."""
    entries = inventory.inspect(([str(path) for path in paths], inventory.Options(KEY)), {}, lambda item: None)
    conversion = Conversion("x", slices_per_record=16)
    options = assignment.Options(KEY, 0.0, 0.0, 10**12, frozenset(), conversion)
    plan, _ = assignment.make(entries, options)
    series = tuple(one for shard in plan.shards for one in shard.series)
    folder.mkdir(parents=True, exist_ok=True)
    return Task(str(folder), conversion, PlannedShard("train", number, series))


def convert_task(task: Task, skip: Mapping[str, str], heartbeat: Heartbeat) -> convert.ShardReport:
    """The work of a worker process."""
    return convert.convert_shard(task.folder, task.conversion, task.shard, skip, heartbeat)[0]


def converter(paths: Sequence[Path], folder: Path) -> Callable[[], object]:
    one = task_of(paths, folder)

    def run() -> None:
        report = convert_task(one, {}, lambda item: None)
        assert report.slices == len(paths), report.files

    return run


def bound(paths: Sequence[Path]) -> Callable[[], object]:
    """The bare decoding and encoding of the same bytes, from memory; what the fallback decodes, from the file."""
    contents = [path.read_bytes() for path in paths]
    syntax = pydicom.dcmread(paths[0], stop_before_pixels=True).file_meta.TransferSyntaxUID
    plugin = dicom_pixels.PLUGINS.get(syntax, "")

    def run() -> None:
        for path, data in zip(paths, contents, strict=True):
            try:
                values = pixel_array(pydicom.dcmread(io.BytesIO(data)), raw=True, decoding_plugin=plugin)
            except Exception:  # noqa: BLE001 - as in the pipeline: the second decoder
                values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
            codec.encode(values.astype(np.uint16, copy=False))

    return run


# ---- tables


def syntaxes(data: Path, place: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    plain = plain_series(data / HEAD, place / "plain")
    print(
        "| Transfer syntax | Bytes a slice | Bound, slices/s | With the hash of the manifest | Pipeline, slices/s | "
        "Share of the bound | Share with the hash |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, syntax in SYNTAXES.items():
        if syntax == uid.HTJ2KLossless and imagecodecs is None:
            continue
        paths = encoded(plain, place / syntax, syntax)
        stored = dicom_pixels.read_stored(str(paths[0]))[0]
        bare = bound(paths)

        def hashed(bare: Callable[[], object] = bare, stored: np.ndarray = stored, count: int = len(paths)) -> None:
            bare()
            for _ in range(count):
                stored_sha256(stored)

        measured = rates({"bound": bare, "hashed": hashed, "pipeline": converter(paths, place / "out")}, len(paths))
        size = sum(path.stat().st_size for path in paths) // len(paths)
        found[name] = measured | {"bytes": size}
        print(
            f"| {name} | {size:,} | {measured['bound']:,.0f} | {measured['hashed']:,.0f} | {measured['pipeline']:,.0f} | "
            f"{measured['pipeline'] / measured['bound']:.0%} | {measured['pipeline'] / measured['hashed']:.0%} |",
            flush=True,
        )
    if imagecodecs is None:
        print("no row for HTJ2K: pip install imagecodecs, whose encoder makes the files", flush=True)
    return found


def stages(data: Path, place: Path) -> None:
    """Where the time of a slice goes: every stage alone, in a loop, beside the bound and the whole."""
    paths = encoded(plain_series(data / HEAD, place / "plain"), place / "explicit", uid.ExplicitVRLittleEndian)
    convert_all = converter(paths, place / "out")
    convert_all()
    shard = next(path for path in (place / "out").iterdir() if path.is_file())
    reader = array_record_module.ArrayRecordReader(str(shard), "")
    packed = [reader.read([n])[0] for n in range(reader.num_records())]
    stored = [dicom_pixels.read_stored(str(path))[0][0] for path in paths]
    with dicom_pixels.open_image(str(paths[0])) as image:
        spot = image.header.geometry[0]
    slices = [to_uint16(one, spot.slope, spot.intercept, hu=True) for one in stored]
    pixels = [one[0] for one in slices]
    counts = [np.bincount(one.ravel()) for one in pixels]

    def header() -> None:
        for path in paths:
            with dicom_pixels.open_image(str(path)):
                pass

    def pixels_too() -> None:
        for path in paths:
            dicom_pixels.read_stored(str(path))

    def statistics_and_rules() -> None:
        for (one, slope, intercept, _), count in zip(slices, counts, strict=True):
            found = np.flatnonzero(count)
            exclusion.exclude_pixels(one, found, count[found], (slope, intercept))
            slice_statistics(one, slope, intercept, count)

    parts: dict[str, Callable[[], object]] = {
        "file and header": header,
        "header and pixels": pixels_too,
        "SHA-256 of the manifest": lambda: [stored_sha256(one) for one in stored],
        "to 16-bit HU": lambda: [to_uint16(one, spot.slope, spot.intercept, hu=True) for one in stored],
        "histogram": lambda: [np.bincount(one.ravel()) for one in pixels],
        "rules, statistics, body box": statistics_and_rules,
        "encode": lambda: [codec.encode(one) for one in pixels],
        "write, read back, verify": lambda: shards.write(place / "stage", packed),
    }
    measured = rates({"bound": bound(paths), "whole": convert_all, **parts}, len(paths), 2 * ROUNDS)
    spent = {name: 1000 / rate for name, rate in measured.items()}
    spent["decode"] = spent.pop("header and pixels") - spent["file and header"]
    bare, whole = spent.pop("bound"), spent.pop("whole")
    print("| Stage, explicit VR | ms a slice |\n|---|---|")
    for name in sorted(spent, key=lambda name: -spent[name]):
        print(f"| {name} | {spent[name]:.2f} |")
    print(f"| the rest: spool, records, index, cold caches | {whole - sum(spent.values()):.2f} |")
    print(f"| whole | {whole:.2f} |\n| bound | {bare:.2f} |", flush=True)


def png(data: Path, place: Path) -> None:
    paths = sorted((data / CONTRAST).glob("*.dcm"))[:16]

    def script() -> None:
        for path in paths:
            image = pydicom.dcmread(path)
            hu = apply_rescale(image.pixel_array, image)
            pixels = np.clip(hu + 1024, 0, 65535).astype(np.uint16)
            Image.fromarray(pixels).save(place / "slice.png")

    measured = rates({"script": script, "pipeline": converter(paths, place / "png")}, len(paths), 3)
    print(f"pydicom to 16-bit PNG: {measured['script']:,.0f} slices/s; the pipeline: {measured['pipeline']:,.0f}, "
          f"{measured['pipeline'] / measured['script']:.1f} x", flush=True)  # fmt: skip


def scaling(data: Path, place: Path) -> None:
    source = next(path for path in sorted((data / ONE_CT).iterdir()) if "LittleEndianExplicit" in path.name)
    paths = copies(source, place / "scaling", 240)
    tasks = [task_of(paths[n::12], place / "scaled", n) for n in range(12)]
    clock: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for count in (1, 2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            # From the first file on: starting a process takes seconds, whatever there is to do.
            running = workers.run(convert_task, tasks, workers=count, timeout=600.0)
            next(running)
            began = time.perf_counter()
            list(running)
            clock[count].append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[count].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    one, two = (statistics.median(clock[count]) for count in (1, 2))
    start = cpu_of_a_start()
    share = (statistics.median(cpu[1]) - start) / (statistics.median(cpu[2]) - 2 * start)
    print(f"2 workers: {one / two:.2f} x one by the clock ({240 / one:,.0f} and {240 / two:,.0f} slices/s, of a machine that others use too); "
          f"{2 * share:.2f} x by CPU seconds per slice, which is what two free cores give", flush=True)  # fmt: skip


def cpu_of_a_start() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    list(workers.run(inventory.inspect, [([], inventory.Options(KEY))], workers=1, timeout=600.0))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


LONG = {
    "files": "a file a slice", "frames": "one file of many frames, uncompressed", "frames-packed": "one file of many frames, JPEG-LS",
    "nifti": "one .nii, slices as they are stored", "nifti-gz": "one .nii.gz, slices as they are stored",
    "nifti-across": "one .nii.gz, slices across the fastest axis", "nrrd-gz": "one .nrrd, deflated",
}  # fmt: skip


def memory(data: Path, counts: Sequence[int]) -> None:
    print("| Slices of 512 x 512 px | As | Most memory of the worker, MB |\n|---|---|---|")
    for kind, what in LONG.items():
        for count in counts:
            found = long_series(data, kind, count)
            print(f"| {found['slices']:,} | {what} | {found['mb']:,.0f} |", flush=True)


def long_series(data: Path, kind: str, count: int) -> dict[str, Any]:
    """Converts one long series in a worker: how many slices came out, and the most memory that the worker had, MB.

    In a process of its own, because the system counts the memory of children together.
    """
    words = [sys.executable, "-m", "benchmarks.ingest", "--one-series", kind, "--long", str(count), "--data", str(data)]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def one_series(data: Path, kind: str, count: int) -> None:
    source = next(path for path in sorted((data / ONE_CT).iterdir()) if "LittleEndianExplicit" in path.name)
    image = pydicom.dcmread(source)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "in")
        folder.mkdir()
        _WRITERS[kind](image, count, folder)
        one = task_of(sorted(folder.iterdir()), Path(place, "out"))
        (report,) = (
            message.result
            for message in workers.run(convert_task, [one], workers=1, timeout=600.0)
            if isinstance(message, workers.Done)
        )
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"slices": report.slices, "mb": most}))


def _changing(pixels: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Slices that differ from each other, because equal slices of a series are dropped."""
    for n in range(count):
        pixels[0, 0], pixels[0, 1] = n % 1000, n // 1000
        yield pixels


def _files(image: pydicom.FileDataset, count: int, folder: Path) -> None:
    for n, pixels in enumerate(_changing(image.pixel_array.copy(), count)):
        image.PixelData, image.ImagePositionPatient = pixels.tobytes(), [0, 0, n]
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = uid.UID(f"2.25.{n + 1}")
        image.save_as(folder / f"{n:05d}.dcm")


def _frames(image: pydicom.FileDataset, count: int, folder: Path, *, packed: bool = False) -> None:
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    items = []
    for n in range(count):
        item, spot = pydicom.Dataset(), pydicom.Dataset()
        spot.ImagePositionPatient = [0, 0, n]
        item.PlanePositionSequence = pydicom.Sequence([spot])
        items.append(item)
    pixels = image.pixel_array.copy()
    image.PerFrameFunctionalGroupsSequence, image.NumberOfFrames = pydicom.Sequence(items), count
    del image.PixelData
    if packed:
        image.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    image.save_as(folder / "a.dcm", implicit_vr=False, little_endian=True)
    with (folder / "a.dcm").open("ab") as file:
        # Piece by piece: files of this size are not made in memory.
        tag = b"\xe0\x7f\x10\x00O%b\0\0" % (b"B" if packed else b"W")
        file.write(tag + (b"\xff\xff\xff\xff" if packed else (pixels.nbytes * count).to_bytes(4, "little")))
        if packed:
            file.write(b"\xfe\xff\x00\xe0" + bytes(4))  # an offset table without entries
        for one in _changing(pixels, count):
            data = one.tobytes()
            if packed:
                data = get_encoder(uid.JPEGLSLossless).encode(one, encoding_plugin="pyjpegls", **_SHAPE)
                file.write(b"\xfe\xff\x00\xe0" + len(data).to_bytes(4, "little"))
            file.write(data)
        if packed:
            file.write(b"\xfe\xff\xdd\xe0" + bytes(4))


_SHAPE: dict[str, Any] = {
    "rows": 512, "columns": 512, "samples_per_pixel": 1, "bits_allocated": 16, "bits_stored": 16, "pixel_representation": 1,
    "photometric_interpretation": "MONOCHROME2", "number_of_frames": 1,
}  # fmt: skip


def _nifti(image: pydicom.FileDataset, count: int, folder: Path, *, packed: bool = False, across: bool = False) -> None:
    pixels = image.pixel_array.copy()
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((count, *pixels.shape) if across else (*pixels.shape, count))
    spacing = [2.0, 1.0, 1.0] if across else [1.0, 1.0, 2.0]
    header.set_sform(np.diag([*spacing, 1.0]), code=1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = folder / ("a.nii.gz" if packed else "a.nii")
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        if not across:
            for one in _changing(pixels, count):
                file.write(one.astype("<i2").tobytes())
            return
        # The slices side by side, a row of each, each slice shifted: equal neighbours would make it a label map.
        shifted = (np.arange(pixels.shape[1])[:, None] - np.arange(count)) % pixels.shape[1]
        for n, line in enumerate(pixels):
            rows = line[shifted].astype("<i2")
            if n == 0:
                rows[0], rows[1] = np.arange(count) % 1000, np.arange(count) // 1000
            file.write(rows.tobytes())


def _nrrd(image: pydicom.FileDataset, count: int, folder: Path) -> None:
    pixels = image.pixel_array.copy()
    with (folder / "a.nrrd").open("wb") as file:
        file.write(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 512 512 %d\nendian: little\nencoding: gzip\n" % count)
        file.write(
            b"space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\n\n"
        )
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
            for one in _changing(pixels, count):
                packed.write(one.astype("<i2").tobytes())


_WRITERS: dict[str, Callable[[pydicom.FileDataset, int, Path], None]] = {
    "files": _files, "frames": _frames, "frames-packed": functools.partial(_frames, packed=True), "nifti": _nifti,
    "nifti-gz": functools.partial(_nifti, packed=True),
    "nifti-across": functools.partial(_nifti, packed=True, across=True), "nrrd-gz": _nrrd,
}  # fmt: skip


def codecs(data: Path) -> float:
    """Prints ratio and rates; returns bytes a slice of the default."""
    slices = []
    for path in sorted((data / CONTRAST).glob("*.dcm"))[:24]:
        image = pydicom.dcmread(path)
        slices.append(np.clip(apply_rescale(image.pixel_array, image) + 1024, 0, 65535).astype(np.uint16))
    raw = sum(one.nbytes for one in slices)

    def to_png(one: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        return file.getvalue()

    kinds: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
        f"{codec.NAMES[codec.DELTA]} (default)": (codec.encode, codec.decode),
        "raw": (lambda one: codec.encode(one, codec.RAW), codec.decode),
        "zstd-3": (lambda one: pa.Codec("zstd", 3).compress(one.tobytes(), asbytes=True),
                   lambda data: np.frombuffer(pa.Codec("zstd").decompress(data, 512 * 512 * 2, asbytes=True), np.uint16)),
        "PNG, 16 bit (Pillow)": (to_png, lambda data: np.asarray(Image.open(io.BytesIO(data)))),
    }  # fmt: skip
    slices = [one for one in slices if one.shape == (512, 512)]
    raw = sum(one.nbytes for one in slices)
    packed = {name: [encode(one) for one in slices] for name, (encode, _) in kinds.items()}
    reading = rates({name: (lambda n=name: [kinds[n][1](d) for d in packed[n]]) for name in kinds}, len(slices), 3)
    writing = rates({name: (lambda n=name: [kinds[n][0](s) for s in slices]) for name in kinds}, len(slices), 1)
    print("| Codec | Ratio | Decode, slices/s | Encode, slices/s |\n|---|---|---|---|")
    for name in kinds:
        ratio = raw / sum(map(len, packed[name]))
        print(f"| {name} | {ratio:.2f} | {reading[name]:,.0f} | {writing[name]:,.0f} |", flush=True)
    return sum(map(len, next(iter(packed.values())))) / len(slices)


def cost(measured: dict[str, dict[str, float]], out_bytes: float, price: float) -> None:
    print(f"\n130 TB at ${price:.4f} per vCPU-hour:\n")
    print(
        "| All of it in | Slices, M | vCPU-hours | Hours on 1,000 vCPU | Compute | Shards, TB |\n|---|---|---|---|---|---|"
    )
    for name, one in measured.items():
        slices = TOTAL_BYTES / one["bytes"]
        hours = slices / one["pipeline"] / 3600
        print(f"| {name} | {slices / 1e6:,.0f} | {hours:,.0f} | {hours / 1000:.1f} | ${hours * price:,.0f} | {slices * out_bytes / 1e12:,.0f} |")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="+", choices=TABLES, help="default: all")
    parser.add_argument("--long", type=int, nargs="+", default=[300, 3000], help="slices of the series for memory")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars per vCPU-hour")
    parser.add_argument("--one-series", choices=LONG, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_series:
        one_series(args.data, args.one_series, args.long[0])
        return 0
    if not (args.data / ONE_CT).is_dir():
        print(f"error: no {args.data / ONE_CT}; name the real data with --data", file=sys.stderr)
        return 2
    wanted = args.only or TABLES
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        measured = syntaxes(args.data, place) if "syntaxes" in wanted else {}
        if "stages" in wanted:
            stages(args.data, place / "stages")
        if "png" in wanted:
            png(args.data, place)
        if "scaling" in wanted:
            scaling(args.data, place)
        if "memory" in wanted:
            memory(args.data, args.long)
        if "codec" in wanted:
            out_bytes = codecs(args.data)
            if measured:
                cost(measured, out_bytes, args.price)
    return 0


if __name__ == "__main__":
    sys.exit(main())
