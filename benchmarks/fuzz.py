"""Builds a dataset from thousands of damaged and malicious files, and checks the outcome of each.

  python -m benchmarks.fuzz                                         10,000 files; `make fuzz`
  python -m benchmarks.fuzz --files 500 --seed 7 --keep /tmp/fuzz   another 500, kept for inspection

Every file is a small sound one (each DICOM transfer syntax that has an encoder here or a file in the real data; NIfTI, NRRD,
MetaImage, PNG, JPEG, TIFF, zip, tar) changed by one of the mutations below. File n of a seed is always the same. The build
must end with exit code 0, give every file a fate, take at most 10 s per file and keep its workers within their memory limit.
Decoders in C may crash on some: the worker is replaced and the file quarantined; the number of crashes is printed. Exits with
1 if one of these requirements is violated.
"""

import argparse
import bz2
import collections
import dataclasses
import gzip
import io
import os
import random
import re
import resource
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import SimpleITK
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate

from benchmarks.mutations import ANYWHERE, NUMBERS, Mutation, flip, number, number_text
from data_pipeline import build

SECONDS_PER_FILE = 10.0
MEMORY_GB = 2.0
# Replaced by a number per file, so that no two files count as copies of one instance.
INSTANCE, SERIES = uid.UID("2.25.7700000000000001"), uid.UID("2.25.7800000000000001")


class Sound(NamedTuple):
    """A sound file: ending of its name, and its bytes."""

    ending: str
    data: bytes


# ---- sound files


def seeds(folder: Path | None) -> dict[str, Sound]:
    """Sound files by name; `folder` is that of the real data, for transfer syntaxes that nothing here encodes."""
    noise = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(40), np.arange(48)) * 20
    pixels = (smooth + noise.integers(0, 60, smooth.shape)).astype(np.uint16)
    found: dict[str, Sound] = {}
    for name, syntax in (
        ("implicit", uid.ImplicitVRLittleEndian), ("explicit", uid.ExplicitVRLittleEndian), ("big", uid.ExplicitVRBigEndian),
        ("deflated", uid.DeflatedExplicitVRLittleEndian),
    ):  # fmt: skip
        found[f"dicom_{name}"] = Sound(".dcm", _dicom(pixels, syntax))
    for name, syntax in (
        ("rle", uid.RLELossless), ("jpegls", uid.JPEGLSLossless), ("jpegls_near", uid.JPEGLSNearLossless),
        ("j2k", uid.JPEG2000Lossless), ("j2k_lossy", uid.JPEG2000),
    ):  # fmt: skip
        found[f"dicom_{name}"] = Sound(".dcm", _compressed(pixels, syntax))
    jpeg = io.BytesIO()
    Image.fromarray((pixels >> 4).astype(np.uint8)).save(jpeg, "JPEG")
    found["dicom_jpeg"] = Sound(".dcm", _dicom((pixels >> 4).astype(np.uint8), uid.JPEGBaseline8Bit, jpeg.getvalue()))
    found["dicom_enhanced"] = Sound(".dcm", _enhanced(pixels))
    if folder is not None:
        found |= _real(folder)
    volume = noise.integers(0, 900, (40, 36, 4)).astype(np.int16)
    with tempfile.TemporaryDirectory() as place:
        for ending in (".nii", ".nii.gz"):
            image = nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0]))
            image.to_filename(f"{place}/a{ending}")
            found[f"nifti{ending}"] = Sound(ending, Path(f"{place}/a{ending}").read_bytes())
        for ending in (".nrrd", ".mha"):
            for packed in (False, True):
                SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), f"{place}/a{ending}", packed)
                found[f"{ending[1:]}_{'gz' if packed else 'raw'}"] = Sound(
                    ending, Path(f"{place}/a{ending}").read_bytes()
                )
    for ending, kind, values in (
        (".png", "PNG", pixels), (".png", "PNG", (pixels >> 4).astype(np.uint8)), (".jpg", "JPEG", (pixels >> 4).astype(np.uint8)),
        (".tif", "TIFF", pixels),
    ):  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        found[f"{kind.lower()}{values.dtype.itemsize * 8}"] = Sound(ending, file.getvalue())
    members = {"a/1.dcm": found["dicom_explicit"][1], "a/2.png": found["png8"][1], "b.nii.gz": found["nifti.nii.gz"][1]}
    for ending in (".zip", ".tar", ".tar.gz", ".tar.zst", ".tar.bz2"):
        found[f"archive{ending}"] = Sound(ending, archive(ending, members))
    return found


