"""Identities in the inputs reach no output. No assertion here prints a header value."""

import collections
import gzip
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import SimpleITK
from array_record.python import array_record_module
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from curia_common.exit_codes import ExitCode
from data_pipeline.format import shards
from data_pipeline.sources import archives, dicom_pixels
from tests.data_pipeline.packing import pack, write_dicomdir

# Long enough for every representation of text, and short and plain enough for a defined term.
SECRETS = ("Xanthippe", "Quibbleton", "20190827", "Zyzzyva7")
TEXT = {"LO", "SH", "ST", "LT", "UT", "PN", "UC", "CS", "AE", "UR", "AS", "UI", "DA", "DT", "TM", "IS", "DS"}
# What a file needs to be taken at all.
NEEDED = {
    "SOPClassUID", "Modality", "ImageType", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelSpacing",
    "ImageOrientationPatient", "ImagePositionPatient", "NumberOfFrames", "BurnedInAnnotation", "LossyImageCompression",
}  # fmt: skip
SECRET_UID = "1.2.826.0.1.7777777.12345"


def plant(path: Path) -> Path:
    """Puts an identity into every text element of the dictionary, into private and nested ones too."""
    data = pydicom.dcmread(path)
    for number, (tag, entry) in enumerate(sorted(DicomDictionary.items())):
        representation, keyword, retired = entry[0], keyword_for_tag(tag), entry[3]
        if (
            representation not in TEXT
            or tag >> 16 in (0x0000, 0x0002, 0x0004, 0x7FE0)
            or keyword in NEEDED
            or retired
            or not keyword
        ):
            continue
        secret = {
            "UI": SECRET_UID,
            "DA": SECRETS[2],
            "DT": SECRETS[2],
            "TM": "101112",
            "IS": "20190827",
            "DS": "20190827",
            "AS": "093Y",
        }.get(representation, SECRETS[number % 2])
        if keyword == "SOPInstanceUID":
            secret += f".{int(path.stem)}"
        with np.errstate(all="ignore"):
            data.add_new(tag, representation, secret)
    data.add_new(0x00091010, "LO", SECRETS[3])
    data[0x00091010].value = SECRETS[3]
    nested = Dataset()
    nested.PatientName = nested.ImageComments = SECRETS[0]
    data.ReferencedPatientSequence = Sequence([nested])
    data.ProtocolName = data.BodyPartExamined = data.Manufacturer = SECRETS[1]
    data.preamble = SECRETS[0].encode().ljust(128, b" ")
    data.save_as(path)
    return path


