"""Inputs in object storage, from a real server on the loopback: the same shards as from a folder, whatever fails."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curia_common.exit_codes import ExitCode
from data_pipeline.sources import archives, object_stores, retry
from data_pipeline.stages import inventory
from tests.data_pipeline.buckets import NAME, Bucket, serve
from tests.data_pipeline.packing import pack, write_dicomdir

TOP = f"s3://{NAME}"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """An empty bucket, for this process and those that it starts."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01))
    monkeypatch.setitem(object_stores.RETRIES, "max_retries", 1)
    with serve() as one:
        for name, value in one.environment.items():
            monkeypatch.setenv(name, value)
        object_stores.open_store.cache_clear()
        yield one
    object_stores.open_store.cache_clear()


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record*"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_dicom) -> Path:
    """Four patients with a series of six slices each."""
    top = tmp_path_factory.mktemp("folder") / "exams"
    for n in range(24):
        who, place = divmod(n, 6)
        write_dicom(
            top / f"p{who}" / f"{place}.dcm", PatientID=f"P{who}", SeriesInstanceUID=f"2.25.{who}00",
            ImagePositionPatient=[0, 0, 2 * place],
        )  # fmt: skip
    return top


@pytest.fixture(scope="module")
def from_folder(folder: Path, run_build) -> dict[str, bytes]:
    assert run_build("--input", folder, "--output", folder.parent / "out").code == 0
    return shards_of(folder.parent / "out")


# ---- what is read


def test_bucket_gives_the_shards_of_a_folder_byte_for_byte(
    bucket: Bucket, folder: Path, from_folder, tmp_path: Path, run_build, run_verify, manifest
) -> None:
    address = bucket.put_folder(folder, "exams")
    result = run_build("--input", address, "--output", tmp_path / "out", processes=2)
    assert result.code == 0, result.err
    assert shards_of(tmp_path / "out") == from_folder
    names = {str(path.relative_to(folder)) for path in (folder).rglob("*.dcm")}
    assert set(manifest(tmp_path / "out")) == {f"{address}/{name}" for name in names}
    assert f"inventory: {len(names)} files" in result.err
    # No copy stays on the disk.
    assert not Path(archives.folder(tmp_path / "out")).exists()
    assert run_verify(tmp_path / "out").code == 0
    # Two requests a file: the header, then all of it.
    assert len(bucket.gets()) == 2 * len(names)


def test_only_the_header_of_a_large_object_is_requested(bucket: Bucket, tmp_path: Path, write_dicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.zeros((600, 600), np.uint16))
    address = bucket.put("a.dcm", path.read_bytes())
    (found,) = object_stores.find(address)
    (entry,) = inventory.inspect(([found], inventory.Options(key=b"0" * 16)), {}, lambda item: None)
    assert (entry.fate, entry.facts.rows) == ("", 600)
    assert bucket.gets() == [(f"/{NAME}/a.dcm", "bytes=0-65535")]


def test_reader_seeks_and_reads_every_byte(bucket: Bucket) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)
    (found,) = object_stores.find(bucket.put("a", data))
    touched: list[str | None] = []
    reader = object_stores.Reader(found, touched.append, "a")
    assert reader.read() == data
    # Sequential reads request more at a time; waiting does not count against the item's time limit.
    assert len(bucket.gets()) == 4 and touched == [None, "a"] * 4
    for place in (0, 65_535, 65_536, 1_999_999, 2_999_999):
        assert reader.seek(place) == place and reader.read(1) == data[place : place + 1]
    assert reader.seek(-5, os.SEEK_END) == len(data) - 5 and reader.read(10) == data[-5:]
    assert reader.read(1) == b""