def _dicom(pixels: np.ndarray, syntax: uid.UID, frame: bytes | None = None) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.CTImageStorage, INSTANCE
    meta.TransferSyntaxUID = syntax
    big = syntax == uid.ExplicitVRBigEndian
    data = FileDataset(
        "", {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=syntax == uid.ImplicitVRLittleEndian, is_little_endian=not big
    )  # fmt: skip
    bits = pixels.dtype.itemsize * 8
    fields = {
        "SOPClassUID": uid.CTImageStorage, "SOPInstanceUID": INSTANCE, "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": SERIES,
        "PatientID": "P1", "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Manufacturer": "Siemens",
        "PixelSpacing": [0.5, 0.75], "SliceThickness": 2, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, 0], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024,
    }  # fmt: skip
    for name, value in fields.items():
        setattr(data, name, value)
    data.PixelData = (
        encapsulate([frame]) if frame else pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    )
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _compressed(pixels: np.ndarray, syntax: uid.UID) -> bytes:
    data = pydicom.dcmread(io.BytesIO(_dicom(pixels, uid.ExplicitVRLittleEndian)))
    if syntax == uid.JPEG2000:
        data.compress(syntax, generate_instance_uid=False, j2k_cr=[4])
    elif syntax == uid.JPEGLSNearLossless:
        data.compress(syntax, generate_instance_uid=False, jls_error=2)
    else:
        data.compress(syntax, generate_instance_uid=False)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _enhanced(pixels: np.ndarray) -> bytes:
    data = pydicom.dcmread(io.BytesIO(_dicom(np.stack([pixels, pixels + 1, pixels + 2]), uid.ExplicitVRLittleEndian)))
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    data.NumberOfFrames = 3
    frames = []
    for n in range(3):
        item, place = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [0, 0, 2 * n]
        item.PlanePositionSequence = pydicom.Sequence([place])
        frames.append(item)
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _real(folder: Path) -> dict[str, Sound]:
    """One small grey file of each transfer syntax that the real data has."""
    found: dict[str, Sound] = {}
    for path in sorted((folder / "dicom").rglob("*"), key=lambda path: (path.stat().st_size, str(path))):
        if not path.is_file() or path.stat().st_size > 400_000:
            continue
        with warnings.catch_warnings(action="ignore"):
            try:
                data = pydicom.dcmread(path, stop_before_pixels=True)
                syntax = str(data.file_meta.TransferSyntaxUID)
                grey = data.get("SamplesPerPixel") == 1 and data.get("Modality") in ("CT", "MR")
            except Exception:  # noqa: BLE001, S112 - some are broken on purpose
                continue
        name = f"real_{syntax.removeprefix('1.2.840.10008.1.2').strip('.') or 'implicit'}"
        if grey and name not in found:
            whole = path.read_bytes()
            for old, new in ((data.get("SOPInstanceUID"), INSTANCE), (data.get("SeriesInstanceUID"), SERIES)):
                if old and len(old) >= len(new):
                    whole = whole.replace(old.encode(), (new + "1" * (len(old) - len(new))).encode())
            found[name] = Sound(".dcm", whole)
    return found


def archive(ending: str, members: dict[str, bytes]) -> bytes:
    """An archive of the members, by its ending."""
    file = io.BytesIO()
    if ending == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in members.items():
                packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # its date is always the same
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as packed:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return compress(ending, file.getvalue())


