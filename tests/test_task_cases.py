"""Tasks as fine-tuning sees them: cases, targets and outputs, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import task_cases
from curia_jax.evaluate.targets import Classes, Labels, Times, Values
from data_pipeline import build
from tests.evaluate import published
from tests.evaluate.test_command import write_exams

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 patients with a CT and an MR of 3 slices each; labels shape, sex (one class in the test split) and age."""
    folder = tmp_path_factory.mktemp("shards")
    write_exams(folder / "exams")
    words = ["--input", str(folder / "exams"), "--output", str(folder / "shards"), "--workers", "1"]
    words += ["--labels", str(folder / "exams/labels.csv"), "--label-columns", "shape", "sex", "age", "modality"]
    words += ["--split-column", "split", "--patient-column", "patient"]
    text = (folder / "exams/labels.csv").read_text().splitlines()
    kinds = ["modality", *(line[:2].lower() for line in text[1:])]  # a second label with two classes
    (folder / "exams/labels.csv").write_text(
        "\n".join(f"{line},{kind}" for line, kind in zip(text, kinds, strict=True))
    )
    assert build.main(words) == 0
    return folder / "shards"


def write(folder: Path, name: str, **changes: Any) -> None:
    published.write(folder / name, published.task(**changes))


# ---- the published schema


def test_classes_of_a_table_are_cases_of_one_slice(tmp_path: Path) -> None:
    write(tmp_path, "ich")
    task = task_cases.open_task("ich", tmp_path)
    assert (task.target, task.names, task.unit, task.bagged) == ("classes", ("0", "1"), "slice", False)
    cases = task.open_cases(tmp_path / "cache")["train"]
    assert len(cases) == 24 and cases.slices == 1 and cases.masks is None
    assert isinstance(cases.targets, Classes)
    assert cases.targets.labels.tolist() == [number // 2 % 2 for number in range(24)]
    assert task.head(kind="linear", pooling="cls_mean").names == ("0", "1")


def test_rows_of_a_series_are_scored_together_and_learned_one_by_one(tmp_path: Path) -> None:
    for split in published.SPLITS:
        rows = published.rows(split, masked=True, per_patient=3)
        for number, row in enumerate(rows):
            row["series_id"] = f"{split} {number // 3}"
            del row["patient"]
        published.write(tmp_path / "kits", {split: rows})
    task = task_cases.open_task("kits", tmp_path)
    assert (task.unit, task.bagged, len(task.open_cases(tmp_path / "cache")["test"])) == ("series", False, 12)
    assert task.open_cases(tmp_path / "cache")["test"].masks is not None


def test_volume_is_a_bag_of_the_slices_that_the_task_takes(tmp_path: Path) -> None:
    write(tmp_path, "luna16-3D", slices=5, masked=True)  # 3 around the middle of the mask
    write(tmp_path, "oasis", slices=5)  # all
    luna, oasis = (
        task_cases.open_task(name, tmp_path).open_cases(tmp_path / "cache")["validation"]
        for name in ("luna16-3D", "oasis")
    )
    assert [bag.tolist() for bag in luna.bags[:2]] == [[0, 1, 2], [3, 4, 5]] and luna.slices == 3
    assert oasis.slices == 5 and len(oasis) == 12


def test_value_is_standardised_by_the_training_split(tmp_path: Path) -> None:
    rows = published.task()
    for split, own in rows.items():
        for number, row in enumerate(own):
            row["target"] = 30.0 + number + (500 if split != "train" else 0)
    published.write(tmp_path / "ixi", rows)
    task = task_cases.open_task("ixi", tmp_path)
    head = task.head(kind="linear", pooling="mean")
    assert (head.target, head.names) == ("value", ("ixi",))
    assert head.mean == pytest.approx(41.5) and head.scale == pytest.approx(np.arange(24).std())
    assert isinstance(task.targets("validation"), Values)


def test_times_keep_their_events(tmp_path: Path) -> None:
    rows = published.task(masked=True)
    for own in rows.values():
        for number, row in enumerate(own):
            row.update(target=2.0 + number, event=int(number % 4 > 0))
    published.write(tmp_path / "tcia-survival", rows)
    task = task_cases.open_task("tcia-survival", tmp_path)
    found = task.targets("train")
    assert task.target == "time" and isinstance(found, Times)
    assert found.time[:3].tolist() == [2, 3, 4] and found.event[:5].tolist() == [False, True, True, True, False]


def test_fingerprint_changes_with_data_and_with_what_is_a_case(tmp_path: Path, shards: Path) -> None:
    write(tmp_path, "ich")
    first = task_cases.open_task("ich", tmp_path).fingerprint
    assert task_cases.open_task("ich", tmp_path).fingerprint == first
    write(tmp_path, "ich", seed=1)
    assert task_cases.open_task("ich", tmp_path).fingerprint != first
    of = [task_cases.open_task("shards/shape", shards, cases=cases).fingerprint for cases in ("slice", "series")]
    assert of[0] != of[1]


# ---- shards


def test_slices_of_shards_are_cases(shards: Path, tmp_path: Path) -> None:
    task = task_cases.open_task("shards/shape", shards)
    assert (task.name, task.target, task.names) == ("shards/shape", "classes", ("flat", "tall"))
    cases = task.open_cases(tmp_path)["train"]
    assert len(cases) == 60 and cases.slices == 1 and task.shards is not None


def test_series_of_shards_are_bags(shards: Path, tmp_path: Path) -> None:
    task = task_cases.open_task("shards/shape", shards, cases="series")
    cases = task.open_cases(tmp_path)["train"]
    assert (len(cases), cases.slices, task.unit, task.bagged) == (20, 3, "series", True)
    assert sorted(np.concatenate(cases.bags).tolist()) == list(range(60))
    series, shapes = (task.shards.index.column(name).to_pylist() for name in ("series", "label_shape"))  # type: ignore[union-attr]
    assert isinstance(cases.targets, Classes)
    for bag, label in zip(cases.bags, cases.targets.labels, strict=True):
        assert {series[number] for number in bag} == {series[bag[0]]}
        assert {shapes[number] for number in bag} == {task.names[label]}


def test_number_of_shards_is_a_value(shards: Path) -> None:
    task = task_cases.open_task("shards/age:value", shards)
    assert (task.target, task.names) == ("value", ("age:value",))


def test_several_labels_are_learned_together_and_scored_one_by_one(shards: Path, tmp_path: Path) -> None:
    task = task_cases.open_task("shards/shape+modality", shards)
    assert (task.target, task.names) == ("labels", ("shape", "modality"))
    assert [one.name for one in task.scored] == ["shards/shape", "shards/modality"]
    found = task.open_cases(tmp_path)["test"].targets
    assert isinstance(found, Labels)
    index = task.shards.index if task.shards else pytest.fail("no shards")
    assert len(found) == 36 and index is not None
    assert 0 < found.present[:, 0].mean() < 1 and found.present[:, 1].mean() == 0.5


# ---- what is refused


def without_validation(rows: Rows) -> None:
    del rows["val"]


def one_class(rows: Rows) -> None:
    for own in rows.values():
        for row in own:
            row["target"] = 1


def class_without_training(rows: Rows) -> None:
    rows["val"][3]["target"] = 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_validation, UserError, "ich has no validation split, on which the weights are chosen; give it one"),
        (one_class, UserError, "ich cannot be scored: every labelled slice of the test split is of class '1'"),
        (class_without_training, DataError, "ich: row 3 of validation is of class '7', which no row of train has"),
    ],
)
def test_task_that_cannot_be_learned_is_one_line(
    tmp_path: Path, change: Callable[[Rows], None], error: type[UserError], message: str
) -> None:
    rows = published.task()
    change(rows)
    published.write(tmp_path / "ich", rows)
    with pytest.raises(error, match=message) as found:
        task_cases.open_task("ich", tmp_path)
    assert type(found.value) is error and "\n" not in str(found.value)