@pytest.mark.parametrize("kind", ["zip", "stored.zip", "tar", "tar.gz", "tar.zst", "tar.bz2", "tar.xz"])
def test_archives_in_a_bucket_are_read_in_place(
    bucket: Bucket, folder: Path, from_folder, tmp_path: Path, run_build, manifest, kind
) -> None:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in (folder).rglob("*.dcm")}
    address = bucket.put(f"in/exams.{kind}", pack(tmp_path / f"exams.{kind}", found).read_bytes())
    result = run_build("--input", f"{TOP}/in", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert shards_of(tmp_path / "out") == from_folder
    assert set(manifest(tmp_path / "out")) == {f"{address}!/{name}" for name in found}
    assert not Path(archives.folder(tmp_path / "out")).exists()


def test_volumes_and_pictures_are_read_from_a_bucket(bucket: Bucket, tmp_path: Path, run_build, manifest) -> None:
    values = np.random.default_rng(1).integers(0, 900, (40, 42, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 5, 1])), tmp_path / "brain.nii.gz")
    Image.fromarray(values[:, :, 0].astype(np.uint16)).save(tmp_path / "a.png")
    for name in ("brain.nii.gz", "a.png"):
        bucket.put(f"in/sub-01/{name}", (tmp_path / name).read_bytes())
    bucket.put(
        "in/head.nhdr", b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: raw\ndata file: a.raw\n\n"
    )
    bucket.put("in/notes.txt", b"x")
    bucket.put("in/empty.dcm", b"")
    assert run_build("--input", f"{TOP}/in", "--output", tmp_path / "out").code == 0
    rows = manifest(tmp_path / "out")
    told = {path.rsplit("/", 1)[1]: (row["fate"], row["reason"]) for path, row in rows.items()}
    assert told["brain.nii.gz"] == told["a.png"] == ("kept", "")
    assert (
        "its data file is missing; one beside a header in an archive or a bucket is not read either"
        in told["head.nhdr"][1]
    )
    assert told["notes.txt"] == ("excluded", inventory.NO_IMAGE) and told["empty.dcm"] == ("quarantined", "empty file")


def test_listing_skips_hidden_names_and_folder_markers(bucket: Bucket) -> None:
    for key in ("in/a.dcm", "in/b c#%20ü.dcm", "in/.hidden", "in/.git/x", "inside/x", ".top/in/x"):
        bucket.put(key, b"x")
    bucket.put("in/sub/", b"")
    bucket.put("in/sub/d.dcm", b"x")
    wanted = [f"{TOP}/in/{name}" for name in ("a.dcm", "b c#%20ü.dcm", "sub/d.dcm")]
    for address in (f"{TOP}/in", f"{TOP}/in/", f"{TOP}/in//"[:-1]):
        assert [one.path for one in object_stores.find(address)] == wanted
    assert [one.path for one in object_stores.find(TOP)] == [*wanted, f"{TOP}/inside/x"]
    assert [one.path for one in object_stores.find(f"{TOP}/.top/in")] == [f"{TOP}/.top/in/x"]
    # One that is reached twice is taken once.
    assert [one.path for one in inventory.find_files([f"{TOP}/in", f"{TOP}/in/a.dcm"])] == wanted
    for one in object_stores.find(f"{TOP}/in"):
        assert object_stores.Reader(one, lambda item: None, "").read() == b"x"


def test_dicomdir_in_a_bucket_is_a_file_like_others(
    bucket: Bucket, tmp_path: Path, write_dicom, run_build, manifest
) -> None:
    bucket.put("cd/IM1", write_dicom(tmp_path / "IM1").read_bytes())
    bucket.put("cd/DICOMDIR", write_dicomdir(tmp_path / "DICOMDIR", [["IM1"]]).read_bytes())
    assert run_build("--input", f"{TOP}/cd", "--output", tmp_path / "out").code == 0
    rows = manifest(tmp_path / "out")
    assert rows[f"{TOP}/cd/IM1"]["fate"] == "kept"
    assert rows[f"{TOP}/cd/DICOMDIR"]["reason"] == "an index of DICOM files (DICOMDIR)"
    result = run_build("--input", f"{TOP}/cd/DICOMDIR", "--output", tmp_path / "other")
    assert result.code == 2 and "name its folder instead" in result.error