def compress(ending: str, data: bytes) -> bytes:
    if ending == ".tar.zst":
        return pa.compress(data, "zstd", asbytes=True)
    return {".tar.gz": lambda d: gzip.compress(d, mtime=0), ".tar.bz2": bz2.compress}.get(ending, bytes)(data)


# ---- mutations of one kind of file; mutations.py has those of any


ELEMENTS = {
    "Rows": 0x0010, "Columns": 0x0011, "BitsAllocated": 0x0100, "BitsStored": 0x0101, "HighBit": 0x0102, "PixelRepresentation": 0x0103,
    "SamplesPerPixel": 0x0002, "PlanarConfiguration": 0x0006,
}  # fmt: skip


def element(data: bytes, rng: random.Random) -> bytes:
    """A DICOM image element gets an absurd value, or an element an absurd length."""
    out = bytearray(data)
    big = b"\x00\x28\x00\x10US" in data
    order = ">" if big else "<"
    mark = struct.pack(f"{order}HH", 0x0028, rng.choice(list(ELEMENTS.values())))
    at = data.find(mark)
    if at < 0:
        return number(data, rng)
    if rng.random() < 0.8:
        struct.pack_into(f"{order}H", out, at + 8, rng.choice((0, 1, 2, 7, 8, 12, 16, 32, 64, 32767, 65535)))
    else:
        struct.pack_into(f"{order}H", out, at + 6, rng.choice((0, 1, 3, 65535)))
    return bytes(out)


def frames(data: bytes, rng: random.Random) -> bytes:
    """A DICOM header that states many frames."""
    text = rng.choice((b"0 ", b"-1", b"2 ", b"99", b"65536 ", b"99999999", b"1e5 ", b"NaN "))
    mark = b"\x28\x00\x10\x00"
    at = data.find(mark + b"US")
    field = b"\x28\x00\x08\x00IS" + struct.pack("<H", len(text)) + text
    return data[:at] + field + data[at:] if at > 0 else number(data, rng)


def external_data(data: bytes, rng: random.Random) -> bytes:
    """A header that names data files outside its folder, as MetaImage and NRRD can."""
    target = rng.choice(
        (b"/etc/passwd", b"../../../../etc/passwd", b"LIST", b"%03d.raw 1 9 1", b"/dev/zero", b"/dev/stdin", b".")
    )
    if data.startswith(b"NRRD"):
        return data.replace(b"\n\n", b"\ndata file: " + target + b"\n\n", 1)
    return re.sub(rb"ElementDataFile = LOCAL", lambda _: b"ElementDataFile = " + target, data)


def oversize(data: bytes, rng: random.Random) -> bytes:
    """Absurd dimensions in the headers of NIfTI (also packed) and PNG."""
    if data[:2] == b"\x1f\x8b":
        with_size = oversize(gzip.decompress(data), rng)
        return gzip.compress(with_size, mtime=0)
    out = bytearray(data)
    if data.startswith(b"\x89PNG"):
        struct.pack_into(">II", out, 16, rng.choice(NUMBERS), rng.choice(NUMBERS))
        struct.pack_into(">I", out, 29, zlib.crc32(out[12:29]))
        return bytes(out)
    for axis in range(rng.choice((1, 3, 7))):
        struct.pack_into("<h", out, 42 + 2 * axis, rng.choice((-1, 0, 1, 4096, 32767)))
    struct.pack_into("<h", out, 40, rng.choice((-1, 0, 1, 3, 4, 7, 8, 32767)))
    struct.pack_into(
        "<hh", out, 70, rng.choice((0, 1, 2, 4, 16, 64, 128, 1792, 2304)), rng.choice((0, 8, 16, 64, 32767))
    )
    return bytes(out)


