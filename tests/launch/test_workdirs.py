"""What a launcher sees in a work directory: in a folder and in a bucket, by the names that training uses."""

from pathlib import Path

import pytest

from curia_common.errors import StorageError
from curia_jax import checkpoint, storage, telemetry, workdir
from launch import workdirs


def test_names_are_those_of_training() -> None:
    assert (workdirs.CHECKPOINTS, workdirs.MARKER) == (checkpoint.FOLDER, checkpoint.COMMITTED)
    assert (workdirs.CONFIG, workdirs.EVENTS, workdirs.SCHEME) == (workdir.CONFIG, telemetry.EVENTS, storage.SCHEME)


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.bucket)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else request.getfixturevalue("bucket")


def test_newest_checkpoint_is_the_last_one_that_was_finished(place: str) -> None:
    assert workdirs.newest_checkpoint(place) is None
    folder = storage.root(place) / workdirs.CHECKPOINTS
    for name in (
        "4/commit_success.txt",
        "12/commit_success.txt",
        "16/data",
        "20.orbax-checkpoint-tmp/commit_success.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert workdirs.newest_checkpoint(place) == 12
    (folder / "16/commit_success.txt").write_text("x")  # no listing is kept from the look before
    assert workdirs.newest_checkpoint(place) == 16


def test_file_of_a_work_directory_is_read_or_absent(place: str) -> None:
    assert workdirs.read(place, "config.json") is None
    storage.root(place).mkdir(parents=True, exist_ok=True)
    (storage.root(place) / "config.json").write_text('{"seed": 1}')
    assert workdirs.read(place, "config.json") == '{"seed": 1}'


def test_no_work_directory_has_no_checkpoint() -> None:
    assert workdirs.newest_checkpoint(None) is None


@pytest.mark.bucket
def test_bucket_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def __init__(self, **options: object) -> None:
            pass

        def glob(self, pattern: str, timeout: int) -> list[str]:
            raise OSError(f"Forbidden: 403 for {pattern}\nmore")

    monkeypatch.setattr("gcsfs.GCSFileSystem", Closed)
    asked = "gs://b/run/checkpoints/[*]/commit_success.txt"
    with pytest.raises(
        StorageError, match=rf"cannot look into gs://b/run [(]Forbidden: 403 for {asked}[)]; is there such a bucket"
    ):
        workdirs.newest_checkpoint("gs://b/run")
