"""From a traced step and the compiler's answer to a plan; the compiler's answers are made up."""

import dataclasses
from pathlib import Path

import jax
import pytest

from curia_jax import config as configs
from curia_jax.plan import compiler, estimator, objectives, planner, prices, topologies
from curia_jax.plan.estimator import HloError, StepEstimate
from curia_jax.plan.inputs import InputFacts
from curia_jax.plan.planner import MemoryReport, Plan, Planner

TINY = str(Path(__file__).resolve().parents[1] / "configs" / "tiny.py")
DATA = InputFacts(1600, False, (32, 32), 2048.0, None)
STEP = StepEstimate(0.5, 0.4, 0.04, 0.06, 0.12, 0.08, 0.3, 0.35, 8.0, 32.0, (), ())
ANSWER = compiler.Compiled(
    text="HloModule", refused=False, memory={"arguments": 3000, "code": 500}, limit=10_000, largest=(), seconds=2.0,
    cached=False, hash="0" * 16,
)  # fmt: skip


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch):
    """(compiler's answer, topology, estimate or its error) -> the plan of the tiny run on four CPU devices."""

    def make(answer: compiler.Compiled, topology: str, estimate: StepEstimate | HloError = STEP) -> Plan:
        def estimated(*unused: object, **named: object) -> StepEstimate:
            if isinstance(estimate, HloError):
                raise estimate
            return estimate

        monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[: topology.devices])
        monkeypatch.setattr(topologies, "compiler_version", lambda: "libtpu 0.0.1")
        monkeypatch.setattr(compiler, "compile_for", lambda *unused, **named: answer)
        monkeypatch.setattr(estimator, "estimate", estimated)
        return Planner(topologies.parse(topology), DATA, prices.PRICES).plan(configs.load(TINY))

    return make


def test_plan_joins_estimate_input_needs_and_cost(plan) -> None:
    found = plan(ANSWER, "v5e:2x2")
    assert found.fits and found.mesh == {"replica": 1, "data": 2, "fsdp": 2}
    assert (found.memory.total, found.memory.limit) == (3500, 10_000)
    sizes = [row.bytes for row in found.memory.largest]
    assert len(sizes) == planner.LARGEST and sizes == sorted(sizes, reverse=True)
    assert found.images_per_second_per_chip == 8.0
    assert (found.input.hosts, found.input.host_images_per_second_needed) == (1, 32.0)
    # 12 steps of half a second on four chips at 1.20 USD an hour.
    assert found.cost.total_steps == 12
    assert found.cost.cost == pytest.approx(12 * 0.5 / 3600 * 4 * 1.20)
    assert not found.compiler_tested


def test_memory_of_a_chip_is_that_of_all_its_devices(plan) -> None:
    found = plan(ANSWER, "v7x:2x1x1")  # two devices a chip
    assert found.topology.devices == 4
    assert found.memory.used == {"arguments": 6000, "code": 1000}
    assert found.memory.limit == 20_000


def test_refused_program_has_memory_and_its_largest_tensors_alone(plan) -> None:
    allocation = compiler.Allocation(9000, "f32[2250]", "jit(step)/encoder")
    refused = dataclasses.replace(ANSWER, refused=True, text="", memory={"total": 12_000}, largest=(allocation,))
    found = plan(refused, "v5e:2x2")
    assert not found.fits and found.memory.total == 12_000
    assert found.memory.largest[-1] == estimator.LargeTensor("jit(step)/encoder", "f32[2250]", 9000, "temporary")
    assert (found.step, found.input, found.cost, found.estimate_error) == (None, None, None, None)
    assert found.images_per_second_per_chip == 0.0


@pytest.mark.parametrize(
    ("text", "estimate", "message"),
    [
        ("", STEP, "the compiler gave no text of its program in a known form"),
        ("HloModule", HloError("no entry computation"), "no entry computation"),
    ],
)
def test_program_that_cannot_be_read_leaves_memory_and_the_reason(plan, text: str, estimate, message: str) -> None:
    found = plan(dataclasses.replace(ANSWER, text=text), "v5e:2x2", estimate)
    assert found.fits and found.step is None and found.cost is None
    assert found.estimate_error == f"{message} (tested with libtpu {', '.join(estimator.TESTED_LIBTPU)})"


def test_json_lists_arguments_and_temporaries_together() -> None:
    tensors = [
        estimator.LargeTensor(name, "f32[4]", 16, kind) for name, kind in (("a", "argument"), ("b", "temporary"))
    ]
    plan = Plan(
        topology=topologies.parse("v5e:2x2"), mesh={"data": 4}, batch_size=16, parameters=1, state_bytes=12, data=DATA, compiler="libtpu",
        compiler_tested=True, program_hash="0", compile_seconds=1.0, cached=False,
        memory=MemoryReport({"code": 5}, 10, True, (tensors[0],)), model_flops_per_step=1, hardware_flops_per_step=2,
        step=dataclasses.replace(STEP, largest_temporaries=(tensors[1],)),
    )  # fmt: skip
    found = plan.to_json()
    assert [(row["tensor"], row["kind"]) for row in found["largest_tensors"]] == [("a", "argument"), ("b", "temporary")]
    assert "largest_temporaries" not in found and "cost" not in found
    assert (found["batch_per_chip"], found["hbm_bytes_per_chip"], found["hbm_limit_bytes"]) == (4, 5, 10)
    assert found["state_bytes"] == 12
    assert (found["estimated_step_seconds"], found["examples"], found["canvas"]) == (0.5, 1600, [32, 32])


def test_rate_of_fine_tuning_counts_the_slices_of_its_cases(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[int] = []
    found = plan(ANSWER, "v5e:2x2")  # also puts the made up answers in place
    monkeypatch.setattr(estimator, "estimate", lambda *unused, **named: images.append(named["batch_size"]) or STEP)
    words = (
        "size=custom",
        "width=16",
        "depth=2",
        "heads=2",
        "image_size=16",
        "patch_size=8",
        "unroll=1",
        "attention=xla",
    )
    config = configs.load("finetune_vit", [*(f"--config.model.{word}" for word in words), "--config.batch_size=8"])
    make = objectives.maker(config, bag=3)
    found = Planner(topologies.parse("v5e:2x2"), DATA, prices.PRICES, make).plan(config)
    assert images == [24] and found.batch_size == 8
    assert found.cost is not None and found.cost.total_steps == 50 * 1600 // 8
    # Values, their running mean and two moments, all float32; then a few counters.
    assert 0 <= found.state_bytes - 16 * found.parameters < 100
