"""Setup that both stages share: a run resumes exactly, and knows the dataset that it was trained on."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError, DivergedError, UserError
from curia_jax import checkpoint, data, order, run, saving, sharding, training
from curia_jax import config as configs
from curia_jax.mixture import Mixture
from curia_jax.objectives import mae
from data_pipeline.format import shards as shard_files
from data_pipeline.format.shards import SliceSource

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def grown(tiny_shards: Path, tmp_path: Path) -> Path:
    """tiny_shards after an addition of 48 slices (those of its first build again)."""
    folder = tmp_path / "grown"
    shutil.copytree(tiny_shards, folder)
    table = pq.read_table(folder / shard_files.SHARDS)
    rows = table.to_pylist()
    for number, row in enumerate(table.to_pylist(), start=len(rows)):
        name = shard_files.file_name(row["file"].split("-")[0], row["split"], number)
        shutil.copy(folder / row["file"], folder / name)
        rows.append({**row, "file": name, "addition": 1})
    metadata = table.schema.metadata | {shard_files.COUNT: str(len(rows)).encode()}
    grown_table = pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(metadata)
    pq.write_table(grown_table, folder / shard_files.SHARDS)
    return folder


def prepare(workdir: Path, shards: Path | str, *words: str) -> run.Run:
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={shards}", *words])
    return run.prepare(config, str(workdir), run.open_shards)


def save_meta(workdir: Path, meta: checkpoint.Meta, step: int = 2) -> None:
    checkpointer = saving.Checkpointer(str(workdir))
    checkpointer.save(step, {"step": jnp.int32(step)}, meta)
    checkpointer.close()


def first_slices(this: run.Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slice numbers of the next batch."""
    monkeypatch.setattr(data, "to_devices", lambda batch, sharding: batch)
    batch: Any = next(run.batches(this))
    return batch["slice"].tolist()


def expected_slices(source: data.Slices, examples_seen: int) -> list[int]:
    return order.slice_numbers(examples_seen, 16, slices=len(source), seed=0).tolist()


# ---- the dataset of a checkpoint


def test_new_run_saves_the_identity_of_its_dataset(tiny_shards: Path, tmp_path: Path) -> None:
    meta = prepare(tmp_path / "run", tiny_shards).meta(32)
    assert meta.dataset == (SliceSource(tiny_shards, "train").fingerprint, 0, 48, "train")
    assert (meta.examples_seen, meta.dataset_start) == (32, 0)


