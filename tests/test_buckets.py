"""A whole run whose work directory is in a bucket, and the faults that are particular to buckets."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from curia_common import signals
from curia_common.errors import RestartError
from curia_jax import checkpoint, doctor, lease, profiling, saving, sharding, storage, telemetry, training
from curia_jax.convert import __main__ as convert
from curia_jax.evaluate import backbones
from curia_jax.report import run_log
from tests import runs, test_lease

pytestmark = pytest.mark.bucket


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_run_in_a_bucket_stops_resumes_and_ends_as_in_a_folder(
    bucket: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(tmp_path / "folder", tiny_shards).exit_code == 0
    assert runs.train(bucket, tiny_shards, stop_at=3).exit_code == 75  # type: ignore[arg-type]
    assert doctor.examine(bucket)[0].state == "stopped"
    assert runs.train(bucket, tiny_shards).exit_code == 0  # type: ignore[arg-type]

    ours, theirs = (checkpoint.load(place) for place in (str(tmp_path / "folder"), bucket))
    assert (ours.step, ours.examples_seen) == (theirs.step, theirs.examples_seen) == (6, 96)
    found = sharding.paths(theirs.params)
    assert all(np.array_equal(leaf, found[path]) for path, leaf in sharding.paths(ours.params).items())
    rows = run_log.read(bucket).metrics
    assert {row.step: row.loss for row in rows} == runs.losses(tmp_path / "folder")
    assert [event["event"] for event in telemetry.events(bucket) if event["event"] != "saved"] == [
        "started", "preempted", "resumed", "finished",
    ]  # fmt: skip
    names = {file.name.split("/")[0] for file in storage.files(storage.root(bucket))}
    assert names == {path.name for path in (tmp_path / "folder").iterdir() if not path.name.startswith(".")}

    examined, spent = doctor.examine(bucket)
    assert (examined.state, examined.steps, examined.torn, examined.owner) == ("finished", 6, {}, None)
    assert examined.goodput is not None and spent is not None
    backbones.check([bucket])  # as evaluate does before it opens them
    assert backbones.open_backbones([bucket], (), readouts=[])[0].provenance.step == 6
    words = [f"--checkpoint={bucket}", f"--output={tmp_path / 'weights'}", "--layout=vit"]
    assert convert.main([*words, f"--json={tmp_path / 'weights.json'}"]) == 0
    assert json.loads((tmp_path / "weights.json").read_text())["step"] == 6


def _save(workdir: str, *steps: int) -> None:
    saver = saving.Checkpointer(workdir, keep=2)
    for step in steps:
        state = {"step": jnp.int32(step), "params": {"kernel": jnp.arange(4000.0) + step}}
        saver.save(step, state, checkpoint.Meta({"seed": 0}, 8 * step))
    saver.close()
    assert [ended.problem for ended in saver.ended()] == [None] * len(steps)


def test_checkpoints_in_a_bucket_are_kept_checked_and_loaded(bucket: str) -> None:
    _save(bucket, 2, 4, 6)
    assert [(verdict.path, verdict.problem, verdict.checked) for verdict in checkpoint.examine(bucket)] == [
        (f"{bucket}/checkpoints/{step}", None, True) for step in (6, 4)
    ]
    for place in (bucket, f"{bucket}/checkpoints", f"{bucket}/checkpoints/6"):
        assert np.array_equal(checkpoint.load(place).params["kernel"], np.arange(4000.0, dtype=np.float32) + 6)


def test_checkpoint_without_its_marker_is_passed_over_and_removed(bucket: str) -> None:
    """As a run leaves it that is killed between the data and the marker."""
    _save(bucket, 2, 4)
    (storage.root(bucket) / "checkpoints/4" / checkpoint.COMMITTED).unlink()
    assert checkpoint.load(bucket).step == 2
    newest = checkpoint.latest(bucket)
    assert newest is not None and newest[0] == 2
    assert [verdict.problem for verdict in checkpoint.examine(bucket)] == [None, "it was not finished"]
    _save(bucket, 6)
    assert sorted(path.name for path in (storage.root(bucket) / "checkpoints").iterdir()) == ["2", "6"]


def test_damaged_checkpoint_in_a_bucket_is_passed_over(bucket: str) -> None:
    _save(bucket, 2, 4)
    folder = storage.root(bucket) / "checkpoints/4"
    largest = max(storage.files(folder), key=lambda file: file.path.stat().length or 0).path
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    assert checkpoint.load(bucket).step == 2
    assert "has other bytes than were saved" in str(checkpoint.examine(bucket)[0].problem)


def test_second_run_in_a_bucket_is_refused_until_the_first_is_dead(bucket: str, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", test_lease.HOLDER, bucket, "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        test_lease.wait_until_held(holder)
        with (
            pytest.raises(RestartError, match=rf"{bucket} is in use by process {holder.pid} on "),
            lease.holding(bucket),
        ):
            pytest.fail("both hold it")
    finally:
        holder.kill()
        holder.wait()
    assert lease.owner(bucket) is None
    with lease.holding(bucket):
        assert json.loads((storage.root(bucket) / lease.FILE).read_text())["process"] == os.getpid()
    assert not (storage.root(bucket) / lease.FILE).exists()


@pytest.mark.long
def test_of_many_runs_that_start_together_in_a_bucket_one_wins(bucket: str) -> None:
    test_lease.assert_one_wins(bucket)


@pytest.mark.usefixtures("one_device")
def test_new_run_needs_an_empty_place_in_the_bucket(bucket: str, tiny_shards: Path) -> None:
    (storage.root(bucket) / "somebody's.txt").write_text("x")
    with pytest.raises(Exception, match="is not empty and not the work directory of a run"):
        runs.prepare(bucket, tiny_shards)  # type: ignore[arg-type]


def test_profile_is_requested_by_an_object(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "BUCKET_POLL_SECONDS", 0.05)
    request = storage.root(bucket) / profiling.REQUEST
    with profiling.Profiler(bucket, signals.Received(threaded=False), tmp_path) as profiler:
        request.write_text("3")
        step, deadline = 0, time.monotonic() + 60
        while not list(tmp_path.rglob("*.xplane.pb")) and time.monotonic() < deadline:
            step += 1
            profiler.follow(training.Report(step, {}, 0.0, 0.0))
            time.sleep(0.01)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.is_relative_to(tmp_path / profiling.FOLDER / f"step-{step - 2}" / "host-0") and not request.exists()
