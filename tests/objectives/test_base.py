"""What every objective gets from its init and its loss.

By hand for a linear function of the pixels; then a linear classifier on the encoder, which is trained, saved and resumed through
the same functions as a masked autoencoder.
"""

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from curia_common.errors import DoesNotFitError, UserError
from curia_jax import augment, checkpoint, data, optimizer, run, sharding, trainer
from curia_jax import config as configs
from curia_jax.models import vit
from curia_jax.objectives import base
from curia_jax.settings import Augment

ROOT = Path(__file__).resolve().parents[2]

# ---- a linear function

RATE = 0.25
RULES = (("weights", P("fsdp")), ("bias", P()))


def linear(mesh: dict[str, int] | None = None, **changes: Any) -> base.Objective:
    """Mean over the batch of weights . pixels + bias, by gradient descent with momentum; on one device, or on a mesh of eight."""

    def init(key: Key[Array, ""]) -> base.Params:
        return {"weights": jax.random.normal(key, (16,)), "bias": jnp.zeros(2)}

    def prepare(batch: base.Batch, key: Key[Array, ""]) -> tuple[Array, Array]:
        pixels = batch["pixels"].astype(jnp.float32).reshape(len(batch["pixels"]), -1)
        return pixels, jnp.full(len(pixels), jax.random.uniform(key))

    def loss(params: Any, pixels: Array, draws: Array) -> tuple[Float[Array, ""], base.Metrics]:
        return jnp.mean(pixels @ params["weights"]) + params["bias"].sum(), {"draw": jnp.mean(draws)}

    devices = sharding.make_mesh(**mesh) if mesh else sharding.make_mesh(data=1, devices=jax.devices()[:1])
    fields: dict[str, Any] = {
        "init": init, "prepare": prepare, "loss": loss, "rules": RULES, "optimizer": optax.sgd(RATE, momentum=0.5),
        "learning_rate": lambda step: 1.0 / (1 + step), "mesh": devices, "batch_size": 8, "example": base.slice_fields((4, 4)), "seed": 3,
        "gradient_dtype": jnp.float32, "flops_per_example": 96,
    }  # fmt: skip
    return base.make(**fields | changes)


def batch_of(values: np.ndarray) -> base.Batch:
    count = len(values)
    fields = {name: np.ones(count, kind) for name, kind in data.DEVICE_FIELDS.items()}
    fields |= {"pixels": values.astype(np.uint16), "extent": np.full((count, 2), 4, np.int32)}
    return data.to_devices(fields, sharding.batch_sharding(sharding.make_mesh(data=1, devices=jax.devices()[:1])))


def test_step_descends_the_gradient_and_reports_its_metrics() -> None:
    objective = linear()
    step = objective.compile()
    state = objective.initial_state(0)
    # Sums of eighths are exact in float32.
    pixels = np.random.default_rng(0).integers(0, 9, (8, 4, 4))
    gradient = pixels.mean(axis=0).ravel()
    weights, bias = np.asarray(state["params"]["weights"], np.float64), np.zeros(2)
    for number, momentum in enumerate((1.0, 1.5)):  # of equal gradients
        before = weights
        weights, bias = weights - RATE * momentum * gradient, bias - RATE * momentum
        # Key of a step: from the seed and the step alone.
        draw = jax.random.uniform(jax.random.fold_in(jax.random.key(3), number))
        wanted = {
            "loss": before @ gradient + (0.0 if number == 0 else -2 * RATE), "draw": draw, "learning_rate": 1 / (1 + number),
            "gradient_norm": np.sqrt(gradient @ gradient + 2), "parameter_norm": np.sqrt(weights @ weights + bias @ bias),
            "refused_updates": 0,
        }  # fmt: skip
        state, metrics = step(state, batch_of(pixels))
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(state["params"]["weights"], weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state["params"]["bias"], bias)
        assert int(state["step"]) == number + 1


