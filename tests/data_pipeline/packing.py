"""Archives and DICOMDIRs for the tests."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of the kind that its name says; names are taken as they are."""
    name = path.name
    if name.endswith(".zip"):
        method = zipfile.ZIP_STORED if "stored" in name else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as file:
            for member, data in files.items():
                file.writestr(member, data)
        return path
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as file:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return compress(path, plain.getvalue())


def compress(path: Path, plain: bytes) -> Path:
    kind = path.name.rsplit(".", 1)[1]
    if kind == "tar":
        path.write_bytes(plain)
    elif kind == "zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(plain)
    else:
        opener = {"gz": gzip, "tgz": gzip, "bz2": bz2, "xz": lzma}[kind]
        path.write_bytes(opener.compress(plain))
    return path


def write_dicomdir(path: Path, names: list[list[str]]) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    records = []
    for kind, name in [("PATIENT", None), *(("IMAGE", name) for name in names)]:
        record = Dataset()
        record.DirectoryRecordType = kind
        if name:
            record.ReferencedFileID = name
        records.append(record)
    data.FileSetID, data.DirectoryRecordSequence = "CD", Sequence(records)
    data.save_as(path, enforce_file_format=True)
    return path