def bomb(data: bytes, rng: random.Random) -> bytes:
    """Very many zeros in whatever is compressed."""
    size = rng.choice((1 << 20, 1 << 20, 1 << 24, 1 << 24, 1 << 27))
    if data[:2] == b"\x1f\x8b":
        return compress(".tar.gz", gzip.decompress(data)[:352] + bytes(size))
    if data[:4] == b"PK\3\4":
        return archive(".zip", {"bomb.nii": bytes(size), "bomb.dcm": bytes(size)})
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return compress(".tar.zst", archive(".tar", {"bomb.dcm": bytes(size)}))
    mark = uid.DeflatedExplicitVRLittleEndian.encode()
    if mark in data:
        end = data.index(mark) + len(mark) + len(mark) % 2
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return data[:end] + deflate.compress(bytes(size)) + deflate.flush()
    return data + bytes(min(size, 1 << 20))


NAMES = (
    "../../../../tmp/fuzz",
    "/etc/cron.d/fuzz",
    "a\\..\\..\\b",
    "x" * 5000,
    "",
    ".",
    "..",
    "a\nb",
    "C:\\x",
    "a/" * 400 + "b",
    "\x1b[31m",
)


def names(data: bytes, rng: random.Random) -> bytes:
    """An archive whose members have names outside it or twice, or are links, devices or archives."""
    ending = ".zip" if data[:2] == b"PK" else ".tar"
    file = io.BytesIO()
    inner = {rng.choice(NAMES): b"x" * 500, "in.zip": data[:200], "1.dcm": data[:700]}
    if ending == ".zip":
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as packed:
            for name, content in (*inner.items(), ("1.dcm", b"again")):
                info = zipfile.ZipInfo(name or "x")
                info.external_attr = rng.choice((0, 0o120777, 0o100644, 0o060666)) << 16
                packed.writestr(info, content)
        return flip(file.getvalue(), rng) if rng.random() < 0.3 else file.getvalue()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice((0, 1, 2))) as packed:
        for name, content in (*inner.items(), ("1.dcm", b"again")):
            info = tarfile.TarInfo(name if len(name) < 90 else name[:90])
            info.type, info.size, info.linkname = (
                rng.choice(b"01234567SLKxg").to_bytes(1, "little"),
                len(content),
                "/etc/passwd",
            )
            packed.addfile(info, io.BytesIO(content))
    plain = file.getvalue()
    kinds = {b"\x1f\x8b": ".tar.gz", b"\x28\xb5": ".tar.zst", b"BZ": ".tar.bz2"}
    return compress(kinds.get(data[:2], ".tar"), plain)


SPECIAL: dict[str, tuple[Mutation, ...]] = {
    ".dcm": (element, element, frames, number_text, bomb), ".nii": (oversize,), ".nii.gz": (oversize, bomb), ".png": (oversize,),
    ".nrrd": (number_text, external_data), ".mha": (number_text, external_data), ".jpg": (), ".tif": (), ".zip": (names, names, bomb),
    ".tar": (names, names), ".tar.gz": (names, bomb), ".tar.zst": (names, bomb), ".tar.bz2": (names,),
}  # fmt: skip


def write_files(folder: Path, count: int, seed: int, sound: Mapping[str, Sound]) -> None:
    """Writes files 0 … count - 1 of a seed; each name has the sound file and the mutation."""
    kinds = sorted(sound)
    for n in range(count):
        rng = random.Random(f"{seed}/{n}")
        kind = kinds[n % len(kinds)]
        ending, data = sound[kind]
        mutate = rng.choice((*ANYWHERE, *SPECIAL[ending]))
        for old in (INSTANCE, SERIES):
            data = data.replace(old.encode(), (old[: -len(str(n))] + str(n)).encode())
        for _ in range(rng.choice((1, 1, 1, 2))):
            data = mutate(data, rng) or b"x"
        place = folder / f"{n // 1000:03d}"
        place.mkdir(exist_ok=True)
        (place / f"{n:06d}_{kind.replace('.', '_')}_{mutate.__name__}{ending}").write_bytes(data)


