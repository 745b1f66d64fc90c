"""Training of prepared runs: a run resumes exactly, goes back where it diverges, and ends as it should."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from curia_common.errors import DivergedError
from curia_jax import checkpoint, run, saving, sharding, trainer
from curia_jax import config as configs
from curia_jax.objectives import mae
from tests.runs import ROOT, expected_slices, first_slices, losses, prepare, train

pytestmark = pytest.mark.usefixtures("one_device")


# ---- resume


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


@pytest.mark.long
def test_resumed_training_on_a_mixture_equals_uninterrupted(mixed, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", mixed("0.25", "0.75")).exit_code == 0
    assert train(tmp_path / "broken", mixed("0.25", "0.75"), stop_at=3).exit_code == 75
    assert train(tmp_path / "broken", mixed("0.25", "0.75")).exit_code == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole, broken = (sharding.paths(checkpoint.load(str(tmp_path / n)).params) for n in ("whole", "broken"))
    assert all(np.array_equal(leaf, broken[path]) for path, leaf in whole.items())


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


def train_on(workdir: Path, shards: Path, batches: Callable[[run.Run], Iterator[Any]], *words: str) -> trainer.Outcome:
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={shards}", *words])
    this = run.prepare(config, str(workdir), run.open_shards)
    objective = mae.make(
        config, this.mesh, canvas=this.canvas, warmup_steps=this.warmup_steps, total_steps=this.schedule.total_steps
    )
    return trainer.train(this, objective, batches)


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


# ---- saving and stopping


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
    with pytest.raises(trainer.Interrupted, match="the same command resumes from the newest checkpoint") as error:
        train(tmp_path / "run", tiny_shards, stop_at=2, signals=(signal.SIGINT, signal.SIGINT))
    assert error.value.exit_code == 130
    assert checkpoint.latest(str(tmp_path / "run")) is None