def test_resume_on_the_same_dataset_continues_its_epoch(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", shutil.copytree(tiny_shards, tmp_path / "moved"))  # elsewhere, but the same
    assert this.schedule == training.Schedule(2, 6, batch_size=16, examples_seen=32)
    assert list(this.changes) == ["data.shards"]
    assert first_slices(this, monkeypatch) == expected_slices(this.examples.source, 32)


def test_resume_rejects_grown_dataset_and_names_both_choices(tiny_shards: Path, grown: Path, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "run", grown)
    assert error.value.exit_code == 65
    assert str(error.value) == (
        f"{grown} is not the dataset that the checkpoint of example 32 was trained on: slices 48 -> 96, additions 0 -> 1; "
        "--config.data.additions=0 trains on the same slices as before; --config.data.on_change=new_epoch starts a new epoch on "
        "the dataset as it is now"
    )


def test_resume_with_additions_trains_on_the_slices_of_then(
    tiny_shards: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", grown, "--config.data.additions=0")
    assert len(this.examples.source) == 48 and this.examples.start == 0
    assert first_slices(this, monkeypatch) == expected_slices(SliceSource(tiny_shards, "train"), 32)


def test_resume_with_new_epoch_counts_from_there(
    tiny_shards: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    this = prepare(tmp_path / "run", grown, "--config.data.on_change=new_epoch")
    assert (len(this.examples.source), this.schedule.examples_seen, this.examples.start) == (96, 32, 32)
    save_meta(tmp_path / "run", this.meta(48), step=3)
    for words in ([], ["--config.data.on_change=new_epoch"]):  # the dataset is no longer a changed one
        again = prepare(tmp_path / "run", grown, *words)
        assert (again.schedule.start_step, again.examples.start) == (3, 32)
    assert first_slices(this, monkeypatch) == expected_slices(SliceSource(grown, "train"), 0)
    assert first_slices(again, monkeypatch) == expected_slices(SliceSource(grown, "train"), 16)


# ---- mixtures


@pytest.fixture
def mixed(tiny_shards: Path, grown: Path) -> Callable[[str, str], str]:
    """The 48 slices of tiny_shards and the 96 of `grown` with two weights."""
    return lambda one, other: f"{tiny_shards}:{one},{grown}:{other}"


def test_resumed_mixture_continues_its_examples(mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this = prepare(tmp_path / "run", mixed("0.25", "0.75"))
    source = this.examples.source
    assert isinstance(source, Mixture) and len(this.examples) == len(source) == 144
    whole = source.slice_numbers(0, 48, seed=0)
    assert [int((part < 48).sum()) for part in whole.reshape(3, 16)] == [4, 4, 4]
    save_meta(tmp_path / "run", this.meta(32))
    again = prepare(tmp_path / "run", mixed("1", "3"))  # the same shares
    assert first_slices(again, monkeypatch) == whole[32:].tolist()


def test_resume_rejects_other_weights_unless_a_new_epoch_is_wanted(mixed, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", mixed("0.25", "0.75")).meta(32))
    with pytest.raises(
        DataError, match=r"of example 32 was trained on: weights of the folders 0\.25:0\.75 -> 0\.5:0\.5; "
    ):
        prepare(tmp_path / "run", mixed("0.5", "0.5"))
    this = prepare(tmp_path / "run", mixed("0.5", "0.5"), "--config.data.on_change=new_epoch")
    assert this.examples.start == 32


def test_resume_rejects_a_mixture_in_place_of_a_folder(tiny_shards: Path, mixed, tmp_path: Path) -> None:
    save_meta(tmp_path / "run", prepare(tmp_path / "run", tiny_shards).meta(32))
    with pytest.raises(DataError, match=r"slices 48 -> 144, additions 0 -> 1, weights of the folders 1 -> 0\.5:0\.5; "):
        prepare(tmp_path / "run", mixed("1", "1"))


def test_mixture_of_a_grown_folder_trains_on_the_slices_of_then(tiny_shards: Path, grown: Path, tmp_path: Path) -> None:
    before = shutil.copytree(tiny_shards, tmp_path / "before")
    save_meta(tmp_path / "run", prepare(tmp_path / "run", f"{tiny_shards}:1,{before}:1").meta(32))
    with pytest.raises(DataError, match="--config.data.additions=0 trains on the same slices as before"):
        prepare(tmp_path / "run", f"{tiny_shards}:1,{grown}:1")
    assert prepare(tmp_path / "run", f"{tiny_shards}:1,{grown}:1", "--config.data.additions=0").examples.start == 0


@pytest.mark.long
def test_resumed_training_on_a_mixture_equals_uninterrupted(mixed, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", mixed("0.25", "0.75")).exit_code == 0
    assert train(tmp_path / "broken", mixed("0.25", "0.75"), stop_at=3).exit_code == 75
    assert train(tmp_path / "broken", mixed("0.25", "0.75")).exit_code == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole, broken = (sharding.paths(checkpoint.load(str(tmp_path / n)).params) for n in ("whole", "broken"))
    assert all(np.array_equal(leaf, broken[path]) for path, leaf in whole.items())


# ---- replaced slices


def test_resume_rejects_replaced_slices(tiny_shards: Path, tmp_path: Path) -> None:
    this = prepare(tmp_path / "run", tiny_shards)
    other = this.examples.dataset._replace(fingerprint="of other shards")
    save_meta(tmp_path / "run", checkpoint.Meta(this.config, 32, other))
    message = "was trained on: the same number of slices with other contents; the slices that it was trained on are no longer there"
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "run", tiny_shards)


def test_resume_of_an_old_checkpoint_says_that_its_dataset_is_not_checked(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.logs.configure()
    save_meta(tmp_path / "run", checkpoint.Meta({"seed": 0}, 32, version=None))
    this = prepare(tmp_path / "run", grown)
    assert capsys.readouterr().err.splitlines()[-1] == "this checkpoint does not name its dataset; not checked"
    assert this.meta(48).dataset == this.examples.dataset and this.examples.start == 0


# ---- work directories without a checkpoint


def test_run_that_lost_its_checkpoints_does_not_start_again(tiny_shards: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_shards)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(DataError, match="of a run that saved step 6, but has no checkpoint: is its storage mounted"):
        prepare(tmp_path / "run", tiny_shards)
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 5, 6}


def test_run_killed_before_its_first_save_starts_again(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(run.Interrupted):
        train(tmp_path / "run", tiny_shards, stop_at=2, signals=(signal.SIGINT, signal.SIGINT))
    assert prepare(tmp_path / "run", tiny_shards).schedule.start_step == 0


def test_profile_can_be_requested_before_the_first_start(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.request").touch()
    (tmp_path / "profiles").mkdir()
    assert prepare(tmp_path, tiny_shards).schedule.start_step == 0


def test_folder_with_other_files_is_no_work_directory(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is not empty and not the work directory of a run; choose another folder"):
        prepare(tmp_path, tiny_shards)


@pytest.mark.long
def test_damaged_newest_checkpoint_resumes_from_the_one_before(
    tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "whole", tiny_shards)
    train(tmp_path / "run", tiny_shards, "--config.duration=5 steps")
    for path in (tmp_path / "run/checkpoints/5/state/d").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    this = prepare(tmp_path / "run", tiny_shards)
    assert (this.schedule.start_step, this.schedule.examples_seen) == (4, 64)
    assert "skipped a damaged checkpoint" in caplog.text and "checkpoints/5: state/d/" in caplog.text


# ---- whole runs


def train(
    workdir: Path,
    shards: Path | str,
    *words: str,
    stop_at: int = 0,
    signals: tuple[int, ...] = (signal.SIGTERM,),
    start_from: str | None = None,
) -> run.Outcome:
    """A run that gets signals while batch number `stop_at` (from 1) is pulled."""
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={shards}", *words])
    this = run.prepare(config, str(workdir), run.open_shards, start_from)
    objective = mae.make(
        config, this.mesh, canvas=this.canvas, warmup_steps=this.warmup_steps, total_steps=this.schedule.total_steps,
        step_offset=this.step_offset,
    )  # fmt: skip

    def batches(this: run.Run) -> Iterator[Any]:
        for number, batch in enumerate(run.batches(this), start=1):
            if number == stop_at:
                for one in signals:
                    os.kill(os.getpid(), one)
            yield batch

    return run.train(this, objective, batches)


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.long
def test_both_choices_finish_on_a_grown_dataset_and_resume_exactly(
    tiny_shards: Path, grown: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "whole", tiny_shards).exit_code == 0
    assert train(tmp_path / "start", tiny_shards, stop_at=2).step == 2
    for name in ("then", "straight", "broken"):
        shutil.copytree(tmp_path / "start", tmp_path / name)
    assert train(tmp_path / "then", grown, "--config.data.additions=0").exit_code == 0
    assert losses(tmp_path / "then") == losses(tmp_path / "whole")

    new_epoch = "--config.data.on_change=new_epoch"
    assert train(tmp_path / "straight", grown, new_epoch).examples_seen == 96
    assert train(tmp_path / "broken", grown, new_epoch, stop_at=1).exit_code == 75
    assert train(tmp_path / "broken", grown).exit_code == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert losses(tmp_path / "straight")[3] != losses(tmp_path / "whole")[3]
    straight, broken = (sharding.paths(checkpoint.load(str(tmp_path / n)).params) for n in ("straight", "broken"))
    assert all(np.array_equal(leaf, broken[path]) for path, leaf in straight.items())


# ---- another batch size, another optimizer setting


def rows(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("later", [8, 32])
def test_another_batch_size_changes_neither_the_end_nor_the_schedule(
    tiny_shards: Path, tmp_path: Path, later: int
) -> None:
    words = ["--config.duration=12 steps", "--config.warmup=4 steps"]  # 192 examples, of which 64 are warm-up
    assert train(tmp_path / "run", tiny_shards, *words, stop_at=6).examples_seen == 96
    outcome = train(tmp_path / "run", tiny_shards, *words, f"--config.batch_size={later}")
    assert (outcome.finished, outcome.examples_seen, outcome.step) == (True, 192, 6 + 96 // later)
    peak = configs.load(str(ROOT / "tests/configs/resumable.py")).optimizer.base_learning_rate / 256
    for row in rows(tmp_path / "run"):
        batch = 16 if row["step"] <= 6 else later
        before = row["examples_seen"] - batch
        share = before / 64 if before < 64 else (1 + math.cos(math.pi * (before - 64) / 128)) / 2
        assert row["learning_rate"] == pytest.approx(peak * batch * share, rel=1e-5, abs=1e-12)


@pytest.mark.long
def test_clipping_can_be_turned_on_and_off_in_a_run(tiny_shards: Path, tmp_path: Path) -> None:
    """It is what the message of a diverged run advises."""
    assert train(tmp_path / "run", tiny_shards, stop_at=2).step == 2
    assert train(tmp_path / "run", tiny_shards, "--config.optimizer.clip_norm=1.0", stop_at=2).step == 4
    assert train(tmp_path / "run", tiny_shards).finished


# ---- divergence


def damaged_batches(numbers: Collection[int], slope: float) -> Callable[[run.Run], Iterator[Any]]:
    """The batches of a run; those that begin with these examples of the stream have another slope."""

    def batches(this: run.Run) -> Iterator[Any]:
        position = this.meta(this.schedule.examples_seen).position
        for number, batch in enumerate(run.batches(this)):
            yield batch | {"slope": batch["slope"] * slope} if position + 16 * number in numbers else batch

    return batches


def train_on(workdir: Path, shards: Path, batches: Callable[[run.Run], Iterator[Any]], *words: str) -> run.Outcome:
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={shards}", *words])
    this = run.prepare(config, str(workdir), run.open_shards)
    objective = mae.make(
        config, this.mesh, canvas=this.canvas, warmup_steps=this.warmup_steps, total_steps=this.schedule.total_steps
    )
    return run.train(this, objective, batches)


def test_update_of_a_batch_with_nan_is_skipped_and_the_run_continues(tiny_shards: Path, tmp_path: Path) -> None:
    outcome = train_on(tmp_path / "run", tiny_shards, damaged_batches({32}, float("nan")), "--config.save_every=1 step")
    assert outcome.finished and outcome.examples_seen == 96
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert [row["refused_updates"] for row in found.values()] == [0, 0, 1, 0, 0, 0]
    assert found[3]["parameter_norm"] == found[2]["parameter_norm"]
    assert math.isnan(found[3]["loss"]) and math.isfinite(found[4]["loss"])
    # The learning rate follows the examples, whether or not their update was applied.
    train(tmp_path / "whole", tiny_shards)
    wanted = {row["step"]: row["learning_rate"] for row in rows(tmp_path / "whole")}
    assert {step: row["learning_rate"] for step, row in found.items()} == wanted
    params = checkpoint.load(tmp_path / "run").params
    assert all(np.isfinite(leaf).all() for leaf in sharding.paths(params).values())


def test_run_goes_back_and_skips_the_window_of_its_divergence(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config.guard.patience=2", "--config.save_every=2 steps"]
    bad = damaged_batches({48, 64}, float("nan"))  # steps 4 and 5, after the checkpoint of step 2
    outcome = train_on(tmp_path / "run", tiny_shards, bad, *words)
    assert outcome.finished and (outcome.step, outcome.examples_seen) == (6, 96)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (back,) = [event for event in events if event["event"] == "rolled-back"]
    assert (back["step"], back["to_step"], back["skipped"]) == (5, 2, [32, 80])
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    step, meta = checkpoint.latest(str(tmp_path / "run")) or pytest.fail("no checkpoint")
    assert (step, meta.examples_seen, meta.skipped, meta.position) == (6, 96, ((32, 80),), 144)

    # Resumed from any of its checkpoints it reads on where it would have.
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    this = prepare(tmp_path / "run", tiny_shards)
    assert this.schedule.start_step == 4
    assert first_slices(this, monkeypatch) == expected_slices(this.examples.source, 64 + 48)


def test_run_that_keeps_diverging_ends_with_64(tiny_shards: Path, tmp_path: Path) -> None:
    words = ["--config.guard.patience=2", "--config.guard.rollbacks=2", "--config.save_every=2 steps"]
    with pytest.raises(DivergedError) as error:
        train_on(tmp_path / "run", tiny_shards, damaged_batches(range(32, 1000), float("nan")), *words)
    assert error.value.exit_code == 64
    assert re.fullmatch(
        "2 updates in a row were refused, loss nan, gradient_norm nan at step 4; the last good checkpoint is step 2, and the run "
        "went back 2 times. Try a lower --config.optimizer.base_learning_rate or --config.optimizer.clip_norm=1.0",
        str(error.value),
    )
    assert (checkpoint.latest(str(tmp_path / "run")) or (0,))[0] == 2


@pytest.mark.long
@pytest.mark.parametrize("times", [1e5, 1e8])
def test_learning_rate_far_too_high_ends_with_64(tiny_shards: Path, tmp_path: Path, times: float) -> None:
    """The loss stays finite."""
    words = ["--config.duration=100 steps", "--config.guard.patience=5", "--config.guard.rollbacks=1"]
    rate = configs.load(str(ROOT / "tests/configs/resumable.py")).optimizer.base_learning_rate
    with pytest.raises(DivergedError, match="and the run went back 1 times"):
        train(tmp_path / "run", tiny_shards, *words, f"--config.optimizer.base_learning_rate={rate * times}")


def test_checkpoint_without_the_guard_resumes(tiny_shards: Path, tmp_path: Path) -> None:
    """As versions before 0.3 saved them, with clipping: the optimizer's state in a pair."""
    assert train(tmp_path / "run", tiny_shards, stop_at=2).step == 2
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={tiny_shards}"])
    this = run.prepare(config, str(tmp_path / "run"), run.open_shards)
    objective = mae.make(config, this.mesh, canvas=this.canvas, warmup_steps=1, total_steps=6)
    checkpointer = saving.Checkpointer(str(tmp_path / "run"))
    state = checkpointer.restore(objective.abstract_state)
    old = {"step": state["step"], "params": state["params"], "opt_state": (optax.EmptyState(), state["opt_state"])}
    shutil.rmtree(tmp_path / "run/checkpoints")
    checkpointer.save(2, old, this.meta(32))
    checkpointer.close()
    assert train(tmp_path / "run", tiny_shards).finished
    train(tmp_path / "whole", tiny_shards)
    assert losses(tmp_path / "run")[3] == losses(tmp_path / "whole")[3]


def test_keep_every_keeps_checkpoints_for_good(tiny_shards: Path, tmp_path: Path) -> None:
    """Every 3 steps is rounded up to every 4, because every second step is saved."""
    words = ["--config.keep=1", "--config.keep_every=3 steps"]
    train(tmp_path / "run", tiny_shards, *words)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["4", "6"]


def test_checked_steps_change_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_shards)
    train(tmp_path / "checked", tiny_shards, "--config.devices.check_every=2")
    assert losses(tmp_path / "checked") == losses(tmp_path / "run")


def test_second_ctrl_c_is_exit_code_130_and_saves_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(run.Interrupted, match="the same command resumes from the newest checkpoint") as error:
        train(tmp_path / "run", tiny_shards, stop_at=2, signals=(signal.SIGINT, signal.SIGINT))
    assert error.value.exit_code == 130
    assert checkpoint.latest(str(tmp_path / "run")) is None
