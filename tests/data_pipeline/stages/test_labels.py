from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curia_common.errors import UserError
from data_pipeline.stages import inventory, pseudonyms
from data_pipeline.stages.labels import LabelTable

KEY = b"0123456789abcdef"


def inspect(*paths: Path) -> list[inventory.Entry]:
    return inventory.inspect(([str(path) for path in paths], inventory.Options(KEY)), {}, lambda item: None)


@pytest.fixture
def pictures(tmp_path: Path) -> list[inventory.Entry]:
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(folder / f"{number}.png")
    return inspect(*sorted(folder.iterdir()))


def table(tmp_path: Path, text: str, **columns) -> LabelTable:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return LabelTable(str(path), **columns)


def refusal(tmp_path: Path, entries: list, text: str, **columns) -> str:
    with pytest.raises(UserError) as caught:
        table(tmp_path, text, **columns).apply(entries, KEY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_have_the_type_of_their_column(tmp_path: Path, pictures) -> None:
    pictures = table(
        tmp_path,
        'file,whole,decimal,text,code,mixed,none\np/0.png,1,1,a,007,1,\np/1.png, -2 ,0.5,,010,x,\n"p/2.png",,,"b,c",,,\n',
    ).apply(pictures, KEY)
    assert pictures[0].labels == {"whole": 1, "decimal": 1.0, "text": "a", "code": "007", "mixed": "1", "none": None}
    assert pictures[1].labels == {"whole": -2, "decimal": 0.5, "text": None, "code": "010", "mixed": "x", "none": None}
    assert pictures[2].labels["text"] == "b,c" and pictures[2].labels["whole"] is None
    assert (pictures[3].fate, pictures[3].reason) == ("excluded", "not in the label table")
    assert {type(entry.labels["decimal"]) for entry in pictures[:2]} == {float}


def test_only_named_columns_become_labels(tmp_path: Path, pictures) -> None:
    text = "\ufefffile,name,grade,split\np/0.png,Doe,3,test\n"  # as Excel writes UTF-8
    pictures = table(tmp_path, text, columns=("grade",), split_column="split").apply(pictures, KEY)
    assert pictures[0].labels == {"grade": 3}
    pictures = table(tmp_path, text, split_column="split", patient_column="name").apply(pictures, KEY)
    assert pictures[0].labels == {"grade": 3}
    assert pictures[0].patient == pseudonyms.digest(KEY, "patient", "Doe")


def test_empty_special_cells_change_nothing(tmp_path: Path, pictures) -> None:
    patients = [entry.patient for entry in pictures]
    text = "file,patient,split,kind\np/0.png,A,val,CT\np/1.png,,,\np/2.png,A,,MR\np/3.png,,train,\n"
    pictures = table(tmp_path, text, patient_column="patient", split_column="split", modality_column="kind").apply(
        pictures, KEY
    )
    assert [entry.facts.modality for entry in pictures] == ["CT", "OT", "MR", "OT"]
    assert [entry.split for entry in pictures] == ["validation", "", "validation", "train"]  # a patient's split is one
    assert [entry.patient for entry in pictures[1::2]] == patients[1::2]
    assert pictures[0].patient == pictures[2].patient != patients[0]


def test_modality_column_does_not_override_dicom(tmp_path: Path, write_dicom) -> None:
    entries = inspect(write_dicom(tmp_path / "p" / "0.dcm"))
    entries = table(tmp_path, "file,kind\np/0.dcm,MR\n", modality_column="kind").apply(entries, KEY)
    assert entries[0].facts.modality == "CT"


def test_patient_named_for_one_slice_holds_for_the_series(tmp_path: Path, write_series) -> None:
    entries = inspect(*write_series(tmp_path / "p", 3))
    entries = table(tmp_path, "file,who\np/000.dcm,\np/001.dcm,A\np/002.dcm,\n", patient_column="who").apply(
        entries, KEY
    )
    assert {entry.patient for entry in entries} == {pseudonyms.digest(KEY, "patient", "A")}
    entries = inspect(*write_series(tmp_path / "p", 3))
    text = refusal(tmp_path, entries, "file,who\np/000.dcm,B\np/001.dcm,A\n", patient_column="who")
    assert "lines 2 and 3: two patients in column who for files of one series" in text


def test_patient_in_two_splits_is_rejected(tmp_path: Path, pictures) -> None:
    columns = {"patient_column": "who", "split_column": "split"}
    text = refusal(tmp_path, pictures, "file,who,split\np/0.png,A,train\np/1.png,B,test\np/2.png,A,test\n", **columns)
    assert text.endswith(
        "one patient is in train (line 2) and in test (line 4); a patient belongs to one split, so correct column split"
    )


def test_dicom_patient_in_two_splits_is_rejected(tmp_path: Path, write_dicom) -> None:
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
def test_invalid_table_is_explained_in_one_line(tmp_path: Path, pictures, text, columns, message) -> None:
    assert message in refusal(tmp_path, pictures, text, **columns)


def test_unreadable_table_raises_user_error(tmp_path: Path, pictures) -> None:
    with pytest.raises(UserError, match="cannot read the label table"):
        LabelTable(str(tmp_path / "none.csv")).apply(pictures, KEY)
    (tmp_path / "latin.csv").write_bytes(b"file,a\np/0.png,M\xfcller\n")
    with pytest.raises(UserError, match="cannot read the label table .*utf-8"):
        LabelTable(str(tmp_path / "latin.csv")).apply(pictures, KEY)
