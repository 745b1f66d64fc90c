"""Work directories in folders and in buckets."""

import time
from pathlib import Path

import pytest
from etils import epath

from curia_common.errors import UserError
from curia_jax import storage


def test_root_of_a_folder_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(storage.root("runs/first")) == f"{tmp_path}/runs/first"
    assert not storage.is_bucket(storage.root("runs/first"))


@pytest.mark.parametrize("place", ["s3://bucket/run", "https://host/run", "az://bucket/run"])
def test_root_refuses_addresses_that_runs_cannot_use(place: str) -> None:
    with pytest.raises(UserError, match=f"{place} is an address that runs cannot use: they take folders and gs://"):
        storage.root(place)


def test_files_are_listed_below_a_folder_and_replaced_in_one_step(tmp_path: Path) -> None:
    folder = epath.Path(tmp_path)
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/2", "b/1", "a"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in storage.files(folder)] == ["a", "b/1", "b/c/2"]
    storage.write_text(folder / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(list(storage.files(folder))) == 3


def test_spool_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    spool = storage.Spool(str(tmp_path), ["metrics.jsonl"])
    assert spool.folder == tmp_path
    spool.close()
    assert tmp_path.is_dir()


@pytest.mark.bucket
def test_files_in_a_bucket_are_as_in_a_folder(bucket: str) -> None:
    folder = storage.check_writable(f"{bucket}/")
    assert not folder.exists()  # the probe is gone
    for name in ("b/c/2", "b/1", "a"):
        (folder / name).write_text("x")
    storage.write_text(folder / "a", "new")
    assert [(file.name, str(file.path)) for file in storage.files(folder)][1:] == [
        ("b/1", f"{bucket}/b/1"), ("b/c/2", f"{bucket}/b/c/2"),
    ]  # fmt: skip
    assert (folder / "a").read_text() == "new"
    storage.remove(folder / "b")
    storage.remove(folder / "b")
    assert [file.name for file in storage.files(folder)] == ["a"]


@pytest.mark.bucket
def test_bucket_that_does_not_exist_is_one_line(bucket: str) -> None:
    with pytest.raises(
        UserError, match="cannot write to the work directory gs://nowhere/run .*is there such a bucket"
    ) as error:
        storage.check_writable("gs://nowhere/run")
    assert "\n" not in str(error.value)


@pytest.mark.bucket
def test_spool_appends_to_the_files_of_an_earlier_start(bucket: str) -> None:
    for start in ("first", "second"):
        spool = storage.Spool(bucket, ["metrics.jsonl", "logs/host-0.log"])
        for name in ("metrics.jsonl", "logs/host-0.log", f"tensorboard/{start}"):
            (spool.folder / name).parent.mkdir(exist_ok=True)
            with (spool.folder / name).open("a") as file:
                file.write(f"{start}\n")
        spool.close()
        assert not spool.folder.exists()
    found = {file.name: file.path.read_text() for file in storage.files(storage.root(bucket))}
    both = "first\nsecond\n"
    assert found == {
        "metrics.jsonl": both, "logs/host-0.log": both, "tensorboard/first": "first\n", "tensorboard/second": "second\n",
    }  # fmt: skip


@pytest.mark.bucket
def test_spool_uploads_while_the_run_continues(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHORTEST", 0.1)
    spool = storage.Spool(bucket)
    metrics, deadline = storage.root(bucket) / "metrics.jsonl", time.monotonic() + 60
    for text in ("a\n", "a\nb\n"):
        (spool.folder / "metrics.jsonl").write_text(text)
        while not (metrics.exists() and metrics.read_text() == text):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    spool.close()


@pytest.mark.bucket
def test_spool_that_cannot_upload_warns_once_and_keeps_the_files(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(storage.logger, "warning", warnings.append)
    spool = storage.Spool(bucket)
    monkeypatch.setattr(type(storage.root(bucket)), "write_bytes", lambda *unused: 1 / 0)
    (spool.folder / "metrics.jsonl").write_text("a\n")
    spool.upload()
    spool.close()
    assert len(warnings) == 1 and "cannot upload logs to" in warnings[0]
    assert (spool.folder / "metrics.jsonl").read_text() == "a\n"
