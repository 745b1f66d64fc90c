"""What must not leave the inputs does not. No assertion here prints a value of a header."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from array_record.python import array_record_module
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from data_pipeline import build, shards

# Long enough for every representation of text, and short and plain enough for a defined term.
SECRETS = ("Xanthippe", "Quibbleton", "20190827", "Zyzzyva7")
TEXT = {"LO", "SH", "ST", "LT", "UT", "PN", "UC", "CS", "AE", "UR", "AS", "UI", "DA", "DT", "TM", "IS", "DS"}
# What a file needs to be taken at all.
NEEDED = {
    "SOPClassUID", "Modality", "ImageType", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "PixelSpacing",
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


def test_identities_planted_in_every_text_element_go_nowhere(tmp_path: Path, write_series, run_build) -> None:
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
    plan = json.loads((output / ".build" / "plan.json").read_text())
    for shard in plan["shards"]:
        for series in shard["series"]:
            for file in series["files"]:
                file["path"] = ""
    assert leaks(json.dumps(plan).encode(), WORDS) == 0
    for private in (
        output / shards.MANIFEST,
        *(p for p in (output / ".build").rglob("*") if p.is_file() and p.name != "lock"),
    ):
        assert private.stat().st_mode & 0o077 == 0


def test_error_messages_quote_no_header_and_no_path(tmp_path: Path, write_series, run_build, monkeypatch) -> None:
    folder = tmp_path / "exams" / SECRETS[0]
    paths = [plant(path) for path in write_series(folder, 6)]
    words = ("--input", tmp_path / "exams", "--output", tmp_path / "out")
    read = build.convert.dicom.read_stored

    def change(path: str):
        os.utime(paths[-1], ns=(1, 1))
        return read(path)

    for function in (change, lambda path: 1 / 0, lambda path: (_ for _ in ()).throw(ValueError(SECRETS[0]))):
        with monkeypatch.context() as patch:
            patch.setattr(build.convert.dicom, "read_stored", function)
            result = run_build(*words)
        assert result.code == 2
        assert leaks((result.out + result.err).encode(), WORDS) == 0
    for path in paths:
        path.write_bytes(path.read_bytes()[:-2000])
    result = run_build(*words)
    assert result.code == 2 and leaks((result.out + result.err).encode(), WORDS) == 0


@pytest.mark.parametrize("name", ["index", "shards"])
def test_tables_hold_no_path(dataset: Path, study: Path, name: str) -> None:
    text = json.dumps(pq.read_table(dataset / f"{name}.parquet").to_pydict())
    assert leaks(text.encode(), [str(study), "PHANTOM", ".dcm"]) == 0
