"""Runs of a tiny model for tests, prepared or trained, and what they left."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from curia_jax import checkpoint, data, order, run, saving, trainer
from curia_jax import config as configs
from curia_jax.objectives import mae

ROOT = Path(__file__).resolve().parents[1]


def prepare(workdir: Path, shards: Path | str, *words: str) -> run.Run:
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={shards}", *words])
    return run.prepare(config, str(workdir), run.open_shards)


def train(
    workdir: Path,
    shards: Path | str,
    *words: str,
    stop_at: int = 0,
    signals: tuple[int, ...] = (signal.SIGTERM,),
    start_from: str | None = None,
) -> trainer.Outcome:
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

    return trainer.train(this, objective, batches)


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


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
