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


def test_a_task_numbers_slices_within_their_split_and_the_positive_class_last() -> None:
    task = labels.task(an_index(lesion=("yes", None, "no", "yes", "no", "yes", "", "no")[:6] + ("yes", "no")), "lesion")
    assert task.classes == ("no", "yes") and task.unseen == ()
    assert task.splits["train"].slices.tolist() == [0, 2, 3]
    assert task.targets("train").tolist() == [1, 0, 1]
    assert task.splits["validation"].slices.tolist() == [0, 1]
    assert task.splits["test"].patients.tolist() == ["g", "h"]


def test_technical_columns_serve_where_there_is_no_label() -> None:
    assert labels.available(an_index()) == ["lesion", "modality", "plane", "body_part"]
    assert labels.task(an_index(), "modality", "which scanner").name == "which scanner"


def test_an_unknown_label_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="no label 'leison' in the shards; there are: lesion, modality, plane"):
        labels.task(an_index(), "leison")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lesion": ("yes",) * 8}, "every labelled slice of the test split is of class 'yes'"),
        ({"lesion": ("yes",) * 6 + ("yes", "no")}, "training and validation splits is of class 'yes'"),
        ({"splits": "tttttttt"}, "the test split holds no slice with a value"),
        ({"patients": "abcdefgg"}, "single labelled patient"),
        ({"lesion": ("yes", "no", "no", "no", "no", "no", "yes", "no")}, "class 'yes' occurs in a single patient"),
        ({"lesion": (None,) * 8}, "no slice has a value"),
    ],
)
def test_what_cannot_be_probed_is_said_in_words(change: dict, what: str) -> None:
    assert what in labels.problem(an_index(**change), "lesion")
    with pytest.raises(UserError, match="label 'lesion' cannot be probed: "):
        labels.task(an_index(**change), "lesion")


def test_unknown_values_are_no_class() -> None:
    assert labels.problem(an_index(), "body_part") == "no slice has a value"
    assert "of class 'axial'" in labels.problem(an_index(), "plane")


def test_classes_of_the_test_split_alone_come_after_those_that_can_be_learned() -> None:
    task = labels.task(an_index(lesion=("a", "c", "a", "c", "a", "c", "b", "c")), "lesion")
    assert task.classes == ("a", "c") and task.unseen == ("b",)
    assert task.targets("test").tolist() == [2, 1]


def test_a_folder_without_an_index_is_named(tmp_path) -> None:
    with pytest.raises(
        UserError, match="no index.parquet in .*--shards takes the folder that data_pipeline.build wrote"
    ):
        labels.read_index(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="looks like a work directory"):
        labels.read_index(tmp_path)


def test_validation_serves_only_if_it_has_every_class() -> None:
    assert labels.selection_on_validation(np.array(["a", "b"]), np.array(["b", "a", "c"]))
    assert not labels.selection_on_validation(np.array(["a", "b"]), np.array(["b"]))
    assert not labels.selection_on_validation(np.array(["a"]), np.array(["a"]))
