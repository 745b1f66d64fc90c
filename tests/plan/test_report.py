"""What the planner prints, for plans made by hand."""

import dataclasses

import pytest

from curia_jax.plan import inputs, prices, report, search, topologies
from curia_jax.plan.estimator import CollectiveTime, LargeTensor, PartTime, StepEstimate
from curia_jax.plan.planner import MemoryReport, Plan

V5E = topologies.parse("v5e:2x2")
GIB = 2**30
DATA = inputs.InputFacts(1000, True, (512, 512), 60_000.0, 10.0)
STEP = StepEstimate(
    estimated_step_seconds=0.1, compute_seconds=0.08, roofline_seconds=0.005, exposed_collective_seconds=0.015,
    exposed_collective_fraction=0.15, unestimated_fraction=0.05, estimated_mfu=0.42, estimated_hardware_utilisation=0.5,
    images_per_second_per_chip=2560.0, images_per_second=10_240.0,
    collectives=(CollectiveTime("all-gather", "fsdp", True, 24, 12_500_000, 0.002, 0.0, 0.001),),
    parts=(PartTime("encoder mlp", 0.75, 0.06, 0.045, 0.003, 0.01, 0.048),
           PartTime("optimizer", 0.25, 0.02, 0.0, 0.001, 0.012, 0.012)),
    largest_temporaries=(LargeTensor("jit(step)/encoder", "bf16[64,197,3072]", 3 * 2**20, "temporary"),),
)  # fmt: skip
MEMORY = MemoryReport(
    {"arguments": 3 * GIB, "temporaries": 6 * GIB}, 10 * GIB, True,
    (LargeTensor("params/encoder/mlp", "float32[768, 3072]", 9 * 2**20, "argument"),),
)  # fmt: skip
PLAN = Plan(
    topology=V5E, mesh={"replica": 1, "data": 2, "fsdp": 2}, batch_size=1024, parameters=111_700_000, state_bytes=1_340_400_000, data=DATA,
    compiler="libtpu 0.0.1", compiler_tested=True, program_hash="0" * 16, compile_seconds=61.7, cached=True, memory=MEMORY,
    model_flops_per_step=2 * 10**12, hardware_flops_per_step=3 * 10**12, step=STEP,
    input=inputs.input_needs(STEP.images_per_second, V5E, DATA), cost=prices.run_cost(36_000, 0.1, V5E, prices.PRICES),
)  # fmt: skip


