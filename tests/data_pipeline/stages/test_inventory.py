import gzip
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curia_common.errors import DataError, StorageError, UserError
from data_pipeline.sources import dicom_header
from data_pipeline.stages import inventory, pseudonyms

KEY = b"0123456789abcdef"
OPTIONS = inventory.Options(KEY)
MAY_BE = "may show a face: its body part is not named"


def inspect(*paths: Path, options: inventory.Options = OPTIONS, skip: dict | None = None) -> list[inventory.Entry]:
    return inventory.inspect(([str(path) for path in paths], options), skip or {}, lambda item: None)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(path)
    return path


# ---- which files


def test_files_are_found_once_sorted_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2", "b/1", "a/x/y/z", ".hidden/a", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    wanted = ["a/x/y/z", "b/1", "b/2"]
    assert inventory.find_files(["."]) == wanted
    assert inventory.find_files(["b/2", "b", "a", str(tmp_path / "b"), "./b/1"]) == sorted(wanted)
    assert inventory.find_files(["b"]) == wanted[1:]


def test_links_to_folders_are_followed_without_cycles(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_text("x")
    exams = tmp_path / "exams"
    exams.mkdir()
    (exams / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(exams)
    (exams / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(exams / "pipe")
    found = inventory.find_files([str(exams)])
    assert found == [str(exams / name) for name in ("broken", "linked/a", "pipe")]
    broken, _, pipe = inspect(*found)
    assert (broken.fate, broken.reason) == ("quarantined", "cannot be read: No such file or directory (broken link)")
    assert (pipe.fate, pipe.reason) == ("quarantined", "neither a file nor a folder")


def test_folder_without_permission_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = inventory.find_files([str(tmp_path)])
    assert found == [str(tmp_path / "a"), str(tmp_path / "closed")]
    assert inspect(found[1])[0].reason == "the folder cannot be listed"


def test_entries_that_cannot_be_opened_have_fates(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(tmp_path / "socket"))  # a socket's path may have 108 bytes
    found = inventory.find_files([str(tmp_path)])
    assert [(entry.fate, entry.reason) for entry in inspect(*map(Path, found))] == [
        ("quarantined", "cannot be read: Too many levels of symbolic links"),
        ("quarantined", "neither a file nor a folder"),
    ]


# Run as a user whom permissions bind: root reads everything.
_AS_NOBODY = """
import json, os, sys
from data_pipeline.stages import inventory
import data_pipeline.sources.archives
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
found = inventory.find_files([sys.argv[1]])
entries = inventory.inspect((found, inventory.Options(b"0123456789abcdef")), {}, lambda item: None)
print(json.dumps([[os.path.relpath(one.path, sys.argv[1]), one.fate, one.reason] for one in entries]))
"""


def test_files_and_folders_without_permission_have_fates() -> None:
    folder = Path(tempfile.mkdtemp(prefix="curia"))  # pytest's own folders are closed to other users
    try:
        closed = {"a_no_right": 0o000, "b_no_entry": 0o444}
        for name in closed:
            (folder / name / "below").mkdir(parents=True)
            (folder / name / "file").write_text("x")
        (folder / "c_no_read").write_text("x")
        (folder / "d").write_text("x")
        (folder / "c_no_read").chmod(0o000)
        for name, mode in closed.items():
            (folder / name).chmod(mode)
        folder.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", _AS_NOBODY, folder], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        denied = "cannot be read: Permission denied"
        assert json.loads(done.stdout) == [
            ["a_no_right", "quarantined", "the folder cannot be listed"],
            ["b_no_entry/below", "quarantined", denied], ["b_no_entry/file", "quarantined", denied],
            ["c_no_read", "quarantined", denied], ["d", "excluded", inventory.NO_IMAGE],
        ]  # fmt: skip
    finally:
        for path in folder.iterdir():
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_input_that_cannot_be_looked_at_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"--input .* cannot be read \(Permission denied\)"):
        inventory.find_files([str(tmp_path)])


def test_folder_that_vanishes_or_fails_while_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SMITH" / "a").mkdir(parents=True)
    failure = FileNotFoundError(2, "No such file or directory", str(tmp_path / "SMITH"))

    def fail(path):
        if path.endswith("SMITH"):
            raise failure
        return (0, 0)

    monkeypatch.setattr(inventory, "_identity", fail)
    assert inventory.find_files([str(tmp_path)]) == [str(tmp_path / "SMITH")]
    failure = OSError(5, "Input/output error", str(tmp_path / "SMITH"))
    with pytest.raises(StorageError) as caught:
        inventory.find_files([str(tmp_path)])
    assert "SMITH" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("PT000000", "IM000001"), ("pt000000", "im000001"), ("PT000000", "IM000001.dcm"), ("PT000000.", "im000001.DCM"),
        ("PT000000", "IM000001;1"), ("PT000000", "IM000001.;1"), ("pt000000", "IM000001."),
    ],
)  # fmt: skip
def test_dicomdir_names_match_names_on_media(tmp_path: Path, monkeypatch, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()
    for path in (tmp_path / folder / name, tmp_path / folder / "im000002.dcm", tmp_path / "DICOMDIR"):
        path.write_text("x")
    names = ["PT000000/IM000001", "PT000000/IM000003", "PT000009/IM000001"]
    monkeypatch.setattr(dicom_header, "read_dicomdir", lambda path: names)
    found = inventory.find_files([str(tmp_path / "DICOMDIR")])
    missing = [f"{folder}/IM000003", "PT000009/IM000001"]
    assert sorted(os.path.relpath(one, tmp_path) for one in found) == sorted(["DICOMDIR", f"{folder}/{name}", *missing])


def test_dicomdir_takes_the_exact_name_first(tmp_path: Path, monkeypatch) -> None:
    for name in ("IM1", "IM1.dcm", "im1", "DICOMDIR"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(dicom_header, "read_dicomdir", lambda path: ["IM1"])
    assert inventory.find_files([str(tmp_path / "DICOMDIR")]) == [str(tmp_path / n) for n in ("DICOMDIR", "IM1")]


def test_output_folder_is_not_searched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slices-train.array_record-00000").write_text("x")
    (tmp_path / "a").write_text("x")
    assert inventory.find_files([str(tmp_path)], leave_out=str(tmp_path / "out")) == [str(tmp_path / "a")]


def test_missing_or_empty_inputs_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such input: .*none"):
        inventory.find_files([str(tmp_path / "none")])
    with pytest.raises(DataError, match="no files in .*name a folder of DICOM"):
        inventory.find_files([str(tmp_path)])


# ---- what they are


def test_fates_and_reasons_of_files(tmp_path: Path, write_dicom) -> None:
    (tmp_path / "report.pdf").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "short.dcm").write_bytes(b"\0" * 128 + b"DICM")
    good = write_dicom(tmp_path / "good.dcm")
    lossy = write_dicom(tmp_path / "lossy.dcm", LossyImageCompression="01")
    paths = [tmp_path / n for n in ("report.pdf", "empty.dcm", "empty.nii.gz", "short.dcm")]
    entries = inspect(*paths, good, lossy, options=inventory.Options(KEY, keep_lossy=False))
    assert [(entry.fate, entry.reason) for entry in entries] == [
        ("excluded", "not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file)"),
        ("quarantined", "empty file"), ("quarantined", "empty file"),
        ("quarantined", "not a DICOM image: it has neither a SOP class nor rows"),
        ("", ""), ("excluded", "lossy compression"),
    ]  # fmt: skip
    assert inspect(good, skip={str(good): "it hangs"})[0].reason == "it hangs"


def test_values_beside_a_header_are_not_files_of_their_own(tmp_path: Path, write_dicom) -> None:
    like_dicom = b"\x08\x00\x05\x00" + bytes(2000)  # as the first of 16-bit values can be
    for name in ("v.hdr", "v.img", "w.mhd", "w.raw", "alone.raw", "x.nhdr", "x.img", "other.hdr"):
        (tmp_path / name).write_bytes(like_dicom)
    (tmp_path / "v.hdr").write_bytes(struct.pack(">i", 348) + bytes(344))
    (tmp_path / "other.hdr").write_text("ENVI")
    dicom = write_dicom(tmp_path / "slice.img")
    names = ["v.hdr", "v.img", "w.mhd", "w.raw", "alone.raw", "x.nhdr", "x.img", "other.hdr"]
    found = {name: inspect(tmp_path / name)[0] for name in names}
    data = ("", "excluded", inventory.DATA_OF_A_HEADER)
    assert {name: (one.kind, one.fate, one.reason) for name, one in found.items()} == {
        "v.hdr": ("volume", "", ""), "v.img": data, "w.mhd": ("volume", "", ""), "w.raw": data, "alone.raw": data,
        "x.nhdr": ("volume", "", ""), "x.img": data, "other.hdr": ("", "excluded", inventory.NO_IMAGE),
    }  # fmt: skip
    assert inspect(dicom)[0].kind == "dicom"  # a name that DICOM files have too


def test_single_compressed_files_are_what_they_hold(tmp_path: Path, write_dicom) -> None:
    whole = write_dicom(tmp_path / "a.dcm").read_bytes()
    contents = {
        "a.dcm.gz": gzip.compress(whole), "b.IMA.GZ": gzip.compress(whole), "plain.dcm.gz": whole, "p.png.gz": b"x", "v.nrrd.gz": b"x",
        "v.mgz": b"x", "notes.txt.gz": gzip.compress(b"notes"), "cut.dcm.gz": gzip.compress(whole)[:150],
    }  # fmt: skip
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    found = {name: inspect(tmp_path / name)[0] for name in contents}
    kinds = {
        "a.dcm.gz": "dicom",
        "b.IMA.GZ": "dicom",
        "plain.dcm.gz": "dicom",
        "p.png.gz": "image",
        "v.nrrd.gz": "volume",
        "v.mgz": "volume",
    }
    assert {name: one.kind for name, one in found.items() if one.kind} == kinds
    assert (found["notes.txt.gz"].fate, found["notes.txt.gz"].reason) == ("excluded", inventory.NO_IMAGE)
    assert (found["cut.dcm.gz"].fate, found["cut.dcm.gz"].reason) == ("quarantined", "damaged gzip file: it is cut off")


def test_unexpected_error_quarantines_its_file_without_header_values(tmp_path: Path, write_dicom, monkeypatch) -> None:
    paths = [write_dicom(tmp_path / "a.dcm"), write_dicom(tmp_path / "b.dcm")]
    read = dicom_header.read_header

    def fail(file):
        if file.name.endswith("a.dcm"):
            raise LookupError("DOE^JOHN")
        return read(file)

    monkeypatch.setattr(dicom_header, "read_header", fail)
    bad, good = inspect(*paths)
    assert bad.fate == "quarantined" and "LookupError" in bad.reason and "DOE" not in bad.reason
    assert good.fate == ""


def test_entries_hold_only_pseudonyms_and_whitelisted_facts(tmp_path: Path, write_dicom) -> None:
    fields = {
        "PatientID": "SECRET1",
        "SeriesInstanceUID": "2.25.77",
        "StudyInstanceUID": "2.25.78",
        "SOPInstanceUID": "2.25.79",
    }
    (entry,) = inspect(write_dicom(tmp_path / "a.dcm", PatientName="SECRET2", StudyID="SECRET3", **fields))
    text = repr(entry)
    assert entry.patient == pseudonyms.digest(KEY, "patient", "SECRET1")
    assert not any(word in text for word in ("SECRET", "2.25"))


def test_series_uid_shared_by_two_patients_is_two_series(tmp_path: Path, write_dicom) -> None:
    a, b = inspect(*(write_dicom(tmp_path / f"{p}.dcm", PatientID=p) for p in "ab"))
    assert a.series != b.series and a.patient != b.patient


def test_missing_patient_id_falls_back_to_the_study(tmp_path: Path, write_dicom) -> None:
    first, second, other = inspect(
        write_dicom(tmp_path / "a.dcm", PatientID="", SeriesInstanceUID="2.25.10"),
        write_dicom(tmp_path / "b.dcm", PatientID=None, SeriesInstanceUID="2.25.11"),
        write_dicom(tmp_path / "c.dcm", PatientID="", StudyInstanceUID="2.25.99"),
    )
    assert first.patient == second.patient != other.patient


def test_files_of_a_bids_subject_are_one_patient(tmp_path: Path) -> None:
    names = [
        "ds/sub-01/anat/sub-01_T1w.nii.gz", "ds/sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "ds/sub-01_flat.nii",
        "ds/derivatives/tool/sub-01/anat/sub-01_x.nii", "ds/rawdata/sub-01/x.nii",
        "ds/sub-02/anat/sub-02_T1w.nii.gz", "other/sub-01/anat/sub-01_T1w.nii.gz", "ds/single.nii",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    patients = [entry.patient for entry in inspect(*(tmp_path / name for name in names))]
    assert len(set(patients[:5])) == 1
    assert len({patients[0], *patients[5:]}) == 4


def test_drop_faces_excludes_faces_and_unnamed_body_parts(tmp_path: Path, write_dicom) -> None:
    parts = {
        "HEAD": "a body part with a face",
        "NECK_CHEST": "a body part with a face",
        "CHEST": "",
        "Miller": MAY_BE,
        None: MAY_BE,
    }
    paths = [write_dicom(tmp_path / f"{n}.dcm", BodyPartExamined=part) for n, part in enumerate(parts)]
    (tmp_path / "brain.nii.gz").write_bytes(b"x")
    entries = inspect(*paths, tmp_path / "brain.nii.gz", options=inventory.Options(KEY, keep_faces=False))
    assert [entry.reason for entry in entries] == [*parts.values(), MAY_BE]
    assert {entry.reason for entry in inspect(*paths)} == {""}
    assert dicom_header.FACES <= dicom_header.BODY_PARTS


def test_containing_folders_include_archives_and_buckets() -> None:
    assert set(inventory.containing("/a/b.zip!/c/d.dcm")) >= {"/a", "/a/b.zip", "/a/b.zip!/c", "/a/b.zip!/c/d.dcm"}
    assert set(inventory.containing("s3://bucket/x/d.dcm")) >= {"s3://bucket", "s3://bucket/x", "s3://bucket/x/d.dcm"}