def test_google_cloud_storage_is_read_by_its_xml_interface(
    bucket: Bucket, folder: Path, from_folder, tmp_path: Path, run_build, manifest, monkeypatch
) -> None:
    bucket.put_folder(folder, "exams")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket.environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    result = run_build("--input", f"gs://{NAME}/exams", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert shards_of(tmp_path / "out") == from_folder
    assert all(path.startswith(f"gs://{NAME}/exams/") for path in manifest(tmp_path / "out"))


def test_public_bucket_is_read_with_skip_signature(
    bucket: Bucket, tmp_path: Path, write_dicom, run_build, manifest, monkeypatch
) -> None:
    bucket.put("in/open.dcm", write_dicom(tmp_path / "open.dcm").read_bytes())
    bucket.put("in/closed.dcm", write_dicom(tmp_path / "closed.dcm").read_bytes(), acl="private")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert run_build("--input", f"{TOP}/in", "--output", tmp_path / "out").code == 0
    told = {path.rsplit("/", 1)[1]: row for path, row in manifest(tmp_path / "out").items()}
    assert told["open.dcm"]["fate"] == "kept"
    assert told["closed.dcm"]["fate"] == "quarantined"
    assert told["closed.dcm"]["reason"] == "cannot be read: Permission denied"


@pytest.mark.slow
def test_real_exams_from_a_bucket_equal_those_from_a_folder(
    bucket: Bucket, real_data: Path, tmp_path: Path, run_build, manifest
) -> None:
    bucket.put_folder(real_data / "dicom", "in/dicom")
    assert run_build("--input", f"{TOP}/in/dicom", "--output", tmp_path / "bucket", processes=2).code == 0
    assert run_build("--input", real_data / "dicom", "--output", tmp_path / "folder", processes=2).code == 0
    assert shards_of(tmp_path / "bucket") == shards_of(tmp_path / "folder")
    told = [
        {path.removeprefix(top): row | {"path": ""} for path, row in manifest(tmp_path / name).items()}
        for name, top in (("bucket", f"{TOP}/in"), ("folder", str(real_data)))
    ]
    assert told[0] == told[1]


# ---- what others need of an address


def test_label_table_and_holdout_take_addresses(
    bucket: Bucket, folder: Path, tmp_path: Path, run_build, run_verify, manifest, key_file
) -> None:
    address = bucket.put_folder(folder, "exams")
    packed = {f"x/{n}.dcm": path.read_bytes() for n, path in enumerate(sorted((folder / "p1").iterdir()))}
    bucket.put("exams/more.zip", pack(tmp_path / "more.zip", packed).read_bytes())
    (tmp_path / "out.txt").write_text(f"{address}/p2\n{address}/p3/\n{address}/more.zip!/x\n")
    lines = [f"{address}/p{n}/{i}.dcm,{n}" for n in range(4) for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,grade", *lines]) + "\n")
    words = ("--output", tmp_path / "out", "--holdout", tmp_path / "out.txt", "--labels", tmp_path / "labels.csv")
    result = run_build("--input", address, *words, "--label-columns", "grade")
    assert result.code == 0, result.err
    assert "held out: 3 of 3 lines name a patient of these inputs" in result.err
    rows = manifest(tmp_path / "out")
    out = {path.split("/")[4] for path, row in rows.items() if row["reason"] == "patient is held out"}
    assert out == {"p1", "p2", "p3", "more.zip!"}
    assert pq.read_table(tmp_path / "out" / "index.parquet")["label_grade"].to_pylist() == [0] * 6
    proof = run_verify(tmp_path / "out", "--holdout", tmp_path / "out.txt", "--key-file", key_file)
    assert proof.code == 0, proof.err
    (tmp_path / "kept.txt").write_text(f"{address}/p0\n")
    assert run_verify(tmp_path / "out", "--holdout", tmp_path / "kept.txt", "--key-file", key_file).code != 0


def test_changed_objects_are_recognized_by_etag(
    bucket: Bucket, folder: Path, tmp_path: Path, run_build, contents
) -> None:
    address = bucket.put_folder(folder / "p0", "exams")
    words = ("--input", address, "--output", tmp_path / "out")
    assert run_build(*words).code == 0
    before = contents(tmp_path / "out")
    asked = len(bucket.gets())
    result = run_build(*words)
    assert result.code == 0 and "nothing new" in result.err and len(bucket.gets()) == asked
    bucket.put_folder(folder / "p1", "exams/more")
    assert run_build(*words).code == 0
    after = contents(tmp_path / "out")
    assert all(
        after[name] == data for name, data in before.items() if ".array_record" in name and not name.startswith(".")
    )
    bucket.put("exams/0.dcm", (folder / "p1" / "0.dcm").read_bytes())
    result = run_build(*words)
    assert result.code == ExitCode.DATA and "in the dataset already has changed since" in result.error


# ---- interruptions


def test_killed_build_resumes_to_the_same_bytes(
    bucket: Bucket, folder: Path, tmp_path: Path, run_build, start_build
) -> None:
    address = bucket.put_folder(folder, "exams")
    words = ("--input", address, "--output", tmp_path / "out", "--workers", 1, "--scratch", tmp_path / "scratch")
    running = start_build(*words, trouble={"*": 0.05})
    done = running.wait_for_shards(1)
    running.stop(signal.SIGKILL)
    asked = len(bucket.gets())
    result = run_build(*words[:4], "--scratch", tmp_path / "scratch")
    assert result.code == 0, result.err
    # Headers again, and the pixels of those shards alone that were not finished.
    assert 24 < len(bucket.gets()) - asked <= 24 + 24 - 6 * len(done)
    assert run_build("--input", folder, "--output", tmp_path / "wanted").code == 0
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "wanted")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_object_replaced_during_the_build_stops_it(bucket: Bucket, folder: Path, tmp_path: Path, run_build) -> None:
    address = bucket.put_folder(folder, "exams")
    data = (folder / "p0" / "0.dcm").read_bytes()
    other = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]  # of the same length

    def replace(method: str, path: str) -> int:
        # Between its header and its pixels.
        if path.endswith("/p0/0.dcm") and sum(one == path for one, _ in bucket.gets()) == 2:
            bucket.fault = lambda method, path: 0
            bucket.put("exams/p0/0.dcm", other)
        return 0

    bucket.fault = replace
    result = run_build("--input", address, "--output", tmp_path / "out", processes=2)
    assert result.code == ExitCode.DATA and "an input changed while the build ran" in result.error
    named = tmp_path / "out" / ".build" / "failed_on.txt"
    assert named.read_text() == f"{address}/p0/0.dcm\n" and stat.S_IMODE(named.stat().st_mode) == 0o600
    assert not (tmp_path / "out" / "shards.parquet").exists()
    assert run_build("--input", address, "--output", tmp_path / "out").code == 0


