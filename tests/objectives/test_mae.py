"""The train step of a masked autoencoder: what it computes, on which devices, in which type."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from curia_common.errors import UserError
from curia_jax import augment, data, sharding
from curia_jax import config as configs
from curia_jax.models import mae
from curia_jax.objectives import mae as mae_objective
from curia_jax.objectives.mae import MAEObjective
from curia_jax.settings import Augment

BATCH, CANVAS = 56, (24, 40)  # no parameter has a side of 56
MESHES = {
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"replica": 2, "data": 2, "fsdp": 2},
    "one": {"data": 1, "fsdp": 1},
}
Objectives = Callable[..., tuple[MAEObjective, Any]]


def mesh_of(name: str) -> Mesh:
    return sharding.make_mesh(**MESHES[name], devices=jax.devices()[:1] if name == "one" else None)


def make(name: str, *overrides: str) -> MAEObjective:
    config = configs.load("tests/configs/tiny.py", [f"--config.batch_size={BATCH}", *overrides])
    return mae_objective.make(config, mesh_of(name), canvas=CANVAS, warmup_steps=1, total_steps=100)


@pytest.fixture(scope="module")
def objectives(uncached: Callable[[], AbstractContextManager[None]]) -> Objectives:
    """(name of a mesh, overrides) -> the objective and its compiled step, compiled once."""
    made: dict[tuple[str, ...], tuple[MAEObjective, Any]] = {}

    def get(*key: str) -> tuple[MAEObjective, Any]:
        if key not in made:
            objective = make(*key)
            if key[0] == "one":
                made[key] = objective, objective.compile()
            else:
                with uncached():
                    made[key] = objective, objective.compile()
        return made[key]

    return get


def host_batch(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    pixels = random.integers(0, 3000, (BATCH, *CANVAS)).cumsum(axis=2) % 4000
    return {
        "pixels": pixels.astype(np.uint16), "extent": np.tile(np.array(CANVAS, np.int32), (BATCH, 1)),
        "slope": np.ones(BATCH, np.float32), "intercept": np.full(BATCH, -1024, np.float32),
        "low": np.full(BATCH, -1000, np.float32), "high": np.full(BATCH, 2900, np.float32),
        "hu": np.arange(BATCH) % 2 == 0,
    }  # fmt: skip


def batch_on(name: str, step: int) -> dict[str, jax.Array]:
    return data.to_devices(host_batch(step), sharding.batch_sharding(mesh_of(name)))


def initial(objective: MAEObjective, uncached: Callable[[], AbstractContextManager[None]]) -> Any:
    with uncached():
        return objective.initial_state(0)


@pytest.fixture(scope="module")
def three_steps(objectives: Objectives, uncached: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """(name of a mesh, overrides) -> the states (on the host) and metrics of three steps from the same start."""
    made: dict[tuple[str, ...], Any] = {}

    def get(*key: str) -> Any:
        if key not in made:
            objective, step = objectives(*key)
            state = initial(objective, uncached)
            states, metrics = [jax.device_get(state)], []
            for n in range(3):
                state, values = step(state, batch_on(key[0], n))
                states.append(jax.device_get(state))
                metrics.append(jax.device_get(values))
            made[key] = states, metrics
        return made[key]

    return get


# ---- randomness


@jax.jit
def reference_output(params: Any, batch: augment.Batch, seed: int, step: int) -> mae.MAEOutput:
    """What step number `step` sees, from seed, step and batch alone, on one device."""
    config = configs.load("tests/configs/tiny.py")
    model = mae.config(**config.model)
    view_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    images = augment.training_view(batch, view_key, Augment.of(config.augment), model.encoder.image_size)
    noise = jax.random.uniform(mask_key, (BATCH, model.encoder.patches))
    return mae.bind(model, params)(images, noise)


@pytest.mark.long
@pytest.mark.parametrize("name", ["all", "fsdp", "one"])
def test_views_and_masks_follow_from_seed_and_step(name: str, three_steps: Callable[..., Any]) -> None:
    """The loss is that of one device that knows only seed, step and batch; 1e-6 is the order of float32 sums."""
    states, metrics = three_steps(name)
    for step in (0, 2):
        params, batch = states[step]["params"], host_batch(step)
        wanted = reference_output(params, batch, 0, step).loss
        np.testing.assert_allclose(metrics[step]["loss"], wanted, rtol=1e-6)
        # Another seed or step gives another loss, by far more than the tolerance.
        for seed, other in ((1, step), (0, step + 1)):
            assert abs(reference_output(params, batch, seed, other).loss / wanted - 1) > 1e-4


def test_masks_differ_between_samples_and_steps(three_steps: Callable[..., Any]) -> None:
    states, _ = three_steps("one")
    masks = [np.asarray(reference_output(states[0]["params"], host_batch(0), 0, step).mask) for step in (0, 1)]
    assert len({row.tobytes() for row in masks[0]}) > 0.9 * BATCH  # of 1820 masks of 4 in 16, 56 drawn at random
    assert (masks[0].sum(axis=1) == 12).all()
    assert (masks[0] != masks[1]).any(axis=1).mean() > 0.9


# ---- meshes


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_losses_and_norms_are_the_same_on_every_mesh(name: str, three_steps: Callable[..., Any]) -> None:
    """Within 2e-6, which is the order of float32 sums."""
    _, wanted = three_steps("one")
    _, found = three_steps(name)
    for step in range(3):
        for quantity in wanted[step]:
            np.testing.assert_allclose(found[step][quantity], wanted[step][quantity], rtol=2e-6, err_msg=quantity)


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_gradients_are_the_same_on_every_mesh(name: str, three_steps: Callable[..., Any]) -> None:
    """The first moment after one step is (1 - b1) x gradient. 1e-6 of the largest entry of each tensor."""
    wanted, found = (sharding.paths(optax.tree.get(three_steps(n)[0][1]["opt_state"], "mu")) for n in ("one", name))
    for path, gradient in wanted.items():
        np.testing.assert_allclose(
            found[path], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max() + 1e-9, err_msg=path
        )


def test_fsdp_gathers_parameters_and_moves_no_activations(objectives: Objectives) -> None:
    """Left alone, the partitioner gathers a whole batch's activations in the backward pass of a split weight."""
    _, step = objectives("fsdp")
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", step.as_text())
    assert len(moved) >= 11  # weights: 4 in the encoder's blocks, 4 in the decoder's, 3 outside
    assert {kind for _, kind in moved} == {"all-gather"}
    assert all(str(BATCH) not in shape.split(",") for shape, _ in moved), moved