def test_volume_without_slices_is_named(tmp_path: Path) -> None:
    rows = published.task(slices=3)
    rows["train"][4]["image"] = np.zeros((24, 24, 0), np.float32)
    published.write(tmp_path / "oasis", rows)
    task = task_cases.open_task("oasis", tmp_path)
    with pytest.raises(DataError, match="oasis: row 4 of train has a volume without a slice; leave the row out"):
        task.open_cases(tmp_path / "cache")["train"]
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("shards/nothing", "no label 'nothing' in the shards; there are: "),
        ("shards/sex", "label 'sex' cannot be probed: every labelled slice of the test split is of class 'm'"),
        (
            "shards/shape+age:value",
            "shards/age:value is a number; several labels that are learned together have two classes each",
        ),
    ],
)
def test_label_that_cannot_be_learned_is_one_line(shards: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_cases.open_task(word, shards)


def test_missing_data_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has no data of ich; get it from: Hugging Face: raidium/CuriaBench, config ich"
    ):
        task_cases.open_task("ich", tmp_path)
    with pytest.raises(
        UserError, match="anatomy-cross-modality is scored with frozen features alone; .*: anatomy-ct, anatomy-mri"
    ):
        task_cases.open_task("anatomy-cross-modality", tmp_path)
    with pytest.raises(UserError, match="registration cannot be learned: it needs dense features"):
        task_cases.open_task("registration", tmp_path)
    with pytest.raises(UserError, match="--cases=series is of shards; a case of ich is a row of its table"):
        task_cases.open_task("ich", tmp_path, cases="series")


def test_checkpoint_with_another_head_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, "ich")
    task = task_cases.open_task("ich", tmp_path)
    head = task.head(kind="linear", pooling="cls")
    described = task.described(head, masked=False, slices=1)
    assert described["task"] == {
        "name": "ich", "target": "classes", "data_sha256": task.data_sha256, "masked": False, "slices": 1
    }  # fmt: skip
    task.check_head(head, described)
    with pytest.raises(
        UserError, match="finetune.head is attentive, but the head of the checkpoint is linear; set --config"
    ):
        task.check_head(task.head(kind="attentive", pooling="cls"), described)
    other = {"head": {**described["head"], "names": ["0", "2"]}}
    with pytest.raises(
        DataError, match="ich has the outputs 0, 1, but the checkpoint was trained for 0, 2; bring that data"
    ):
        task.check_head(head, other)
    with pytest.raises(UserError, match="--workdir has a pretraining run; name it in --from"):
        task.check_head(head, {"seed": 0})
