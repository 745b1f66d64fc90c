"""The train step: what it computes, on which devices, in which type."""

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
from curia_jax.objectives import mae as objective

BATCH, CANVAS = 56, (24, 40)  # no parameter has a side of 56
MESHES = {
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"replica": 2, "data": 2, "fsdp": 2},
    "one": {"data": 1, "fsdp": 1},
}
Jobs = Callable[..., tuple[objective.Objective, Any]]


def mesh_of(name: str) -> Mesh:
    return sharding.make_mesh(**MESHES[name], devices=jax.devices()[:1] if name == "one" else None)


def make(name: str, *overrides: str) -> objective.Objective:
    config = configs.load("tests/configs/tiny.py", [f"--config.batch_size={BATCH}", *overrides])
    return objective.make(config, mesh_of(name), canvas=CANVAS, warmup_steps=1, total_steps=100)


@pytest.fixture(scope="module")
def jobs(uncached: Callable[[], AbstractContextManager[None]]) -> Jobs:
    """(name of a mesh, overrides) -> the objective and its compiled step, compiled once."""
    made: dict[tuple[str, ...], tuple[objective.Objective, Any]] = {}

    def get(*key: str) -> tuple[objective.Objective, Any]:
        if key not in made:
            job = make(*key)
            if key[0] == "one":
                made[key] = job, job.compile()
            else:
                with uncached():
                    made[key] = job, job.compile()
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


def initial(job: objective.Objective, uncached: Callable[[], AbstractContextManager[None]]) -> Any:
    with uncached():
        return job.initial_state(0)


@pytest.fixture(scope="module")
def three_steps(jobs: Jobs, uncached: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """(name of a mesh, overrides) -> the states (on the host) and metrics of three steps from the same start."""
    made: dict[tuple[str, ...], Any] = {}

    def get(*key: str) -> Any:
        if key not in made:
            job, step = jobs(*key)
            state = initial(job, uncached)
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
def by_the_rule(params: Any, batch: augment.Batch, seed: int, step: int) -> mae.MAEOutput:
    """What step number `step` sees, from seed, step and batch alone, on one device."""
    config = configs.load("tests/configs/tiny.py")
    model = mae.config(**config.model)
    view_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    images = augment.training_view(batch, view_key, config.augment, model.encoder.image_size)
    noise = jax.random.uniform(mask_key, (BATCH, model.encoder.patches))
    return mae.bind(model, params)(images, noise)


@pytest.mark.parametrize("name", ["all", "fsdp", "one"])
def test_views_and_masks_follow_from_seed_and_step_on_any_mesh(name: str, three_steps: Callable[..., Any]) -> None:
    """The loss is that of one device which knows nothing but seed, step and batch; 1e-6 is float32's order of sums."""
    states, metrics = three_steps(name)
    for step in (0, 2):
        params, batch = states[step]["params"], host_batch(step)
        wanted = by_the_rule(params, batch, 0, step).loss
        np.testing.assert_allclose(metrics[step]["loss"], wanted, rtol=1e-6)
        # Another seed or step gives another loss, by far more than the tolerance.
        for seed, other in ((1, step), (0, step + 1)):
            assert abs(by_the_rule(params, batch, seed, other).loss / wanted - 1) > 1e-4


def test_every_sample_has_its_own_mask_and_every_step_new_ones(three_steps: Callable[..., Any]) -> None:
    states, _ = three_steps("one")
    masks = [np.asarray(by_the_rule(states[0]["params"], host_batch(0), 0, step).mask) for step in (0, 1)]
    assert len({row.tobytes() for row in masks[0]}) > 0.9 * BATCH  # of 1820 masks of 4 in 16, 56 drawn at random
    assert (masks[0].sum(axis=1) == 12).all()
    assert (masks[0] != masks[1]).any(axis=1).mean() > 0.9


# ---- meshes


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_every_mesh_trains_the_same_model(name: str, three_steps: Callable[..., Any]) -> None:
    """Loss and norms within 2e-6, which is the order in which float32 sums are taken."""
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


def test_the_mesh_moves_parameters_and_no_activations(jobs: Jobs) -> None:
    """Left to itself the partitioner gathers a whole batch's activations in the backward pass of a split kernel."""
    _, step = jobs("fsdp")
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", step.as_text())
    assert len(moved) >= 11  # the kernels: 4 in the encoder's blocks, 4 in the decoder's, 3 outside
    assert {kind for _, kind in moved} == {"all-gather"}
    assert all(str(BATCH) not in shape.split(",") for shape, _ in moved), moved


def test_parameters_and_moments_are_split_alike_and_stay_so(
    jobs: Jobs, uncached: Callable[[], AbstractContextManager[None]]
) -> None:
    job, step = jobs("all")
    state = initial(job, uncached)
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


def test_the_step_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    view = augment.training_view
    monkeypatch.setattr(augment, "training_view", lambda *args: calls.append(1) or view(*args))
    job = make("one")
    step = job.compile()
    state = job.initial_state(0)
    for n in range(4):
        state, _ = step(state, batch_on("one", n))
    assert int(state["step"]) == 4
    assert len(calls) == 1


def test_the_state_is_donated(jobs: Jobs, uncached: Callable[[], AbstractContextManager[None]]) -> None:
    job, step = jobs("all")
    state = initial(job, uncached)
    bytes_per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    step(state, batch_on("all", 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes == bytes_per_device


@pytest.mark.parametrize(
    "overrides", [("--config.model.unroll=2",), ("--config.model.remat=full",), ("--config.model.remat=matmuls",)]
)
def test_scan_unrolled_and_rematerialised_programs_compute_the_same(
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


def test_bfloat16_is_for_products_alone() -> None:
    """Parameters, moments, LayerNorm, softmax, target and loss stay float32."""
    job = make("one", "--config.model.dtype=bfloat16")
    traced = job.trace()
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
    assert seen["erfc", False] == {"float32"}  # GELU; what goes in and comes out has the products' type


# ---- wrong settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.image_size=18", r"image size \(18, 18\) is no multiple of the patch size \(4, 4\)"),
        ("--config.model.size=XL", "size is 'XL'; it may be Ti, S, B, L, H"),
        ("--config.batch_size=50", "batch_size 50 does not divide over 8 devices"),
        ("--config.batch_size=0", "set --config.batch_size=8"),
        ("--config.model.width=36", "does not divide over fsdp=8"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("fsdp", override)


def test_devices_that_are_no_tpu_get_no_options_of_the_tpu_compiler():
    assert make("one").compiler_options == {}


def test_a_gpu_gets_options_that_any_backend_of_xla_takes():
    options = objective.compiler_options("NVIDIA H200", replicas=1)
    assert float(jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)(1.0)) == 2.0


def test_products_wait_for_their_kernels_on_several_tpu_slices():
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU v4"):
        one, two = (objective.compiler_options(kind, replicas) for replicas in (1, 2))
        assert two == one | {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    assert objective.compiler_options("cpu", 2) == {}


# ---- several TPU slices


def test_between_tpu_slices_goes_one_sum_a_kernel_of_all_layers():
    """Eight stacked kernels, the three others, what every device has whole, the loss and its baseline."""
    made = make("all", "--config.model.dtype=bfloat16")
    specs = jax.tree.leaves(sharding.parameter_specs(made.abstract_state["params"]))
    sums = re.findall(r'"stablehlo.all_reduce".*?\) -> tensor<(\S*?)>', made.trace().lower().as_text(), flags=re.DOTALL)
    assert sum(map(any, specs)) == 11
    assert len(sums) == 11 + 3 and sum(kind.endswith("xbf16") for kind in sums) == 11