def shown(plan: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed, with single spaces."""
    report.show(plan)
    out, err = capsys.readouterr()
    assert out == ""
    return " ".join(err.split())


def refused(used: dict[str, int]) -> Plan:
    memory = MemoryReport(used, 10 * GIB, False, ())
    return dataclasses.replace(PLAN, memory=memory, step=None, input=None, cost=None)


# ---- a plan that does not fit


def test_line_for_a_plan_that_does_not_fit_has_sizes_and_remedy() -> None:
    remedy = search.Remedy(("--config.model.remat=full", "--config.mesh.fsdp=4"), 9 * GIB)
    line = report.does_not_fit(refused({"arguments": 20 * GIB, "temporaries": GIB}), remedy)
    assert line == (
        "v5e:2x2 needs 21.00 GiB per chip but has 10.00; try --config.model.remat=full --config.mesh.fsdp=4 (9.00 GiB)"
    )


def test_line_without_remedy_says_what_to_change() -> None:
    line = report.does_not_fit(refused({"total": 21 * GIB}), None)
    assert line.endswith("; use more chips, a larger --config.mesh.fsdp or a smaller --config.batch_size")


def test_refusal_without_figures_is_reported_as_more_than_the_limit() -> None:
    line = report.does_not_fit(refused({"arguments": GIB}), None)
    assert line.startswith("v5e:2x2 needs more than 10.00 GiB per chip but has 10.00; ")


def test_plan_that_does_not_fit_shows_memory_alone(capsys) -> None:
    text = shown(refused({"arguments": 21 * GIB}), capsys)
    assert "arguments 21.000" in text
    assert "fits" not in text and "images/s" not in text and "chip-hours" not in text


# ---- a plan that fits


def test_every_table_of_a_plan_has_its_figures(capsys) -> None:
    text = shown(PLAN, capsys)
    for words in (
        "111.7 M parameters on v5e:2x2 (4 chips; replica=1, data=2, fsdp=2), batch 1,024; libtpu 0.0.1, compiled in 62 s (cached)",
        "fits: 9.00 of 10.00 GiB per chip",
        "temporaries 6.000",
        "params/encoder/mlp float32[768, 3072] 9.0",
        "jit(step)/encoder bf16[64,197,3072] 3.0",
        "step 100.00 ms computation 80.00 ms charged by roofline 5.00 ms (5.0%) exposed communication 15.00 ms (15.0%)",
        "model FLOPs 2.0 TFLOP hardware FLOPs 3.0 TFLOP MFU 42.0% images/s per chip 2,560 images/s 10,240",
        "encoder mlp 60.00 75.0% 45.00 3.00 10.00 48.00 80%",
        "all 80.00 100.0% 45.00 4.00 22.00 60.00 75%",
        "all-gather fsdp yes 24 12.50 2.000 0.000 1.000",
        "per host 10,240 images/s on 1 hosts from storage 0.61 GB/s",
        "10 images/s per core of this machine x 112 cores = 1,120: does not suffice",
        "steps 36,000; 1,000 examples per epoch (assumed; --examples=N) hours 1.0 chip-hours 4 cost 5 USD at 1.20 per chip-hour (2025-08)",
    ):
        assert words in text
    assert "not tested" not in text


def test_missing_price_and_measurement_say_what_to_give(capsys) -> None:
    data = dataclasses.replace(DATA, examples_assumed=False, loader_per_core=None)
    cost = prices.run_cost(36_000, 0.1, V5E, prices.PriceTable("d", "EUR", {}))
    needs = inputs.input_needs(STEP.images_per_second, V5E, data)
    text = shown(dataclasses.replace(PLAN, data=data, cost=cost, input=needs), capsys)
    assert "no price known for v5e:2x2; give --prices=FILE" in text
    assert "not measured: --config.data.shards names no shards" in text
    assert "1,000 examples per epoch hours" in text


def test_untested_compiler_and_unreadable_program_are_warned_of(capsys) -> None:
    text = shown(dataclasses.replace(PLAN, compiler_tested=False), capsys)
    assert "the estimate below was not tested with libtpu 0.0.1, only with " in text
    plan = dataclasses.replace(PLAN, step=None, input=None, cost=None, estimate_error="no [entry] computation")
    text = shown(plan, capsys)
    assert "no step time, MFU, input needs and cost: libtpu 0.0.1: no [entry] computation" in text
    assert "fits: 9.00 of 10.00 GiB" in text


# ---- a search


def test_search_table_marks_the_front_and_names_the_best(capsys) -> None:
    rows = [
        search.SearchRow(("--config.model.remat=none", "--config.batch_size=32"), PLAN, pareto=True, best=True),
        search.SearchRow((), PLAN),
        search.SearchRow(("--config.model.unroll=1",), dataclasses.replace(PLAN, step=None)),
        search.SearchRow(("--config.batch_size=64",), refused({"total": 21 * GIB})),
    ]
    report.show_search(rows, "configs/demo.py")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "* --config.model.remat=none --config.batch_size=32 2,560 42.0% 9.00 15.0%" in lines
    assert "the config as it is 2,560 42.0% 9.00 15.0%" in lines
    assert "--config.model.unroll=1 not estimated 9.00" in lines
    assert "--config.batch_size=64 does not fit 21.00" in lines
    assert lines[-1] == "best: --config=configs/demo.py --config.model.remat=none --config.batch_size=32"


def test_search_without_a_fitting_candidate_says_so(capsys) -> None:
    report.show_search([search.SearchRow((), refused({"total": 21 * GIB}))], "configs/demo.py")
    assert capsys.readouterr().err.splitlines()[-1] == "no candidate fits"
