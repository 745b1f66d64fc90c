"""Labels as classification tasks, and the reasons why one cannot be probed."""

import numpy as np
import pyarrow as pa
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import labels


def an_index(splits: str = "ttttvvss", lesion: tuple = ("yes", "no") * 4, patients: str = "abcdefgh") -> pa.Table:
    names = {"t": "train", "v": "validation", "s": "test"}
    return pa.table(
        {
            "split": [names[letter] for letter in splits],
            "patient": list(patients),
            "series": [f"series {p}" for p in patients],
            "modality": ["CT", "MR"] * (len(splits) // 2),
            "plane": ["axial"] * len(splits),
            "body_part": ["unknown"] * len(splits),
            "label_lesion": list(lesion),
        }
    )


def test_task_numbers_slices_per_split_and_positive_class_last() -> None:
    task = labels.task(an_index(lesion=("yes", None, "no", "yes", "no", "yes", "", "no")[:6] + ("yes", "no")), "lesion")
    assert task.classes == ("no", "yes") and task.unseen == ()
    assert task.splits["train"].slices.tolist() == [0, 2, 3]
    assert task.targets("train").tolist() == [1, 0, 1]
    assert task.splits["validation"].slices.tolist() == [0, 1]
    assert task.splits["test"].patients.tolist() == ["g", "h"]


def test_technical_columns_are_available_as_labels() -> None:
    assert labels.available(an_index()) == ["lesion", "modality", "plane", "body_part"]
    assert labels.task(an_index(), "modality", "which scanner").name == "which scanner"


def test_unknown_label_lists_known_ones() -> None:
    with pytest.raises(UserError, match="no label 'leison' in the shards; there are: lesion, modality, plane"):
        labels.task(an_index(), "leison")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lesion": ("yes",) * 8}, "every labelled slice of the test split is of class 'yes'"),
        ({"lesion": ("yes",) * 6 + ("yes", "no")}, "training and validation splits is of class 'yes'"),
        ({"splits": "tttttttt"}, "the test split has no slice with a value"),
        ({"patients": "abcdefgg"}, "single labelled patient"),
        ({"lesion": ("yes", "no", "no", "no", "no", "no", "yes", "no")}, "class 'yes' occurs in a single patient"),
        ({"lesion": (None,) * 8}, "no slice has a value"),
    ],
)
def test_label_that_cannot_be_probed_gives_reason(change: dict, what: str) -> None:
    assert what in labels.obstacle(an_index(**change), "lesion")
    with pytest.raises(UserError, match="label 'lesion' cannot be probed: "):
        labels.task(an_index(**change), "lesion")


def test_unknown_values_are_not_a_class() -> None:
    assert labels.obstacle(an_index(), "body_part") == "no slice has a value"
    assert "of class 'axial'" in labels.obstacle(an_index(), "plane")


def test_classes_of_test_split_alone_are_numbered_last() -> None:
    task = labels.task(an_index(lesion=("a", "c", "a", "c", "a", "c", "b", "c")), "lesion")
    assert task.classes == ("a", "c") and task.unseen == ("b",)
    assert task.targets("test").tolist() == [2, 1]


def test_folder_without_index_is_named(tmp_path) -> None:
    with pytest.raises(
        UserError, match="no index.parquet in .*--shards takes the folder that data_pipeline.build wrote"
    ):
        labels.read_index(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="looks like a work directory"):
        labels.read_index(tmp_path)


def test_validation_selects_only_with_every_class() -> None:
    assert labels.selection_on_validation(np.array(["a", "b"]), np.array(["b", "a", "c"]))
    assert not labels.selection_on_validation(np.array(["a", "b"]), np.array(["b"]))
    assert not labels.selection_on_validation(np.array(["a"]), np.array(["a"]))


@pytest.mark.parametrize(
    ("patient_from", "groups"),
    [
        (["id"] * 8, "patients"),
        (["file"] * 8, "files (patients unknown)"),
        (["file"] * 4 + ["study"] * 4, "studies and files (patients unknown)"),
        (["id", "table"] * 3 + ["file"] * 2, "patients and files (some patients unknown)"),
        ([None] * 8, "patients"),  # slices of an older version of the dataset
    ],
)
def test_task_says_whether_patients_are_known(patient_from: list, groups: str) -> None:
    index = an_index().append_column("patient_from", pa.array(patient_from, pa.string()))
    assert labels.task(index, "lesion").groups == groups
    assert labels.task(an_index(), "lesion").groups == "patients"


def test_patients_of_unlabelled_slices_do_not_count() -> None:
    index = an_index(lesion=("yes", "no", "yes", "no", "yes", None, "yes", "no"))
    index = index.append_column("patient_from", pa.array(["id"] * 5 + ["file"] + ["id"] * 2))
    assert labels.task(index, "lesion").groups == "patients"


def test_value_is_read_as_a_number_where_the_name_says_so() -> None:
    index = an_index(lesion=("34", "35.5", "61", "48", "50", None, "71", "29"))
    task = labels.task(index, "lesion:value")
    assert task.is_value and task.classes == ()
    assert task.targets("train").tolist() == [34.0, 35.5, 61.0, 48.0] and task.targets("validation").tolist() == [50.0]


def test_value_that_is_text_is_named() -> None:
    with pytest.raises(UserError, match="label 'lesion:value' cannot be probed: 'yes' is not a number"):
        labels.task(an_index(), "lesion:value")


def test_classes_that_are_numbers_name_the_way_to_predict_them() -> None:
    ages = tuple(str(30 + n) for n in range(16))
    index = an_index("t" * 12 + "vvss", lesion=ages, patients="abcdefghijklmnop")
    with pytest.raises(UserError, match="its 14 classes are numbers: lesion:value predicts the number"):
        labels.task(index, "lesion")
    assert labels.task(index, "lesion:value").is_value


def test_near_duplicates_between_learning_and_test_are_counted() -> None:
    index = an_index()
    # Test series g looks like training series a, as does training series b; test series h like nothing.
    like = [None, "series a", None, None, None, None, "series a", None]
    assert labels.task(index.append_column("near_duplicate_of", [like]), "lesion").near_duplicates == 1
    assert labels.task(index, "lesion").near_duplicates == 0
