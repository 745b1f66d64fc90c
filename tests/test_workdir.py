"""Which places can be the work directory of a run."""

from pathlib import Path

import pytest

from curia_common.errors import DataError, UserError
from curia_jax import storage, workdir


def test_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    workdir.check(str(tmp_path / "a" / "run"))
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=f"cannot write to the work directory {tmp_path}/file/run .*; choose another --workdir"
    ):
        workdir.check(f"{tmp_path}/file/run")


@pytest.mark.bucket
def test_place_in_a_bucket_that_others_use_is_no_new_work_directory(bucket: str) -> None:
    workdir.check(bucket)
    workdir.check_new(bucket)
    (storage.root(bucket) / "somebody's.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and not the work directory of a run"):
        workdir.check_new(bucket)
    (storage.root(bucket) / workdir.CONFIG).write_text("{}")
    workdir.check_new(bucket)


def test_selected_step_is_read_from_its_file_alone(tmp_path: Path) -> None:
    assert workdir.selected(tmp_path) is None
    (tmp_path / workdir.SELECTED).write_text('{"step": 7, "validation_loss": 0.25, "key": "ab"}')
    assert workdir.selected(str(tmp_path)) == (7, 0.25, "ab")
    (tmp_path / workdir.SELECTED).write_text('{"step": "seven"}')
    with pytest.raises(DataError, match="selected.json is damaged .*; rerun curia_jax.finetune, which writes it again"):
        workdir.selected(tmp_path)
