from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curia_common.errors import UserError
from data_pipeline.stages import inventory, pseudonyms
from data_pipeline.stages.labels import Applied, Columns, LabelTables

KEY = b"0123456789abcdef"
GRADE = Columns(labels=("grade",))
PATIENTS = Columns(labels=("grade",), patient="who")


def inspect(*paths: Path) -> list[inventory.Entry]:
    return inventory.inspect(([str(path) for path in paths], inventory.Options(KEY)), {}, lambda item: None)


@pytest.fixture
def pictures(tmp_path: Path) -> list[inventory.Entry]:
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(folder / f"{number}.png")
    return inspect(*sorted(folder.iterdir()))


@pytest.fixture
def exams(tmp_path: Path, write_dicom) -> list[inventory.Entry]:
    """Two patients; the first with two studies of a series each, the second with one study of two series."""
    places = {"a": ("P1", "2.25.11", "2.25.111"), "b": ("P1", "2.25.12", "2.25.121"), "c": ("P2", "2.25.21", "2.25.211"),
              "d": ("P2", "2.25.21", "2.25.212")}  # fmt: skip
    return inspect(*(
        write_dicom(tmp_path / "e" / name[0] / f"{name}.dcm", PatientID=patient, StudyInstanceUID=study, SeriesInstanceUID=series)
        for name, (patient, study, series) in places.items()
    ))  # fmt: skip


def read(tmp_path: Path, *texts: str, columns: Columns = GRADE) -> LabelTables:
    paths = [tmp_path / f"labels{number}.csv" for number in range(1, len(texts) + 1)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return LabelTables([str(path) for path in paths], columns)


def apply(tmp_path: Path, entries: list, *texts: str, columns: Columns = GRADE) -> Applied:
    return read(tmp_path, *texts, columns=columns).apply(entries, KEY)


def grades(applied: Applied) -> list:
    return [entry.labels.get("grade") for entry in applied.entries]


def refusal(tmp_path: Path, entries: list, *texts: str, columns: Columns = GRADE) -> str:
    with pytest.raises(UserError) as caught:
        apply(tmp_path, entries, *texts, columns=columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- columns


def test_only_named_columns_become_labels(tmp_path: Path, pictures) -> None:
    text = "\ufefffile,title,grade,split\np/0.png,Doe,3,test\n"  # as Excel writes UTF-8
    found = apply(tmp_path, pictures, text, columns=Columns(("grade",), split="split")).entries
    assert found[0].labels == {"grade": 3} and found[0].split == "test"
    found = apply(tmp_path, pictures, text, columns=Columns(split="split", patient="title")).entries
    assert found[0].labels == {}
    assert (found[0].patient, found[0].patient_from) == (pseudonyms.digest(KEY, "patient", "Doe"), "table")


def test_files_without_a_row_are_unlabelled_and_stay(tmp_path: Path, pictures) -> None:
    found = apply(tmp_path, pictures, "file,grade\np/1.png,3\n")
    assert grades(found) == [None, 3, None, None]
    assert [(entry.fate, entry.patient_from) for entry in found.entries] == [("", "file")] * 4


def test_one_class_is_one_value_however_written(tmp_path: Path, pictures) -> None:
    found = apply(tmp_path, pictures, "file,grade\np/0.png,1\np/1.png,1.0\np/2.png, 1\np/3.png,NaN\n")
    assert grades(found) == [1, 1, 1, None]
    assert {type(value) for value in grades(found)} == {int, type(None)}


def test_identifying_column_is_refused_unless_forced(tmp_path: Path, pictures) -> None:
    text = "file,patient_id,when\np/0.png,17,2021-03-04\n"
    message = refusal(tmp_path, pictures, text, columns=Columns(("patient_id",)))
    assert (
        "column patient_id looks like an id by its title" in message and "--force-label-columns patient_id" in message
    )
    message = refusal(tmp_path, pictures, text, columns=Columns(("when",)))
    assert "column when looks like a date: it holds one" in message and "2021" not in message
    found = apply(tmp_path, pictures, text, columns=Columns(forced=("when", "patient_id"))).entries
    assert found[0].labels == {"when": "2021-03-04", "patient_id": 17}


def test_paths_cannot_be_labels(tmp_path: Path, pictures) -> None:
    message = refusal(tmp_path, pictures, "file,grade\np/0.png,1\n", columns=Columns(forced=("file",)))
    assert "paths cannot be labels" in message


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiter_of_a_table_is_recognised(tmp_path: Path, pictures, delimiter: str) -> None:
    text = f"file{delimiter}grade{delimiter}note\np/0.png{delimiter}2{delimiter}x\n"
    assert grades(apply(tmp_path, pictures, text)) == [2, None, None, None]


def test_empty_special_cells_change_nothing(tmp_path: Path, pictures) -> None:
    patients = [entry.patient for entry in pictures]
    text = "file,who,split,kind\np/0.png,A,Val,CT\np/1.png,,,\np/2.png,A,nan,mr\np/3.png,,training,\n"
    found = apply(tmp_path, pictures, text, columns=Columns(patient="who", split="split", modality="kind")).entries
    assert [entry.facts.modality for entry in found] == ["CT", "OT", "MR", "OT"]
    assert [entry.split for entry in found] == ["validation", "", "validation", "train"]  # a patient's split is one
    assert [entry.patient for entry in found[1::2]] == patients[1::2]
    assert found[0].patient == found[2].patient != patients[0]
    assert [entry.patient_from for entry in found] == ["table", "file", "table", "file"]


def test_modality_column_does_not_override_dicom(tmp_path: Path, exams) -> None:
    found = apply(tmp_path, exams, "file,kind\ne/a/a.dcm,MR\n", columns=Columns(modality="kind"))
    assert found.entries[0].facts.modality == "CT"


# ---- what rows are about


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("file,grade\ne/b/b.dcm,1\n", [None, 1, None, None]),
        ("folder,grade\ne/a,1\ne/c/,2\n", [1, None, 2, None]),
        ("folder,grade\ne,1\n", [1, 1, 1, 1]),
        ("series,grade\n2.25.212,1\n", [None, None, None, 1]),
        ("study,grade\n2.25.11,1\n2.25.21,2\n", [1, None, 2, 2]),
        ("patient,grade\nP1,1\nP2,2\n", [1, 1, 2, 2]),
        (
            "patient,series,grade\nP1,2.25.111,1\nP2,2.25.212,2\n",
            [1, None, None, 2],
        ),  # the finer of two columns decides
    ],
)
def test_rows_by_file_folder_series_study_or_patient(tmp_path: Path, exams, text: str, wanted: list) -> None:
    assert grades(apply(tmp_path, exams, text)) == wanted