def test_initial_state_follows_from_the_seed_and_is_split(
    uncached: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    objective = linear({"data": 2, "fsdp": 4})
    with uncached():
        states = [objective.initial_state(seed) for seed in (0, 0, 1)]
    weights = [np.asarray(state["params"]["weights"]) for state in states]
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[0], linear().initial_state(0)["params"]["weights"])
    assert not (weights[0] == weights[2]).any()
    (moment,) = [leaf for leaf in jax.tree.leaves(states[0]["opt_state"]) if leaf.shape == (16,)]
    for leaf in (states[0]["params"]["weights"], moment):
        assert leaf.sharding.spec == P("fsdp") and leaf.addressable_shards[0].data.shape == (4,)
    assert states[0]["params"]["bias"].is_fully_replicated


def test_objective_knows_its_shapes_before_any_array() -> None:
    objective = linear({"data": 2, "fsdp": 4})
    assert objective.parameters == 18
    assert objective.abstract_batch["pixels"].shape == (8, 4, 4)
    assert objective.abstract_batch["pixels"].sharding.shard_shape((8, 4, 4)) == (1, 4, 4)
    assert {leaf.shape[0] for leaf in objective.abstract_batch.values()} == {8}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 12}, UserError, "batch_size 12 does not divide over 8 devices"),
        ({"rules": RULES[:1]}, ValueError, "no sharding rule matches parameter bias"),
        ({"rules": (*RULES, ("head", P()))}, ValueError, r"rules that match no parameter: \['head'\]"),
        (
            {"rules": (("weights", P("fsdp")), ("bias", P("fsdp")))},
            UserError,
            "bias has a dimension of 2, which does not",
        ),
    ],
)
def test_objective_that_does_not_fit_its_mesh_is_refused(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        linear({"data": 2, "fsdp": 4}, **changes)


def test_unknown_compiler_option_is_one_line() -> None:
    objective = dataclasses.replace(linear(), compiler_options={"xla_no_such_option": "true"})
    with pytest.raises(
        UserError, match=r"XLA refuses the compiler options: .*xla_no_such_option.*; change --config.compiler_options"
    ):
        objective.compile()


@pytest.mark.parametrize("when", ["compile", "initial_state"])
def test_out_of_memory_is_one_line_with_a_remedy(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nLargest: …")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    objective = linear()
    if when == "initial_state":
        objective = dataclasses.replace(objective, init=refuse)
    with pytest.raises(
        DoesNotFitError,
        match="does not fit the memory of cpu: RESOURCE_EXHAUSTED: Ran out of .*; try a smaller --config.batch_size",
    ) as error:
        objective.compile() if when == "compile" else objective.initial_state(0)
    assert "\n" not in str(error.value)


# ---- a classifier


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
        example=base.slice_fields(this.canvas), seed=config.seed, gradient_dtype=jnp.float32, flops_per_example=3 * vit.flops(model),
        progress_format="loss {loss:.4f} accuracy {accuracy:.1%}",
    )  # fmt: skip


# ---- runs of the classifier


def train(workdir: Path, shards: Path, *words: str, stop_at: int = 0) -> trainer.Outcome:
    """Six steps on one device; SIGTERM while batch number `stop_at` (from 1) is pulled."""
    overrides = ["--config.duration=6 steps", "--config.save_every=6 steps", "--config.devices.platform=auto"]
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.devices.cpu_count=0"]
    config = configs.load(
        str(ROOT / "tests/configs/tiny.py"), [*overrides, *mesh, f"--config.data.shards={shards}", *words]
    )
    this = run.prepare(config, str(workdir), run.open_shards)

    def batches(this: run.Run) -> Iterator[Any]:
        for number, batch in enumerate(run.batches(this), start=1):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return trainer.train(this, classifier(config, this), batches)


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
    names = ("loss", "accuracy", "gradient_norm", "parameter_norm", "examples_seen")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: row[name] for name in names} for row in rows}


@pytest.mark.long
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
    state = classifier(config, run.prepare(config, str(tmp_path), run.open_shards)).abstract_state
    assert state["params"]["encoder"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == P(None, "fsdp", None)
    assert state["params"]["head"]["kernel"].sharding.spec == P()
