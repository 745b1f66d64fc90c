import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curia_common.errors import UserError
from data_pipeline.sources import dicom
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


def test_every_file_is_found_once_in_the_order_of_the_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2", "b/1", "a/x/y/z", ".hidden/a", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    wanted = [Path("a/x/y/z"), Path("b/1"), Path("b/2")]
    assert inventory.find_files(["."]) == wanted
    assert inventory.find_files(["b/2", "b", "a", str(tmp_path / "b"), "./b/1"]) == sorted(wanted)
    assert inventory.find_files(["b"]) == wanted[1:]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_text("x")
    exams = tmp_path / "exams"
    exams.mkdir()
    (exams / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(exams)
    (exams / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(exams / "pipe")
    found = inventory.find_files([str(exams)])
    assert found == [exams / "broken", exams / "linked" / "a", exams / "pipe"]
    broken, _, pipe = inspect(*found)
    assert (broken.fate, broken.reason) == ("quarantined", "cannot be read: No such file or directory (broken link)")
    assert (pipe.fate, pipe.reason) == ("quarantined", "neither a file nor a folder")


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = inventory.find_files([str(tmp_path)])
    assert found == [tmp_path / "a", tmp_path / "closed"]
    assert inspect(found[1])[0].reason == "the folder cannot be listed"


def test_the_output_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slices-train.array_record-00000").write_text("x")
    (tmp_path / "a").write_text("x")
    assert inventory.find_files([str(tmp_path)], leave_out=str(tmp_path / "out")) == [tmp_path / "a"]


def test_inputs_that_are_missing_or_empty_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such input: .*none"):
        inventory.find_files([str(tmp_path / "none")])
    with pytest.raises(UserError, match="no files in .*name a folder of DICOM"):
        inventory.find_files([str(tmp_path)])


# ---- what they are


def test_fates_and_reasons(tmp_path: Path, write_dicom) -> None:
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


def test_an_unexpected_error_costs_its_file_and_quotes_nothing(tmp_path: Path, write_dicom, monkeypatch) -> None:
    paths = [write_dicom(tmp_path / "a.dcm"), write_dicom(tmp_path / "b.dcm")]
    read = inventory.dicom.read_header

    def fail(path: str, file):
        if path.endswith("a.dcm"):
            raise LookupError("DOE^JOHN")
        return read(path, file)

    monkeypatch.setattr(inventory.dicom, "read_header", fail)
    bad, good = inspect(*paths)
    assert bad.fate == "quarantined" and "LookupError" in bad.reason and "DOE" not in bad.reason
    assert good.fate == ""


def test_entries_hold_pseudonyms_and_whitelisted_facts_alone(tmp_path: Path, write_dicom) -> None:
    fields = {
        "PatientID": "SECRET1",
        "SeriesInstanceUID": "2.25.77",
        "StudyInstanceUID": "2.25.78",
        "SOPInstanceUID": "2.25.79",
    }
    (entry,) = inspect(write_dicom(tmp_path / "a.dcm", PatientName="SECRET2", StudyID="SECRET3", **fields))
    text = repr((entry.series, entry.patient, entry.facts))
    assert entry.patient == pseudonyms.digest(KEY, "patient", "SECRET1")
    assert not any(word in text for word in ("SECRET", "2.25"))


def test_one_series_uid_used_for_two_patients_is_two_series(tmp_path: Path, write_dicom) -> None:
    a, b = inspect(*(write_dicom(tmp_path / f"{p}.dcm", PatientID=p) for p in "ab"))
    assert a.series != b.series and a.patient != b.patient


def test_without_a_patient_id_the_study_tells_patients_apart(tmp_path: Path, write_dicom) -> None:
    first, second, other = inspect(
        write_dicom(tmp_path / "a.dcm", PatientID="", SeriesInstanceUID="2.25.10"),
        write_dicom(tmp_path / "b.dcm", PatientID=None, SeriesInstanceUID="2.25.11"),
        write_dicom(tmp_path / "c.dcm", PatientID="", StudyInstanceUID="2.25.99"),
    )
    assert first.patient == second.patient != other.patient


def test_the_files_of_a_bids_subject_are_one_patient(tmp_path: Path) -> None:
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


def test_faces_are_left_out_on_demand_and_what_does_not_say_what_it_shows_with_them(
    tmp_path: Path, write_dicom
) -> None:
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
    assert dicom.FACES <= dicom.BODY_PARTS


# ---- the label table


@pytest.fixture
def pictures(tmp_path: Path) -> list[inventory.Entry]:
    return inspect(*(picture(tmp_path / "p" / f"{n}.png") for n in range(4)))


def table(tmp_path: Path, text: str, **columns) -> inventory.LabelTable:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return inventory.LabelTable(str(path), **columns)


def refusal(tmp_path: Path, entries: list, text: str, **columns) -> str:
    with pytest.raises(UserError) as caught:
        table(tmp_path, text, **columns).apply(entries, KEY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_have_the_type_of_their_column(tmp_path: Path, pictures) -> None:
    table(
        tmp_path,
        'file,whole,decimal,text,code,mixed,none\np/0.png,1,1,a,007,1,\np/1.png, -2 ,0.5,,010,x,\n"p/2.png",,,"b,c",,,\n',
    ).apply(pictures, KEY)
    assert pictures[0].labels == {"whole": 1, "decimal": 1.0, "text": "a", "code": "007", "mixed": "1", "none": None}
    assert pictures[1].labels == {"whole": -2, "decimal": 0.5, "text": None, "code": "010", "mixed": "x", "none": None}
    assert pictures[2].labels["text"] == "b,c" and pictures[2].labels["whole"] is None
    assert (pictures[3].fate, pictures[3].reason) == ("excluded", "not in the label table")
    assert {type(entry.labels["decimal"]) for entry in pictures[:2]} == {float}


def test_only_the_named_columns_become_labels(tmp_path: Path, pictures) -> None:
    text = "\ufefffile,name,grade,split\np/0.png,Doe,3,test\n"  # as Excel writes UTF-8
    table(tmp_path, text, columns=("grade",), split_column="split").apply(pictures, KEY)
    assert pictures[0].labels == {"grade": 3}
    table(tmp_path, text, split_column="split", patient_column="name").apply(pictures, KEY)
    assert pictures[0].labels == {"grade": 3}
    assert pictures[0].patient == pseudonyms.digest(KEY, "patient", "Doe")


def test_empty_cells_of_the_special_columns_leave_things_as_they_are(tmp_path: Path, pictures) -> None:
    patients = [entry.patient for entry in pictures]
    text = "file,patient,split,kind\np/0.png,A,val,CT\np/1.png,,,\np/2.png,A,,MR\np/3.png,,train,\n"
    table(tmp_path, text, patient_column="patient", split_column="split", modality_column="kind").apply(pictures, KEY)
    assert [entry.facts["modality"] for entry in pictures] == ["CT", "OT", "MR", "OT"]
    assert [entry.split for entry in pictures] == ["validation", "", "validation", "train"]  # a patient's split is one
    assert [entry.patient for entry in pictures[1::2]] == patients[1::2]
    assert pictures[0].patient == pictures[2].patient != patients[0]


def test_the_modality_column_does_not_overrule_dicom(tmp_path: Path, write_dicom) -> None:
    entries = inspect(write_dicom(tmp_path / "p" / "0.dcm"))
    table(tmp_path, "file,kind\np/0.dcm,MR\n", modality_column="kind").apply(entries, KEY)
    assert entries[0].facts["modality"] == "CT"


def test_a_patient_named_for_one_slice_counts_for_the_series(tmp_path: Path, write_series) -> None:
    entries = inspect(*write_series(tmp_path / "p", 3))
    table(tmp_path, "file,who\np/000.dcm,\np/001.dcm,A\np/002.dcm,\n", patient_column="who").apply(entries, KEY)
    assert {entry.patient for entry in entries} == {pseudonyms.digest(KEY, "patient", "A")}
    entries = inspect(*write_series(tmp_path / "p", 3))
    text = refusal(tmp_path, entries, "file,who\np/000.dcm,B\np/001.dcm,A\n", patient_column="who")
    assert "lines 2 and 3: two patients in column who for files of one series" in text


def test_a_patient_in_two_splits_is_refused(tmp_path: Path, pictures) -> None:
    columns = {"patient_column": "who", "split_column": "split"}
    text = refusal(tmp_path, pictures, "file,who,split\np/0.png,A,train\np/1.png,B,test\np/2.png,A,test\n", **columns)
    assert text.endswith(
        "one patient is in train (line 2) and in test (line 4); a patient belongs to one split, so correct column split"
    )


def test_a_dicom_patient_in_two_splits_is_refused_without_a_patient_column(tmp_path: Path, write_dicom) -> None:
    entries = inspect(*(write_dicom(tmp_path / "p" / f"{n}.dcm", SeriesInstanceUID=f"2.25.{n}") for n in range(2)))
    assert "one patient is in train" in refusal(
        tmp_path, entries, "file,split\np/0.dcm,train\np/1.dcm,test\n", split_column="split"
    )


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("file,a\np/9.png,1\n", {}, "line 2: the file it names is not among the inputs"),
        ("file,a\np/0.png,1\np/0.png,2\n", {}, "line 3: it names the same file as line 2"),
        ("name,a\np/0.png,1\n", {}, "has no column file; its columns are: name, a"),
        ("file,a\np/0.png,1\n", {"columns": ("b", "c")}, "has no column b, c; its columns are: file, a"),
        ("file,a\np/0.png,1\n", {"split_column": "split"}, "has no column split"),
        ("file,a\np/0.png,1\n", {"modality_column": "kind"}, "has no column kind"),
        ("file,a\np/0.png,9\n", {"split_column": "a"}, "line 2: split '9' is none of train, validation, test"),
        ("file,a\np/0.png,PT\n", {"modality_column": "a"}, "line 2: modality 'PT' is none of CT, MR"),
        ("file,a\np/0.png\n", {}, "line 2: 1 cells under 2 column names"),
        ('file,a\np/1.png,"x\ny"\np/0.png,1,2\n', {}, "line 4: 3 cells under 2 column names"),
        ("file,a\n", {}, "names no file"),
        ("", {}, "has no column file; its columns are: none"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path: Path, pictures, text, columns, message) -> None:
    assert message in refusal(tmp_path, pictures, text, **columns)


def test_a_table_that_cannot_be_read_is_an_error(tmp_path: Path, pictures) -> None:
    with pytest.raises(UserError, match="cannot read the label table"):
        inventory.LabelTable(str(tmp_path / "none.csv")).apply(pictures, KEY)
    (tmp_path / "latin.csv").write_bytes(b"file,a\np/0.png,M\xfcller\n")
    with pytest.raises(UserError, match="cannot read the label table .*utf-8"):
        inventory.LabelTable(str(tmp_path / "latin.csv")).apply(pictures, KEY)
