"""An objective of another kind, a linear classifier on the encoder, runs through the same functions as a masked autoencoder."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from curia_jax import augment, checkpoint, optimizer, run, sharding
from curia_jax import config as configs
from curia_jax.models import vit
from curia_jax.objectives import base
from curia_jax.settings import Augment

ROOT = Path(__file__).resolve().parents[2]

# ---- the objective


def classifier(config: Any, this: run.Run) -> base.Objective:
    """Tells HU from other intensities: softmax regression on the mean patch token, encoder and head trained together."""
    fields = ("width", "depth", "heads", "mlp_width", "image_size", "patch_size", "dtype")
    model = vit.config(config.model.size, **{name: config.model[name] for name in fields})
    transform, learning_rate = optimizer.make(
        config.optimizer, batch_size=config.batch_size, warmup_steps=this.warmup_steps,
        total_steps=this.schedule.total_steps,
    )  # fmt: skip

    def init(key: Key[Array, ""]) -> base.Params:
        head = {"kernel": jnp.zeros((model.width, 2)), "bias": jnp.zeros(2)}
        return {"encoder": vit.init(model, key), "head": head}

    def prepare(batch: base.Batch, key: Key[Array, ""]) -> tuple[Array, Array]:
        return augment.training_view(batch, key, Augment.of(config.augment), model.image_size), batch["hu"].astype(
            jnp.int32
        )

    def loss(params: Any, images: Array, labels: Array) -> tuple[Float[Array, ""], base.Metrics]:
        features = vit.bind(model, params["encoder"])(images)[:, 1:].mean(axis=1)
        logits = features @ params["head"]["kernel"] + params["head"]["bias"]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), {"accuracy": jnp.mean(logits.argmax(axis=1) == labels, dtype=jnp.float32)}

    return base.make(
        init=init, prepare=prepare, loss=loss,
        rules=(*sharding.encoder_rules("encoder"), (r"head/(kernel|bias)", P())),
        optimizer=transform, learning_rate=learning_rate, mesh=this.mesh, batch_size=config.batch_size,
        canvas=this.canvas, seed=config.seed, gradient_dtype=jnp.float32, flops_per_example=3 * vit.flops(model),
        progress_format="loss {loss:.4f} accuracy {accuracy:.1%}",
    )  # fmt: skip


# ---- its runs


def train(workdir: Path, shards: Path, *words: str, stop_at: int = 0) -> run.Outcome:
    """Six steps on one device; SIGTERM while batch number `stop_at` (from 1) is pulled."""
    overrides = ["--config.duration=6 steps", "--config.save_every=6 steps", "--config.devices.platform=auto"]
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.devices.cpu_count=0"]
    config = configs.load(
        str(ROOT / "tests/configs/tiny.py"), [*overrides, *mesh, f"--config.data.shards={shards}", *words]
    )
    this = run.prepare(config, str(workdir))

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(run.batches(this), start=1):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return run.train(this, classifier(config, this), batches())


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    names = ("loss", "accuracy", "gradient_norm", "parameter_norm", "examples_seen")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: row[name] for name in names} for row in rows}


def test_classifier_trains_saves_and_resumes_bit_for_bit(tiny_shards: Path, tmp_path: Path, one_device: None) -> None:
    assert train(tmp_path / "straight", tiny_shards).exit_code == 0
    stopped = train(tmp_path / "broken", tiny_shards, stop_at=3)
    assert (stopped.exit_code, stopped.step, stopped.examples_seen) == (75, 3, 48)
    resumed = train(tmp_path / "broken", tiny_shards)
    assert (resumed.exit_code, resumed.step, resumed.examples_seen) == (0, 6, 96)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "straight")
    losses = [row["loss"] for row in metrics(tmp_path / "straight").values()]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6) and losses[-1] < losses[0]
    straight, broken = (sharding.paths(checkpoint.load(str(tmp_path / name)).params) for name in ("straight", "broken"))
    assert straight.keys() == broken.keys() >= {"head/kernel", "encoder/blocks/attn/qkv/kernel"}
    for path, leaf in straight.items():
        assert leaf.tobytes() == broken[path].tobytes(), path
    assert straight["head/kernel"].any()


def test_classifier_is_split_over_a_mesh(tiny_shards: Path, tmp_path: Path) -> None:
    words = [f"--config.data.shards={tiny_shards}", "--config.devices.platform=auto", "--config.devices.cpu_count=0"]
    config = configs.load(str(ROOT / "tests/configs/tiny.py"), [*words, "--config.mesh.data=1", "--config.mesh.fsdp=8"])
    state = classifier(config, run.prepare(config, str(tmp_path))).abstract_state
    assert state["params"]["encoder"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == P(None, "fsdp", None)
    assert state["params"]["head"]["kernel"].sharding.spec == P()