def test_parameters_and_moments_keep_the_same_sharding(
    objectives: Objectives, uncached: Callable[[], AbstractContextManager[None]]
) -> None:
    objective, step = objectives("all")
    state = initial(objective, uncached)
    for _ in range(2):
        params = sharding.paths(state["params"])
        moments = [sharding.paths(optax.tree.get(state["opt_state"], name)) for name in ("mu", "nu")]
        for path, leaf in params.items():
            for moment in moments:
                assert moment[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
        kernel = params["encoder/blocks/mlp/fc1/kernel"]
        assert kernel.sharding.spec == P(None, "fsdp", None)
        assert kernel.addressable_shards[0].data.shape == (2, 16, 64)
        state, metrics = step(state, batch_on("all", 0))
        assert all(value.is_fully_replicated for value in metrics.values())


# ---- the program


def test_step_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    view = augment.training_view
    monkeypatch.setattr(augment, "training_view", lambda *args: calls.append(1) or view(*args))
    objective = make("one")
    step = objective.compile()
    state = objective.initial_state(0)
    for n in range(4):
        state, _ = step(state, batch_on("one", n))
    assert int(state["step"]) == 4
    assert len(calls) == 1


def test_step_donates_the_state(objectives: Objectives, uncached: Callable[[], AbstractContextManager[None]]) -> None:
    objective, step = objectives("all")
    state = initial(objective, uncached)
    bytes_per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    step(state, batch_on("all", 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes == bytes_per_device


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides", [("--config.model.unroll=2",), ("--config.model.remat=full",), ("--config.model.remat=matmuls",)]
)
def test_unroll_and_remat_do_not_change_the_gradients(
    overrides: tuple[str, ...], three_steps: Callable[..., Any]
) -> None:
    wanted, wanted_metrics = three_steps("one")
    found, metrics = three_steps("one", *overrides)
    np.testing.assert_allclose(metrics[0]["loss"], wanted_metrics[0]["loss"], rtol=1e-6)
    gradients = [sharding.paths(optax.tree.get(states[1]["opt_state"], "mu")) for states in (wanted, found)]
    for path, gradient in gradients[0].items():
        np.testing.assert_allclose(
            gradients[1][path], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max() + 1e-9, err_msg=path
        )


# ---- types


def equations(jaxpr: Any) -> list[Any]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    found += equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    found += equations(inner)
    return found


def test_bfloat16_is_used_in_matmuls_only() -> None:
    """Parameters, moments, LayerNorm, softmax, target and loss stay float32."""
    objective = make("one", "--config.model.dtype=bfloat16")
    traced = objective.trace()
    state, metrics = traced.out_info
    assert {leaf.dtype for leaf in jax.tree.leaves([state["params"], metrics])} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["opt_state"])} == {np.dtype(np.float32), np.dtype(np.int32)}
    seen: dict[tuple[str, bool], set[str]] = {}
    for equation in equations(traced.jaxpr.jaxpr):
        if equation.invars and "augment" not in str(equation.source_info.name_stack):
            aval = equation.invars[0].aval
            seen.setdefault((equation.primitive.name, aval.ndim == 4), set()).add(str(aval.dtype))
    assert seen["dot_general", False] == seen["dot_general", True] == {"bfloat16"}
    assert seen["rsqrt", False] == {"float32"}  # LayerNorm
    assert seen["reduce_max", True] == seen["exp", True] == {"float32"}  # softmax over (batch, heads, tokens, tokens)
    assert seen["erfc", False] == {"float32"}  # GELU; its input and output have the type of the matmuls


# ---- wrong settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.image_size=18", r"image size \(18, 18\) is not a multiple of the patch size \(4, 4\)"),
        ("--config.model.size=XL", "size is 'XL'; it may be Ti, S, B, L, H"),
        ("--config.batch_size=50", "batch_size 50 does not divide over 8 devices"),
        ("--config.batch_size=0", "batch_size is 0; it has to be a whole number of at least 1"),
        ("--config.model.channels=3", "channels is 3, but CT and MR slices have 1; set --config.model.channels=1"),
        ("--config.model.width=36", "does not divide over fsdp=8"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("fsdp", override)


# ---- several TPU slices


def test_tpu_slices_allreduce_each_stacked_weight_once() -> None:
    """Eight stacked weights, three others, the replicated parameters together, the loss and its baseline."""
    made = make("all", "--config.model.dtype=bfloat16")
    specs = jax.tree.leaves(sharding.parameter_specs(made.abstract_state["params"], mae_objective.RULES))
    sums = re.findall(r'"stablehlo.all_reduce".*?\) -> tensor<(\S*?)>', made.trace().lower().as_text(), flags=re.DOTALL)
    assert sum(map(any, specs)) == 11
    assert len(sums) == 11 + 3 and sum(kind.endswith("xbf16") for kind in sums) == 11