def test_ids_of_the_table_are_not_stored(tmp_path: Path, exams) -> None:
    found = apply(tmp_path, exams, "study,grade\n2.25.21,2\n").entries
    assert "2.25.21" not in repr([(e.labels, e.patient, e.series, e.study, e.series_uid, e.split) for e in found])


def test_tables_are_joined_by_patient(tmp_path: Path, pictures) -> None:
    files = "file,who\np/0.png,A\np/1.png,B\np/2.png,A\n"
    of_patients = "patient,grade\nA,3\nB,1\nC,2\n"
    found = apply(tmp_path, pictures, files, of_patients, columns=PATIENTS)
    assert grades(found) == [3, 1, 3, None]
    assert found.unmatched == {str(tmp_path / "labels2.csv"): [4]}


def test_rows_of_several_tables_complete_each_other(tmp_path: Path, pictures) -> None:
    columns = Columns(("grade", "side"))
    first, second = "file,grade,side\np/0.png,1,\np/1.png,,left\n", "folder,side\np,\n"
    found = apply(
        tmp_path, pictures, first, second, "file,side\np/0.png,right\np/1.png,left\n", columns=columns
    ).entries
    assert [entry.labels for entry in found[:3]] == [
        {"grade": 1, "side": "right"}, {"grade": None, "side": "left"}, {"grade": None, "side": None},
    ]  # fmt: skip


def test_column_has_one_type_in_all_tables(tmp_path: Path, pictures) -> None:
    found = apply(tmp_path, pictures, "file,grade\np/0.png,1\n", "file,grade\np/1.png,2.5\n")
    assert grades(found)[:2] == [1.0, 2.5] and type(grades(found)[0]) is float


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        (["file,grade\np/0.png,1\np/0.png,2\n"], "labels1.csv, lines 2 and 3: different values in column grade"),
        (["file,grade\np/1.png,0\np/0.png,1\n", "folder,grade\np,2\n"], "labels1.csv, line 3 and "),
    ],
)
def test_contradicting_rows_are_refused_by_line(tmp_path: Path, pictures, texts: list[str], places: str) -> None:
    message = refusal(tmp_path, pictures, *texts)
    assert places in message and message.endswith("for one file; correct one of them")


def test_repeated_equal_rows_are_one(tmp_path: Path, pictures) -> None:
    assert grades(apply(tmp_path, pictures, "file,grade\np/0.png,1\np/0.png,1.0\n"))[0] == 1


def test_rows_that_match_nothing_are_listed(tmp_path: Path, exams) -> None:
    found = apply(tmp_path, exams, "patient,grade\nP1,1\nP7,1\nP8,0\n")
    assert found.unmatched == {str(tmp_path / "labels1.csv"): [3, 4]}
    message = refusal(tmp_path, exams, "series,grade\n2.25.9,1\n")
    assert "no row of" in message and "names a series of the inputs" in message and "2.25.9" not in message


