import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curia_common.errors import DataError, UserError
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
