"""Which places can be the work directory of a run."""

from pathlib import Path

import pytest

from curia_common.errors import UserError
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