# ---- patients and splits


def test_patient_named_for_one_slice_holds_for_the_series(tmp_path: Path, write_series) -> None:
    entries = inspect(*write_series(tmp_path / "p", 3))
    text = "file,who\np/000.dcm,\np/001.dcm,A\np/002.dcm,\n"
    found = apply(tmp_path, entries, text, columns=Columns(patient="who")).entries
    assert {entry.patient for entry in found} == {pseudonyms.digest(KEY, "patient", "A")}
    text = refusal(tmp_path, entries, "file,who\np/000.dcm,B\np/001.dcm,A\n", columns=Columns(patient="who"))
    assert "lines 2 and 3: two patients in column who for files of one series" in text


def test_patient_in_two_splits_is_rejected(tmp_path: Path, pictures) -> None:
    text = "file,who,split\np/0.png,A,train\np/1.png,B,test\np/2.png,A,test\n"
    message = refusal(tmp_path, pictures, text, columns=Columns(patient="who", split="split"))
    assert message.endswith(
        "lines 2 and 4: one patient is in train and in test; a patient belongs to one split, so correct column split"
    )


def test_dicom_patient_in_two_splits_is_rejected(tmp_path: Path, exams) -> None:
    text = "study,split\n2.25.11,train\n2.25.12,test\n"
    assert "one patient is in train and in test" in refusal(tmp_path, exams, text, columns=Columns(split="split"))


def test_dicom_without_patient_id_is_told_apart_by_study(tmp_path: Path, write_dicom) -> None:
    paths = [
        write_dicom(tmp_path / "n" / f"{n}.dcm", PatientID="", StudyInstanceUID=f"2.25.{n // 2 + 1}") for n in range(3)
    ]
    found = inspect(*paths)
    assert [entry.patient_from for entry in found] == ["study"] * 3
    assert len({entry.patient for entry in found}) == 2


# ---- tables that cannot be used


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("file,grade\np/9.png,1\n", GRADE, "line 2: the file it names is not among the inputs"),
        ("folder,grade\nq,1\n", GRADE, "line 2: the folder it names is not among the inputs"),
        ("title,grade\np/0.png,1\n", GRADE, "has no column file, folder, series, study or patient"),
        ("file,a\np/0.png,1\n", Columns(("b", "c")), "has no column b, c; its columns are: file, a"),
        ("file,b,c d\np/0.png,1,2\n", Columns(("b,c d",)), "has no column 'b,c d'; names are separated with spaces: b 'c d'"),
        ("file,a\np/0.png,1\n", Columns(split="split"), "has no column split"),
        ("file,a\np/0.png,1\n", Columns(modality="kind"), "has no column kind"),
        ("file,a\np/0.png,9\n", Columns(split="a"), "line 2: split '9' is none of train, validation, test"),
        ("file,a\np/0.png,PT\n", Columns(modality="a"), "line 2: modality 'PT' is none of CT, MR"),
        ("file,grade\np/0.png\n", GRADE, "line 2: 1 cells under 2 column names"),
        ('file,grade\np/1.png,"x\ny"\np/0.png,1,2\n', GRADE, "line 4: 3 cells under 2 column names"),
        ("file,grade,grade\np/0.png,1,2\n", GRADE, "has two columns named grade; rename or remove one of them"),
        ("file,grade\n,1\n", GRADE, "line 2: column file is empty"),
        ("file,grade\np/0.png,Yes\np/1.png,yes\n", GRADE, "line 2 and"),
        ("file,grade\n", GRADE, "names nothing"),
        ("", GRADE, "its columns are: none"),
        ("file,grade\np/0.png,1\n", Columns(), "name columns with --label-columns"),
        ("file,grade\np/0.png,1\n", Columns(("grade", "grade")), "label column grade is named twice"),
    ],
)  # fmt: skip
def test_invalid_table_is_explained_in_one_line(tmp_path: Path, pictures, text, columns, message) -> None:
    assert message in refusal(tmp_path, pictures, text, columns=columns)


def test_table_without_a_used_column_is_refused(tmp_path: Path, pictures) -> None:
    message = refusal(tmp_path, pictures, "file,grade\np/0.png,1\n", "file,note\np/1.png,x\n")
    assert "labels2.csv has none of the columns that are used (grade)" in message


def test_unreadable_table_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the label table"):
        LabelTables([str(tmp_path / "none.csv")], GRADE)
    (tmp_path / "latin.csv").write_bytes(b"file,grade\np/0.png,M\xfcller\n")
    with pytest.raises(UserError, match="cannot read the label table .*utf-8.*save it as UTF-8"):
        LabelTables([str(tmp_path / "latin.csv")], GRADE)