def test_object_deleted_during_the_build_stops_it(bucket: Bucket, folder: Path, tmp_path: Path, run_build) -> None:
    address = bucket.put_folder(folder, "exams")
    asked = {"count": 0}

    def gone(method: str, path: str) -> int:
        asked["count"] += path.endswith("/p0/0.dcm")
        return 404 if path.endswith("/p0/0.dcm") and asked["count"] > 1 else 0

    bucket.fault = gone
    result = run_build("--input", address, "--output", tmp_path / "out")
    assert result.code == ExitCode.RESTART and "an input can no longer be read" in result.error


def test_transient_errors_of_the_store_lose_no_file(
    bucket: Bucket, folder: Path, tmp_path: Path, run_build, manifest
) -> None:
    address = bucket.put_folder(folder, "exams")
    failed: dict[str, int] = {}

    def often(method: str, path: str) -> int:
        # Every object fails three times, more often than a single request is sent.
        failed[path] = failed.get(path, 0) + 1
        return 503 if path.endswith(".dcm") and failed[path] <= 3 else 0

    bucket.fault = often
    result = run_build("--input", address, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert {row["fate"] for row in manifest(tmp_path / "out").values()} == {"kept"}


def test_lasting_errors_of_the_store_stop_the_build(bucket: Bucket, folder: Path, tmp_path: Path, run_build) -> None:
    address = bucket.put_folder(folder, "exams")
    bucket.fault = lambda method, path: 503 if path.endswith("/p3/3.dcm") and len(bucket.gets()) > 24 else 0
    result = run_build("--input", address, "--output", tmp_path / "out")
    assert result.code == ExitCode.RESTART
    assert "an input cannot be read, tried 3 times (the object storage answers 503" in result.error
    assert "/p3/" not in result.err  # a name can be in it
    bucket.fault = lambda method, path: 0
    assert run_build("--input", address, "--output", tmp_path / "out").code == 0
    assert run_build("--input", folder, "--output", tmp_path / "wanted").code == 0
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "wanted")


@pytest.mark.long
def test_beam_runner_reads_buckets(bucket: Bucket, folder: Path, from_folder, tmp_path: Path, run_build) -> None:
    address = bucket.put_folder(folder, "exams")
    result = run_build("--input", address, "--output", tmp_path / "out", "--runner=beam", processes=2)
    assert result.code == 0, result.err
    assert shards_of(tmp_path / "out") == from_folder


# ---- what cannot be


