"""The train step of fine-tuning: its losses, what it trains, its batches of bags, regions, and the same on eight devices as on one."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curia_common.errors import UserError
from curia_jax import augment, sharding
from curia_jax import config as configs
from curia_jax.evaluate import survival
from curia_jax.models import head as heads
from curia_jax.models import vit
from curia_jax.objectives import supervised
from curia_jax.objectives.supervised import SupervisedObjective
from curia_jax.settings import Augment

CASES, CANVAS = 8, (20, 24)
TINY = (
    "model.size=custom", "model.width=16", "model.depth=2", "model.heads=2", "model.image_size=16", "model.patch_size=8",
    "model.unroll=1", "model.dtype=float32", "model.attention=xla", f"batch_size={CASES}", "mesh.data=1", "optimizer.base_learning_rate=0.1",
)  # fmt: skip
CLASSES = ("no", "yes", "unclear")
Uncached = Callable[[], contextlib.AbstractContextManager[None]]


def head_of(target: str = "classes", kind: str = "linear", pooling: str = "cls") -> heads.HeadConfig:
    if target == "value":
        return heads.HeadConfig(kind, pooling, target, ("age",), mean=50.0, scale=12.0)
    return heads.HeadConfig(kind, pooling, target, ("survival",) if target == "time" else CLASSES)


def make(
    *words: str, head: heads.HeadConfig | None = None, slices: int = 1, masked: bool = False, mesh=None
) -> SupervisedObjective:
    head = head or head_of()
    own = (f"finetune.head={head.kind}", f"finetune.pooling={head.pooling}")
    config = configs.load("configs/finetune_vit.py", [f"--config.{word}" for word in (*TINY, *own, *words)])
    devices = sharding.make_mesh(**mesh) if mesh else sharding.make_mesh(data=1, devices=jax.devices()[:1])
    return supervised.make(
        config, devices, head=head, canvas=CANVAS, slices=slices, masked=masked, warmup_steps=1, total_steps=100
    )


def host_batch(objective: SupervisedObjective, seed: int = 0) -> dict[str, np.ndarray]:
    """Every field of the objective; case 1 has no second slice, the region is the right half of each slice."""
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.shape for name, leaf in objective.abstract_batch.items()}
    slices = shapes["valid"][1]
    batch = {
        "pixels": (rng.integers(0, 3000, shapes["pixels"]).cumsum(axis=3) % 4000).astype(np.uint16),
        "extent": np.tile(np.array(CANVAS, np.int32), (CASES, slices, 1)),
        "slope": np.ones((CASES, slices), np.float32), "intercept": np.full((CASES, slices), -1024, np.float32),
        "low": np.full((CASES, slices), -1000, np.float32), "high": np.full((CASES, slices), 2900, np.float32),
        "hu": np.tile(np.arange(CASES)[:, None] % 2 == 0, (1, slices)), "valid": np.ones((CASES, slices), bool),
        "weight": np.ones(CASES, np.float32),
    }  # fmt: skip
    if slices > 1:
        batch["valid"][1, 1] = False
        for name in ("pixels", "extent", "slope", "low", "high"):
            batch[name][1, 1] = 0
    if "region" in shapes:
        batch["region"] = np.zeros(shapes["region"], np.float32)
        batch["region"][..., 12:] = 1
    targets = {"classes": rng.integers(0, 3, CASES).astype(np.int32), "labels": rng.integers(0, 2, (CASES, 3))}
    batch["target"] = targets.get(objective.head.target, rng.normal(size=CASES)).astype(
        objective.abstract_batch["target"].dtype
    )
    if "event" in shapes:
        batch["event"] = np.arange(CASES) % 3 > 0
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in objective.abstract_batch.items()
    }
    return batch


def placed(objective: SupervisedObjective, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.device_put(value, objective.abstract_batch[name].sharding) for name, value in batch.items()}


def trained(objective: SupervisedObjective, steps: int = 3) -> tuple[list[Any], list[dict[str, float]]]:
    """States on the host, the first before any step, and metrics."""
    step, state = objective.compile(), objective.initial_state(0)
    states, metrics = [jax.device_get(state)], []
    for number in range(steps):
        state, found = step(state, placed(objective, host_batch(objective, number)))
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def changed(states: list[Any]) -> set[str]:
    """Groups of parameters that differ between the first and the last state."""
    first, last = (sharding.paths(state["params"]) for state in (states[0], states[-1]))
    return {path.split("/")[0] for path in first if not np.array_equal(first[path], last[path])}


# ---- losses


def test_classes_have_the_cross_entropy_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
    by_class = np.array([1.0, 0.5, 3.0], np.float32)
    smooth = supervised.probabilities(jnp.asarray(target), head_of(), 0.1)
    found, metrics = supervised.loss_and_metrics(jnp.asarray(logits), smooth, None, jnp.ones(6), head_of())
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(target), label_smoothing=0.1)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(axis=1) == target).mean())
    hard = supervised.probabilities(jnp.asarray(target), head_of(), 0)
    found, _ = supervised.loss_and_metrics(jnp.asarray(logits), hard, None, jnp.asarray(by_class[target]), head_of())
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(target), weight=torch.tensor(by_class)
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_labels_and_values_have_their_losses_and_metrics() -> None:
    outputs, labels = np.array([[2.0, -1.0, 0.5], [-3.0, 1.0, 1.0]]), np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    p = 1 / (1 + np.exp(-outputs))
    found, metrics = supervised.loss_and_metrics(
        jnp.asarray(outputs), jnp.asarray(labels), None, jnp.ones(2), head_of("labels")
    )
    assert float(found) == pytest.approx(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(4 / 6)
    # The third case only fills the batch.
    found, metrics = supervised.loss_and_metrics(
        jnp.array([[1.0], [0.5], [9.0]]), jnp.array([0.0, 1.0, 0.0]), None, jnp.array([1.0, 3.0, 0.0]), head_of("value")
    )
    assert float(found) == pytest.approx((1 * 1.0 + 3 * 0.25) / 4)
    assert float(metrics["error"]) == pytest.approx(12.0 * (1.0 + 0.5) / 2)  # in years, each case once


def test_smoothed_labels_lie_between_their_target_and_a_half() -> None:
    found = supervised.probabilities(jnp.array([[1.0, 0.0, 1.0]]), head_of("labels"), 0.2)
    np.testing.assert_allclose(found, [[0.9, 0.1, 0.9]], atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_cox_loss_is_the_partial_likelihood_per_event(ties: bool) -> None:
    rng = np.random.default_rng(0)
    time = rng.integers(1, 6, 20).astype(np.float32) if ties else rng.permutation(20).astype(np.float32)
    event, log_risk = rng.random(20) < 0.6, 30 * rng.normal(size=20).astype(np.float32)
    counts = np.arange(20) < 16
    found = supervised.cox_loss(*map(jnp.asarray, (log_risk, time, event, counts)))
    wanted = -survival.log_partial_likelihood(log_risk[counts].astype(float), time[counts], event[counts])
    assert float(found) == pytest.approx(wanted / event[counts].sum(), rel=1e-5)


def test_cox_loss_without_an_event_is_zero_with_finite_gradients() -> None:
    time, nobody = jnp.arange(4.0), jnp.zeros(4, bool)
    for counts in (jnp.ones(4, bool), nobody):
        value, gradient = jax.value_and_grad(supervised.cox_loss)(
            jnp.array([1.0, 2.0, 500.0, -1.0]), time, nobody, counts
        )
        assert float(value) == 0 and not gradient.any()


def test_mixup_mixes_images_targets_and_weights_by_one_share() -> None:
    images = jnp.arange(3.0)[:, None, None, None, None]
    prepared = supervised.Prepared(
        images, None, jnp.ones((3, 1), bool), None, jax.nn.one_hot(jnp.arange(3), 3), None, jnp.ones(3)
    )
    found = supervised.mixed(prepared, jax.random.key(0), 0.8)
    share = np.asarray(found.target)[0, 0]
    assert 0 < share < 1
    np.testing.assert_allclose(found.images[0, 0, 0, 0, 0], (1 - share) * 2, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found.target).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.target[1], [0, 1, 0], atol=1e-6)  # the middle one is mixed with itself


# ---- what is trained


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        ((), {"encoder", "head"}),
        (("finetune.train=lora", "finetune.lora_rank=2"), {"lora", "head"}),
        (("finetune.train=head",), {"head"}),
    ],
)
def test_step_changes_and_averages_what_it_trains_alone(words: tuple[str, ...], groups: set[str]) -> None:
    objective = make(*words)
    states, _ = trained(objective)
    assert changed(states) == groups
    assert set(states[0]["average"]) == groups
    moments = optax.tree.get(states[-1]["opt_state"], "mu")
    assert set(moments) == groups
    assert objective.parameters == sum(
        leaf.size for name in groups for leaf in jax.tree.leaves(states[0]["params"][name])
    )


def test_lora_of_rank_zero_is_training_of_the_head() -> None:
    nothing, head = (
        trained(make("finetune.train=lora", "finetune.lora_rank=0"), 2),
        trained(make("finetune.train=head"), 2),
    )
    assert nothing[1] == head[1] and set(nothing[0][0]["params"]) == {"encoder", "head"}


def test_averages_follow_the_parameters_as_in_numpy() -> None:
    states, _ = trained(make("finetune.average=0.15"))
    kernels = [state["params"]["head"]["kernel"] for state in states]
    average = kernels[0]
    for step, kernel in enumerate(kernels[1:]):
        decay = min(0.15, step / (step + 10))
        average = decay * average + (1 - decay) * kernel
        np.testing.assert_allclose(states[step + 1]["average"]["head"]["kernel"], average, rtol=1e-5, atol=1e-8)


def test_state_has_no_average_where_the_decay_is_zero() -> None:
    assert "average" not in make("finetune.average=0.0").abstract_state


def test_training_learns_classes() -> None:
    """HU tell the class."""
    objective = make("finetune.drop_path=0.0", "finetune.label_smoothing=0.0", "augment.reading_window_probability=0.0")
    step, state = objective.compile(), objective.initial_state(0)
    batch = host_batch(objective)
    batch["pixels"] = np.broadcast_to((500 + 700 * batch["target"])[:, None, None, None], batch["pixels"].shape).astype(
        np.uint16
    )
    batch["hu"][:] = True
    losses = []
    for _ in range(60):
        state, metrics = step(state, placed(objective, batch))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(3), rel=1e-3) and losses[-1] < 0.4
    assert float(metrics["accuracy"]) == 1
    found = objective.predict(
        {**state["params"], **state.get("average", {})},
        {n: v for n, v in placed(objective, batch).items() if n not in ("target", "weight")},
    )
    assert (np.asarray(found.outputs).argmax(axis=1) == batch["target"]).all()


# ---- bags and regions


def test_prediction_is_the_head_on_the_tokens_of_the_evaluation_view() -> None:
    objective = make(slices=2, head=head_of(pooling="cls_mean"))
    params, batch = objective.initial_state(0)["params"], host_batch(objective)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    found = objective.predict(params, placed(objective, batch))
    settings = Augment.of(configs.load("configs/finetune_vit.py").augment)
    for case in (0, 1):
        there = np.flatnonzero(batch["valid"][case])
        one: Any = {name: jnp.asarray(batch[name][case, there]) for name in supervised.data.DEVICE_FIELDS}
        tokens = vit.bind(objective.model, params["encoder"])(augment.evaluation_view(one, settings, (16, 16)))
        features = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=1).mean(axis=0)
        np.testing.assert_allclose(found.outputs[case], features @ params["head"]["kernel"], atol=1e-4)
    assert np.isfinite(found.outputs).all()
    np.testing.assert_array_equal(found.attention[1], [1, 0])


def test_bag_with_an_empty_slice_trains_with_finite_values() -> None:
    states, metrics = trained(make(slices=2, head=head_of(kind="attentive")))
    assert all(np.isfinite(value) for row in metrics for value in row.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]["params"]))
    assert [row["refused_updates"] for row in metrics] == [0, 0, 0]


def test_prediction_of_a_masked_task_depends_on_the_region_alone() -> None:
    """A mean over patches of the right half; the encoder has no block that mixes them."""
    objective = make(masked=True, head=head_of(pooling="mean"))
    params, batch = objective.initial_state(0)["params"], host_batch(objective)
    zeros = {part: jax.tree.map(jnp.zeros_like, params["encoder"]["blocks"][part]) for part in ("attn", "mlp")}
    params["encoder"]["blocks"] |= zeros
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    found = objective.predict(params, placed(objective, batch)).outputs
    left, right = {**batch, "pixels": batch["pixels"].copy()}, {**batch, "pixels": batch["pixels"].copy()}
    left["pixels"][..., :8] += 500  # the bicubic filter of the right half's first column reaches to column 9
    right["pixels"][..., 16:] += 500
    np.testing.assert_allclose(objective.predict(params, placed(objective, left)).outputs, found, atol=1e-5)
    assert np.abs(objective.predict(params, placed(objective, right)).outputs - found).max() > 0.01


def test_weights_fit_images_of_another_size() -> None:
    """Positions are computed: no parameter has a shape that depends on the size."""
    small, large = (make(f"model.image_size={size}") for size in (16, 24))
    assert large.model.patches == 9 and small.model.patches == 4
    shapes = [jax.tree.map(lambda leaf: leaf.shape, one.abstract_state["params"]) for one in (small, large)]
    assert shapes[0] == shapes[1]


# ---- devices


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {"head": head_of("classes", "attentive"), "slices": 2, "masked": True}),
        (("finetune.train=lora",), {"head": head_of("time", pooling="cls_mean")}),
        (("finetune.mixup=0.8",), {"head": head_of("labels")}),
    ],
)  # fmt: skip
def test_eight_devices_equal_one(words: tuple[str, ...], options: dict[str, Any], uncached: Uncached) -> None:
    wanted, wanted_metrics = trained(make(*words, **options))
    with uncached():
        objective = make(*words, "mesh.data=2", "mesh.fsdp=4", mesh={"data": 2, "fsdp": 4}, **options)
        found, metrics = trained(objective)
    for one, other in zip(metrics, wanted_metrics, strict=True):
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    gradients = [sharding.paths(optax.tree.get(states[1]["opt_state"], "mu")) for states in (found, wanted)]
    for path, gradient in gradients[1].items():
        np.testing.assert_allclose(
            gradients[0][path], gradient, rtol=0, atol=1e-6 * max(1, np.abs(gradient).max()), err_msg=path
        )


@pytest.mark.parametrize("words", [(), ("finetune.train=lora",), ("finetune.train=head",)])
def test_moments_and_averages_are_split_like_their_parameters(words: tuple[str, ...]) -> None:
    objective = make(*words, "mesh.data=1", "mesh.fsdp=8", mesh={"data": 1, "fsdp": 8}, head=head_of(kind="attentive"))
    state = objective.abstract_state
    params = sharding.paths(state["params"])
    trees = [optax.tree.get(state["opt_state"], name) for name in ("mu", "nu")] + [state.get("average", {})]
    for tree in trees:
        for path, leaf in sharding.paths(tree).items():
            assert leaf.sharding == params[path].sharding, path
    split = {path for path, leaf in params.items() if "fsdp" in leaf.sharding.spec}
    assert {"encoder/blocks/mlp/fc1/kernel", "head/value"} <= split
    if "finetune.train=lora" in words:
        assert "lora/blocks/attn/qkv/a" in split


# ---- what does not fit


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), {"masked": True}, "finetune.pooling is cls, which does not look at the masks"),
        (("finetune.mixup=0.5",), {"slices": 2}, "cases with several slices a case cannot be mixed"),
        (("finetune.mixup=0.5",), {"head": head_of("time")}, "cases with times cannot be mixed"),
        (
            ("finetune.lora_targets=qkv+norm",),
            {},
            r"config.finetune.lora_targets is 'qkv\+norm'; it may be some of qkv\+proj",
        ),
        (("batch_size=0",), {}, "batch_size is 0; it has to be a whole number of at least 1"),
        (("model.channels=3",), {}, "channels is 3, but CT and MR slices have 1"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(words: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(*words, **options)
    assert "\n" not in str(error.value)


def test_config_of_pretraining_is_refused() -> None:
    config = configs.load("tests/configs/tiny.py")
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="no group finetune; start it from configs/finetune_vit.py"):
        supervised.make(
            config, mesh, head=head_of(), canvas=CANVAS, slices=1, masked=False, warmup_steps=1, total_steps=9
        )


def test_flops_count_what_the_backward_pass_needs() -> None:
    forward = vit.flops(make().model)
    assert make(slices=3).flops_per_example == 3 * 3 * forward
    assert make("finetune.train=head").flops_per_example == forward
    # Rank 2 in a block of width 16, 5 tokens: a and b of the fused projection, 16 x 2 and 2 x 48.
    found = make("finetune.train=lora", "finetune.lora_rank=2", "finetune.lora_targets=qkv").flops_per_example
    assert found == 2 * forward + 3 * 2 * 5 * 2 * (16 * 2 + 2 * 48)
