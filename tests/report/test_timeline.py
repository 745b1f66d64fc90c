"""The record of what was run."""

import dataclasses
import json
from pathlib import Path

import pytest

from curia_common.errors import DataError, UserError
from curia_jax.report import timeline
from curia_jax.report.timeline import Stage, Timeline

STORY = Timeline(
    data="exams", cores=4, peak_bytes=5_000_000_000,
    stages={
        "build": Stage("0a", True, 61.5, "exams to slice shards", ("python -m data_pipeline.build", "--input exams")),
        "pretrain": Stage("1b", False, 8.0, "pretraining"),
    },
    not_probed={"plane": "every slice is of class 'axial'"},
    next=(("watch the curves", ("tensorboard", "--logdir=run")),),
)  # fmt: skip


def test_written_timeline_is_read_back(tmp_path: Path) -> None:
    for story in (STORY, Timeline(data=None, cores=1)):
        story.write(tmp_path / "demo.json")
        assert timeline.read(tmp_path / "demo.json") == story
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_failed_write_keeps_the_old_timeline(tmp_path: Path, monkeypatch) -> None:
    STORY.write(tmp_path / "demo.json")

    def full(*unused: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timeline.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        Timeline(data=None, cores=1).write(tmp_path / "demo.json")
    assert timeline.read(tmp_path / "demo.json") == STORY


def test_stage_is_added_at_the_end_replaced_in_place_or_removed() -> None:
    convert = Stage("2c", True, 5.0, "conversion")
    longer = STORY.with_stage("convert", convert)
    assert list(longer.stages) == ["build", "pretrain", "convert"]
    again = longer.with_stage("build", convert)
    assert list(again.stages) == ["build", "pretrain", "convert"] and again.stages["build"] == convert
    assert list(longer.with_stage("pretrain", None).stages) == ["build", "convert"]
    assert STORY.with_stage("unknown", None) == STORY
    assert list(STORY.stages) == ["build", "pretrain"]


def test_seconds_are_those_of_all_stages() -> None:
    assert STORY.seconds == 69.5


def test_missing_timeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no file {tmp_path / 'demo.json'}"):
        timeline.read(tmp_path / "demo.json")


WHOLE = json.loads(json.dumps(dataclasses.asdict(STORY)))


@pytest.mark.parametrize(
    "text",
    [
        "[{",
        "[]",
        "{}",
        json.dumps({**WHOLE, "stages": {"build": {"title": "x"}}}),
        json.dumps({**WHOLE, "next": [["one word"]]}),
    ],
    ids=["torn", "a list", "empty", "half a stage", "half a command"],
)
def test_other_file_is_a_data_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(DataError, match="demo.json is not the record that curia_jax.demo writes"):
        timeline.read(tmp_path / "demo.json")