@pytest.mark.parametrize(
    "address, said",
    [
        ("s3://nobody1/exams", "no such input: s3://nobody1/exams; there is no bucket of this name"),
        (f"{TOP}/none", f"no such input: {TOP}/none; there is no object under this address"),
        (TOP, f"no such input: {TOP}; there is no object under this address"),
        ("s3://", "an address is s3://bucket/folder"),
        ("s3://me:secret@bucket/x", "an address is s3://bucket/folder, without credentials in it"),
        ("az://container/x", "mount it (blobfuse2"),
        (f"{TOP}/a//b", "is not a path"),
    ],
)
def test_address_without_objects_is_one_line(bucket: Bucket, tmp_path: Path, run_build, address, said) -> None:
    result = run_build("--input", address, "--output", tmp_path / "out")
    assert result.code == 2 and said in result.error and "secret" not in result.error
    assert not (tmp_path / "out").exists()


def test_object_name_that_is_no_path_is_an_error(bucket: Bucket, tmp_path: Path, run_build) -> None:
    bucket.put("in/a.dcm", b"x")
    bucket.put("in//b.dcm", b"x")
    result = run_build("--input", f"{TOP}/in", "--output", tmp_path / "out")
    assert result.code == 2 and "a name in it is not a path (it has //, /./ or /../ in it)" in result.error


@pytest.mark.parametrize(
    "status, code, said",
    [
        (403, ExitCode.USAGE, "no permission to list it"),
        (503, ExitCode.RESTART, "the object storage answers 503"),
        (301, ExitCode.USAGE, "in another region; name it in AWS_REGION"),
    ],
)
def test_bucket_that_cannot_be_listed_says_why(bucket: Bucket, tmp_path: Path, run_build, status, code, said) -> None:
    bucket.fault = lambda method, path: status
    result = run_build("--input", f"{TOP}/exams", "--output", tmp_path / "out")
    assert result.code == code and said in result.error


def test_unreachable_store_says_so(bucket: Bucket, tmp_path: Path, run_build, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    result = run_build("--input", f"{TOP}/exams", "--output", tmp_path / "out")
    assert result.code == ExitCode.RESTART and "the object storage cannot be reached" in result.error


def test_missing_credentials_say_where_to_get_them(bucket: Bucket, tmp_path: Path, run_build, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    result = run_build("--input", f"{TOP}/exams", "--output", tmp_path / "out")
    assert result.code == 2 and "no credentials are found" in result.error and "AWS_SKIP_SIGNATURE" in result.error


def test_missing_cloud_extra_is_named(tmp_path: Path, run_build, monkeypatch) -> None:
    object_stores.open_store.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    result = run_build("--input", "s3://bucket1/exams", "--output", tmp_path / "out")
    assert result.code == 2 and "pip install 'curia-jax[ingest,cloud]'" in result.error


def test_output_in_a_bucket_is_refused(tmp_path: Path, folder: Path, run_build) -> None:
    result = run_build("--input", folder, "--output", f"{TOP}/out")
    assert result.code == 2 and "--output" in result.error and "mount it (mount-s3" in result.error


def test_build_imports_no_cloud_client() -> None:
    code = "import sys, data_pipeline.build; print([m for m in ('obstore', 'boto3') if m in sys.modules])"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) == []


# ---- storage of files that fails


@pytest.mark.parametrize("number, kept", [(2, True), (99, False)])
def test_transient_disk_errors_lose_no_file(
    tmp_path: Path, write_series, run_build, manifest, monkeypatch, number, kept
) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01))
    write_series(tmp_path / "in")
    opened, failed = open, [0]

    def failing(path, *words, **named):
        if str(path).endswith("003.dcm"):
            failed[0] += 1
            if failed[0] <= number:
                raise OSError(5, "Input/output error")
        return opened(path, *words, **named)

    monkeypatch.setattr(archives, "open", failing, raising=False)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out")
    if kept:
        assert result.code == 0, result.err
        assert {row["fate"] for row in manifest(tmp_path / "out").values()} == {"kept"}
    else:
        assert result.code == ExitCode.RESTART
        assert "an input cannot be read, tried 3 times (Input/output error); rerun the same command" in result.error
        monkeypatch.undo()
        assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out").code == 0


def test_transient_listing_error_stops_the_build(tmp_path: Path, write_series, run_build, monkeypatch) -> None:
    write_series(tmp_path / "in" / "sub")
    scan = os.scandir

    def failing(path):
        if str(path).endswith("sub"):
            raise OSError(116, "Stale file handle", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (
        result.code == ExitCode.RESTART
        and "a folder of the inputs cannot be listed (Stale file handle)" in result.error
    )