def everything(folder: Path) -> bytes:
    """All bytes of a dataset, unpacked where they are packed, but for the manifest and the private plan."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name == shards.MANIFEST:
            continue
        parts.append(path.read_bytes())
        if "array_record" in path.name:
            reader = array_record_module.ArrayRecordReader(str(path), "")
            parts += [reader.read([n])[0] for n in range(reader.num_records())]
        if path.suffix == ".parquet":
            parts.append(json.dumps(pq.read_table(path).to_pydict(), default=str).encode())
            parts.append(str(pq.read_schema(path)).encode())
    return b"\n".join(parts)


def leaks(data: bytes, values: list[str]) -> int:
    """How many of the values are in the data, in any case; not which."""
    lower = data.lower()
    return sum(value.lower().encode() in lower for value in values)


WORDS = [*SECRETS, SECRET_UID, "7777777.12345"]


def test_identities_in_dicom_text_elements_reach_no_output(tmp_path: Path, write_series, run_build) -> None:
    folder = tmp_path / "exams" / SECRETS[0] / f"study of {SECRETS[1]}"  # as archives name their folders
    paths = [plant(path) for path in write_series(folder, 6, pixels=None)]
    planted = pydicom.dcmread(paths[0])
    assert sum(SECRETS[0] in str(element.value) or SECRETS[1] in str(element.value) for element in planted) > 300
    paths[1].write_bytes(paths[1].read_bytes()[:-700])  # a bad one, whose reason goes into the card
    (folder / f"{SECRETS[0]}.dcm").write_bytes(paths[0].read_bytes()[:3000])
    (folder / f"{SECRETS[1]}.txt").write_text(SECRETS[0])
    output = tmp_path / "out"
    result = run_build("--input", tmp_path / "exams", "--output", output, "--json", tmp_path / "card.json", processes=1)
    assert result.code == 0, "the build failed"
    assert result.err.count("\n") >= 4
    assert pq.read_table(output / "index.parquet").num_rows == 5
    assert leaks(everything(output), WORDS) == 0
    assert leaks((result.out + result.err).encode(), WORDS) == 0
    assert leaks((tmp_path / "card.json").read_bytes(), WORDS) == 0
    # The manifest has the paths and nothing more; the plan too, and both are the owner's alone.
    manifest = pq.read_table(output / shards.MANIFEST)
    assert leaks(json.dumps(manifest.drop_columns("path").to_pydict()).encode(), WORDS) == 0
    assert leaks(json.dumps(manifest.column("path").to_pylist()).encode(), WORDS) == 2
    addition = output / ".build" / "addition-00000"
    assert leaks((addition / "plan.json").read_bytes(), WORDS) == 0
    (lines,) = addition.glob("plan-*.jsonl")
    plan = [json.loads(line) for line in lines.read_text().splitlines()]
    for shard in plan:
        for series in shard["series"]:
            for file in series["files"]:
                file["path"] = ""
    assert leaks(json.dumps(plan).encode(), WORDS) == 0
    for private in (
        output / shards.MANIFEST,
        *(p for p in (output / ".build").rglob("*") if p.is_file() and p.name != "lock"),
    ):
        assert private.stat().st_mode & 0o077 == 0


def test_error_messages_quote_no_header_value_or_path(tmp_path: Path, write_series, run_build, monkeypatch) -> None:
    folder = tmp_path / "exams" / SECRETS[0]
    paths = [plant(path) for path in write_series(folder, 6)]
    words = ("--input", tmp_path / "exams", "--output", tmp_path / "out")
    read = dicom_pixels.open_image

    def change(path: str):
        os.utime(paths[-1], ns=(1, 1))
        return read(path)

    for function in (change, lambda path: 1 / 0, lambda path: (_ for _ in ()).throw(ValueError(SECRETS[0]))):
        with monkeypatch.context() as patch:
            patch.setattr(dicom_pixels, "open_image", function)
            result = run_build(*words)
        assert result.code == ExitCode.DATA
        assert leaks((result.out + result.err).encode(), WORDS) == 0
    for path in paths:
        path.write_bytes(path.read_bytes()[:-2000])
    result = run_build(*words)
    assert result.code == ExitCode.DATA and leaks((result.out + result.err).encode(), WORDS) == 0


@pytest.mark.parametrize("name", ["index", "shards"])
def test_public_tables_hold_no_path(dataset: Path, study: Path, name: str) -> None:
    text = json.dumps(pq.read_table(dataset / f"{name}.parquet").to_pydict())
    assert leaks(text.encode(), [str(study), "PHANTOM", ".dcm"]) == 0


def test_identities_in_other_formats_reach_no_output(tmp_path: Path, write_series, run_build) -> None:
    place = tmp_path / "exams" / SECRETS[0]
    place.mkdir(parents=True)
    series = [plant(path) for path in write_series(tmp_path / "series", 6, pixels=None)]
    members = {f"{SECRETS[0]}/{SECRETS[1]} {n}.dcm": path.read_bytes() for n, path in enumerate(series)}
    members[f"{SECRETS[1]}.dcm"] = members[next(iter(members))][:2000]
    pack(place / f"{SECRETS[0]}.zip", dict(list(members.items())[:3]))
    pack(place / f"{SECRETS[1]}.tar.gz", dict(list(members.items())[3:]))
    (place / f"cut {SECRETS[1]}.tar.gz").write_bytes((place / f"{SECRETS[1]}.tar.gz").read_bytes()[:900])
    (place / f"cut {SECRETS[0]}.zip").write_bytes((place / f"{SECRETS[0]}.zip").read_bytes()[:900])
    write_dicomdir(place / "DICOMDIR", [[SECRETS[0].upper(), SECRETS[1].upper()]])

    values = np.random.default_rng(0).integers(0, 900, (40, 42, 3)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([1, 1, 3, 1]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = SECRETS[0]
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", SECRETS[1].encode()))
    image.to_filename(place / f"{SECRETS[0]}.nii.gz")
    for ending, old, new in (
        ("nrrd", b"\n\n", f"\n# {SECRETS[0]}\nPatientName:={SECRETS[1]}\ncontent: {SECRETS[0]}\n\n".encode()),
        ("mha", b"NDims", f"Comment = {SECRETS[0]}\nPatientName = {SECRETS[1]}\nNDims".encode()),
    ):
        path = place / f"{SECRETS[1]}.{ending}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values.transpose(2, 0, 1) + len(ending)), str(path))
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40)).astype(np.uint8))
    text = PngInfo()
    text.add_text("Patient", SECRETS[0])
    text.add_itxt("Comment", SECRETS[1], zip=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x9C9B] = SECRETS[0], SECRETS[1], SECRETS[0].encode("utf-16le")
    picture.save(place / f"{SECRETS[0]}.png", pnginfo=text, exif=exif)
    picture.transpose(Image.Transpose.ROTATE_90).save(place / f"{SECRETS[0]}.jpg", exif=exif, comment=SECRETS[1])
    picture.transpose(Image.Transpose.ROTATE_180).save(
        place / f"{SECRETS[0]}.tif", description=SECRETS[1], artist=SECRETS[0]
    )
    sound = [path for path in place.iterdir() if path.suffix in (".gz", ".nrrd", ".mha", ".png", ".jpg", ".tif")]
    assert all(leaks(_raw(path), WORDS) for path in sound if not path.name.startswith("cut"))
    for path in sound:
        (place / f"broken {path.name}").write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    output = tmp_path / "out"
    result = run_build("--input", tmp_path / "exams", "--output", output, processes=1)
    assert result.code == 0, "the build failed"
    kept = collections.Counter(row["fate"] for row in pq.read_table(output / shards.MANIFEST).to_pylist())
    assert kept["kept"] >= 6 + 6 and kept["quarantined"] >= 8
    assert leaks(everything(output), WORDS) == 0
    assert leaks((result.out + result.err).encode(), WORDS) == 0
    manifest = pq.read_table(output / shards.MANIFEST)
    assert leaks(json.dumps(manifest.drop_columns("path").to_pydict()).encode(), WORDS) == 0
    assert not Path(archives.folder(output)).exists()  # copies of archives are gone with the build


def _raw(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def test_errors_of_archives_quote_no_member_name(tmp_path: Path, write_series, run_build) -> None:
    path = plant(write_series(tmp_path / "series", 1)[0])
    pack(tmp_path / "a.tar.gz", {f"{SECRETS[0]}/{SECRETS[1]}.dcm": path.read_bytes()})
    index = write_dicomdir(tmp_path / "DICOMDIR", [["..", SECRETS[0].upper()]])
    for code, *words in (
        (ExitCode.USAGE, "--input", tmp_path / "a.tar.gz", "--unpack-gb", 0),
        (ExitCode.DATA, "--input", index),
    ):
        result = run_build(*words, "--output", tmp_path / "out")
        assert result.code == code and leaks((result.out + result.err).encode(), WORDS) == 0
