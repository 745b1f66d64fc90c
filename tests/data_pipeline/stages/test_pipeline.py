"""A build as a whole: its options, and what is in the way of its output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError, UserError
from data_pipeline.format import shards
from data_pipeline.stages import card, commit, pipeline
from tests.data_pipeline.pictures import pictures

Build = Callable[..., card.Card]


@pytest.fixture
def build(tmp_path: Path, key_file: Path, inline_workers: None) -> Build:
    """Builds in/ into out/ and returns the card; keywords are further options."""

    def run(**options: Any) -> card.Card:
        given = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "key_file": str(key_file)}
        return pipeline.run(pipeline.Options(**given | options)).card

    return run


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers is 0; it has to be at least 1"),
        ({"slices_per_record": 0}, "--slices-per-record is 0; it has to be at least 1"),
        ({"shard_mb": 0}, "--shard-mb is 0; it has to be at least 1"),
        ({"memory_gb": 0.5}, "--memory-gb is 0.5; it has to be at least 1"),
        ({"examples": -1}, "--examples is -1; it has to be at least 0"),
        ({"timeout": 0.0}, "--timeout is 0; it has to be more than 0 seconds"),
        ({"size": 16}, "--size is 16; slices under 32 px are left out, so it has to be at least 32"),
        ({"planes": ("axial", "oblique")}, "--planes names 'oblique'; there are axial, coronal, sagittal"),
        (
            {"validation": 0.6, "test": 0.4},
            "--validation 0.6 and --test 0.4 have to be at least 0 and together under 1",
        ),
        ({"test": -0.1}, "--validation 0.05 and --test -0.1 have to be at least 0"),
        ({"validation": float("nan")}, "--validation nan and --test 0.05 have to be at least 0"),
        ({"name": "a/b"}, "--name is 'a/b'; TFDS takes letters, digits and underscores, a letter first"),
        ({"name": "1a"}, "--name is '1a'; TFDS takes letters"),
        ({"label_columns": ("a",)}, "--label-columns needs --labels=CSV"),
        ({"split_column": "a"}, "--split-column needs --labels=CSV"),
        ({"patient_column": "a"}, "--patient-column needs --labels=CSV"),
        ({"modality_column": "a"}, "--modality-column needs --labels=CSV"),
        ({"beam_options": "--runner=FlinkRunner"}, "--beam-options needs --runner=beam"),
    ],
)
def test_options_that_do_not_go_are_named_as_typed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        pipeline.Options(**{"input": ["in"], "output": "out", **options})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_card_shows_the_options_that_change_slices(tmp_path: Path, build: Build) -> None:
    pictures(tmp_path / "in", 2)
    made = build(modality="MR", size=64, planes=("axial", "coronal"), drop_faces=False, validation=0.0)
    wanted = {
        "modality": "MR", "size": 64, "slices_per_record": 1, "validation": 0.0, "test": 0.05, "planes": "axial, coronal",
        "drop_faces": False, "drop_lossy": False,
    }  # fmt: skip
    assert wanted.items() <= made["settings"].items()


# ---- outputs that are in the way


def test_foreign_output_folder_is_rejected_unchanged(tmp_path: Path, build: Build, contents) -> None:
    pictures(tmp_path / "in", 1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    for output, message in (
        (foreign, f"{foreign} is not empty and holds no build; choose an empty or new --output"),
        (foreign / "thesis.tex", "is not empty and holds no build"),
        (foreign / "thesis.tex" / "below", "cannot be made .Not a directory."),
    ):
        with pytest.raises(UserError, match=message):
            build(output=str(output))
        assert contents(foreign) == {"thesis.tex": b"precious"}


def test_finished_dataset_rejects_other_settings_unchanged(tmp_path: Path, build: Build, contents) -> None:
    pictures(tmp_path / "in", 3)
    build()
    before = contents(tmp_path / "out")
    pictures(tmp_path / "in", 4)
    (tmp_path / "other.key").write_text("another key that everybody may know")
    for options, message in (
        ({"size": 32}, "of other settings: --size was None and is 32; exams are added with the same ones"),
        ({"slices_per_record": 4, "test": 0.5}, "--test was 0.05 and is 0.5; --slices-per-record was 1 and is 4"),
        ({"drop_lossy": True}, "--drop-lossy was not given and is given"),
        ({"drop_faces": True}, "--drop-faces was not given and is given"),
        ({"key_file": str(tmp_path / "other.key")}, "was built with another key; name that one with --key-file"),
    ):
        with pytest.raises(UserError, match=message):
            build(**options)
        assert contents(tmp_path / "out") == before


def test_dataset_of_another_format_is_rejected_unchanged(tmp_path: Path, build: Build, contents) -> None:
    pictures(tmp_path / "in", 3)
    build()
    plan = tmp_path / "out" / ".build" / "addition-00000" / "plan.json"
    text = plan.read_text()
    plan.write_text(text.replace('"format": 3', '"format": 2'))
    assert plan.read_text() != text
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="a finished dataset of another version of this software"):
        build()
    assert contents(tmp_path / "out") == before


def test_unfinished_build_of_other_inputs_is_replaced(tmp_path: Path, build: Build, contents, monkeypatch) -> None:
    pictures(tmp_path / "in", 3)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "commit", lambda *unused: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build()
    assert len(list((tmp_path / "out").glob("*array_record*"))) > 1
    pictures(tmp_path / "in", 9)
    build()
    build(output=str(tmp_path / "fresh"))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_output_and_key_inside_the_input_are_not_read(tmp_path: Path, build: Build, manifest) -> None:
    pictures(tmp_path, 2)
    for _ in range(2):  # the key that the first makes beside its output is not an input of the second
        build(input=[str(tmp_path)], key_file=None)
    assert (tmp_path / "out.key").exists()
    assert sorted(manifest(tmp_path / "out")) == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


def test_returned_card_is_that_of_the_dataset(tmp_path: Path, build: Build) -> None:
    pictures(tmp_path / "in", 4)
    made = build(validation=0.0, test=0.0)
    assert (made["slices"], made["patients_by_split"]["train"]) == (4, 4)
    assert len(pq.read_table(tmp_path / "out" / shards.INDEX)) == 4
    assert build(validation=0.0, test=0.0) == made  # with nothing new