# ---- the build, and its outcome


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of all files.

    Attributes:
      code: exit code of the build.
      fates, reasons: number of files by each; digits in reasons are replaced.
      crashed, slow, without_fate: paths.
      faults: path and reason of each exception that no reader expects.
      rss_mb: peak memory of a worker, MB.
    """

    code: int
    fates: collections.Counter[str]
    reasons: collections.Counter[str]
    crashed: list[str]
    slow: list[str]
    faults: list[str]
    without_fate: list[str]
    rss_mb: float


def run(folder: Path, output: Path, workers: int, memory_gb: float = MEMORY_GB, retry_slow: bool = True) -> Outcome:
    """Builds the folder and reads the manifest."""
    code = build.main([
        "--input", str(folder), "--output", str(output), "--workers", str(workers), "--timeout", str(SECONDS_PER_FILE),
        "--memory-gb", str(memory_gb), "--unpack-gb", "50", "--examples", "0",
        "--shard-mb", "1",  # a worker that is lost starts its shard again
    ])  # fmt: skip
    rows = pq.read_table(output / "manifest.parquet", columns=["path", "fate", "reason"]).to_pylist()
    seen = {row["path"].split("!/")[0] for row in rows}
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    slow = [row["path"] for row in rows if "took more than" in row["reason"]]
    if retry_slow and slow:  # the machine may have been busy: each once more, on its own
        place = output.with_name(f"{output.name}_slow")
        (place / "files").mkdir(parents=True)
        for path in {path.split("!/")[0] for path in slow}:
            (place / "files" / os.path.basename(path)).write_bytes(Path(path).read_bytes())
        slow = run(place / "files", place / "dataset", 1, memory_gb, retry_slow=False).slow
    return Outcome(
        code=code,
        fates=collections.Counter(row["fate"] for row in rows),
        reasons=collections.Counter(re.sub(r"[\d,]{2,}|\d", "N", row["reason"]) for row in rows),
        crashed=[row["path"] for row in rows if "crashed" in row["reason"]],
        slow=slow,
        faults=[f"{row['path']}: {row['reason']}" for row in rows if "reader failed on it" in row["reason"]],
        without_fate=[path for path in files if path not in seen] + [row["path"] for row in rows if not row["fate"]],
        rss_mb=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    )


def violations(found: Outcome, memory_gb: float = MEMORY_GB) -> list[str]:
    """Requirements that the build did not meet."""
    problems = [] if found.code == 0 else [f"the build ended with exit code {found.code}"]
    problems += [f"more than {SECONDS_PER_FILE:g} s: {path}" for path in found.slow]
    problems += [f"no fate: {path}" for path in found.without_fate]
    problems += [f"an exception that no reader expects: {text}" for text in found.faults]
    if found.rss_mb > memory_gb * 1000:
        problems.append(f"a worker took {found.rss_mb:,.0f} MB; the limit is {memory_gb * 1000:,.0f}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="real data, for more transfer syntaxes"
    )
    parser.add_argument("--keep", type=Path, help="folder for files and dataset, kept; else a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        top = args.keep or Path(place)
        (top / "files").mkdir(parents=True)
        sound = seeds(args.data if args.data.is_dir() else None)
        write_files(top / "files", args.files, args.seed, sound)
        began = time.monotonic()
        found = run(top / "files", top / "dataset", args.workers)
        seconds = time.monotonic() - began
    print(f"{args.files:,} files of {len(sound)} kinds in {seconds:,.0f} s: {dict(found.fates)}")
    print(f"crashes of decoders, each contained: {len(found.crashed)}; peak of a worker: {found.rss_mb:,.0f} MB")
    for path in found.crashed:
        print(f"  {os.path.basename(path)}")
    for reason, count in found.reasons.most_common():
        print(f"  {count:6,}  {reason}")
    problems = violations(found)
    for text in problems:
        print(f"VIOLATED: {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
