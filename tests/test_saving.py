"""Saving in the background: what is on disk, what is kept, and what a save that fails does."""

import contextlib
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from curia_jax import checkpoint, saving
from curia_jax.checkpoint import Meta

CONFIG = {"seed": 3}


def test_saved_state_is_that_of_its_step(tmp_path: Path) -> None:
    """The save runs in the background while the next steps overwrite the state's memory."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"step": jnp.int32(0), "params": {"kernel": jnp.zeros((1024, 1024), jnp.float32)}}
    checkpointer = saving.Checkpointer(str(tmp_path))
    for step in range(1, 41):
        state = advance(state)
        if step == 20:
            checkpointer.save(step, state, Meta(CONFIG, 40))
    checkpointer.close()
    kernel = checkpoint.load(str(tmp_path)).params["kernel"]
    assert kernel.min() == kernel.max() == 20


def test_saving_leaves_no_open_file_and_no_thread_behind(tmp_path: Path) -> None:
    checkpointer = saving.Checkpointer(str(tmp_path), keep=1)
    counts = []
    for step in range(1, 26):
        checkpointer.save(step, {"step": jnp.int32(step)}, Meta(CONFIG, step))
        checkpointer.wait()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    checkpointer.close()
    assert counts[-1][0] <= counts[2][0] and counts[-1][1] <= counts[2][1]


def test_failed_save_is_told_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file size limit fails a write like a full disk does, in the code that writes."""
    state = {"step": jnp.int32(1), "noise": jax.random.normal(jax.random.key(0), (256, 256))}
    checkpointer = saving.Checkpointer(str(tmp_path))
    checkpointer.save(1, state, Meta(CONFIG, 1))
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        checkpointer.save(2, state, Meta(CONFIG, 2))
        checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpointer.latest_step == 1
    checkpointer.save(3, state, Meta(CONFIG, 3))
    checkpointer.wait()
    first, second, third = checkpointer.ended()
    assert (first[:3], third[:3]) == ((1, 1, None), (3, 3, None))
    assert second[:2] == (2, 2) and "File too large" in str(second.problem) and "\n" not in str(second.problem)
    assert checkpointer.ended() == []
    checkpointer.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "1",
        "3",
    ]  # what the failed one left is gone
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("hours", [-3, 3])
def test_clock_that_is_set_during_a_save_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    checkpointer = saving.Checkpointer(str(tmp_path))
    checkpointer.save(1, {"step": jnp.int32(1), "noise": jnp.ones((512, 512))}, Meta(CONFIG, 1))
    shift[0] = 3600.0 * hours
    checkpointer.wait()
    [ended] = checkpointer.ended()
    assert ended[:3] == (1, 1, None) and 0 < ended.seconds < 3600
    checkpointer.close()
    assert checkpoint.check(tmp_path / "checkpoints/1").problem is None


def test_best_checkpoint_by_a_metric_stays(tmp_path: Path) -> None:
    checkpointer = saving.Checkpointer(str(tmp_path), keep=1, keep_best="loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.5], start=1):
        checkpointer.save(step, {"step": jnp.int32(step)}, Meta(CONFIG, step, metrics={"loss": loss}))
    checkpointer.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


def test_newest_and_every_n_steps_stay(tmp_path: Path) -> None:
    checkpointer = saving.Checkpointer(str(tmp_path), keep=2, keep_every_steps=3)
    for step in range(1, 8):
        checkpointer.save(step, {"step": jnp.int32(step)}, Meta(CONFIG, step))
    checkpointer.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7"]


class Killed(BaseException):
    """SIGKILL at an operation on files."""


@pytest.mark.parametrize("nth", range(12))
def test_interrupted_removal_is_finished_at_the_next_save(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever operation it is killed before, what is left is no checkpoint, and goes."""
    checkpointer = saving.Checkpointer(str(tmp_path), keep=1)
    checkpointer.save(1, {"step": jnp.int32(1)}, Meta(CONFIG, 1))
    checkpointer.wait()
    left = nth

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "unlink", "remove", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Killed):
            saving.remove_checkpoint(epath.Path(tmp_path / checkpoint.FOLDER / "1"))
    assert checkpoint.finished_steps(epath.Path(tmp_path / checkpoint.FOLDER)) == ([1] if nth == 0 else [])
    checkpointer.save(2, {"step": jnp.int32(2)}, Meta(CONFIG, 2))
    checkpointer.close()
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["2"]


def test_step_folder_that_is_being_copied_is_left_alone(tmp_path: Path) -> None:
    """It has no commit marker yet."""
    copied = tmp_path / checkpoint.FOLDER / "7" / "state"
    copied.mkdir(parents=True)
    checkpointer = saving.Checkpointer(str(tmp_path), keep=1)
    for step in (8, 9):
        checkpointer.save(step, {"step": jnp.int32(step)}, Meta(CONFIG, step))
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()) == ["7", "9"]
