"""Arithmetic of an estimate: communication, parts, input, cost."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.plan import topology as topologies
from curia_jax.plan.estimator import accounting, estimate
from curia_jax.plan.estimator.cost import Cost

V5E = topologies.parse("v5e:16x16")


def wiring(topology: topologies.Topology, **mesh: int) -> estimate.Wiring:
    """Partitions in the order of the coordinates."""
    coordinates = np.array(list(np.ndindex(*topology.shape)))
    return estimate.Wiring(topology, coordinates, {"replica": 1, "data": 1, "fsdp": 1} | mesh)


def test_an_all_reduce_moves_twice_what_an_all_gather_does_over_both_torus_dimensions():
    everyone = (tuple(range(256)),)
    w = wiring(V5E, data=256)
    size = 10**9
    # Two closed dimensions of two links each at 45 GB/s; 8 + 8 hops.
    gather = size * 255 / 256 / (4 * 45e9) + 16e-6
    assert w.seconds("all-gather", size, everyone) == (pytest.approx(gather), 0.0)
    assert w.seconds("all-reduce", size, everyone) == (pytest.approx(2 * (gather - 16e-6) + 16e-6), 0.0)
    assert w.axes(everyone) == "data"


def test_a_row_of_an_open_torus_has_half_the_links():
    topology = topologies.parse("v5e:4x4")
    row = tuple(tuple(range(n, n + 4)) for n in range(0, 16, 4))
    w = wiring(topology, data=4, fsdp=4)
    assert w.seconds("reduce-scatter", 10**9, row)[0] == pytest.approx(1e9 * 3 / 4 / 45e9 + 3e-6)
    assert w.axes(row) == "fsdp"
    assert w.axes((tuple(range(16)),)) == "data+fsdp"


def test_between_tpu_slices_the_data_centre_network_counts():
    w = wiring(topologies.parse("v5e:16x16", 2), replica=2, data=256)
    assert w.seconds("all-reduce", 10**9, None) == (0.0, pytest.approx(2 * 1e9 / 2 / 3.125e9))
    assert w.axes(None) == "replica"


def account(**kwargs) -> accounting.Account:
    return accounting.Account(**{"work": (), "kernels": (), "collectives": ()} | kwargs)


def compute(result: accounting.Account, **kwargs):
    defaults = {"batch_size": 4096, "model_flops": 10**14, "hardware_flops": 2 * 10**14, "kernel_flops": {}}
    return estimate.estimate(result, wiring(V5E, data=256), **defaults | kwargs)


def test_the_step_is_computation_and_charge_and_exposed_communication():
    groups = (tuple(range(256)),)
    ring = accounting.Collective("all-reduce", "x", 10**6, groups, 2, cycles=3e6, hidden=1.5e6, overlapped=True)
    kernel = accounting.Kernel("tpu_custom_call", "jit(step)/jvp(encoder)/attention/k", 10**6, 197 * 10**9, 1)
    work = (accounting.Work("jit(step)/jvp(encoder)/mlp/dot_general", 15_000_000, 1),)
    plan = compute(account(work=work, kernels=(kernel,), collectives=(ring,)))
    assert plan["compute_seconds"] == pytest.approx(0.01)  # at 1.5 GHz
    assert plan["roofline_seconds"] == pytest.approx(197e9 / 197e12 / 0.8)
    assert plan["exposed_collective_seconds"] == pytest.approx(2 * 1.5e6 / 1.5e9)
    step = 0.01 + 0.00125 + 0.002
    assert plan["estimated_step_seconds"] == pytest.approx(step)
    assert plan["unestimated_fraction"] == pytest.approx(0.00125 / step)
    assert plan["exposed_collective_fraction"] == pytest.approx(0.002 / step)
    assert plan["estimated_mfu"] == pytest.approx(1e14 / step / (197e12 * 256))
    assert plan["images_per_second_per_chip"] == pytest.approx(4096 / step / 256)
    assert {p["part"]: round(p["fraction"], 4) for p in plan["parts"]} == {
        "encoder mlp": round(0.01 / 0.01125, 4),
        "encoder attention": round(0.00125 / 0.01125, 4),
    }
    assert math.isclose(sum(p["fraction"] for p in plan["parts"]), 1)
    (row,) = plan["collectives"]
    assert (row["count"], row["bytes"], row["axis"], row["overlapped"]) == (2, 2 * 10**6, "data", True)


def test_a_part_says_what_bounds_it():
    flops, operations, moved = 197 * 10**9, 4096 * 1_500_000, 819 * 10**6  # a millisecond each
    costs = [(flops, 0, moved // 2), (flops // 4, operations // 2, 0), (0, 0, moved)]
    work = tuple(accounting.Work("jit(step)/encoder/mlp/x", 6_000_000, 2, Cost(*cost)) for cost in costs)
    copies = (accounting.Transfer("jit(step)/encoder/mlp/x", moved, 3),)
    (row,) = compute(account(work=work, transfers=copies))["parts"]
    assert row["seconds"] == pytest.approx(3 * 4e-3)
    assert row["product_seconds"] == pytest.approx(2 * 1.25e-3)
    assert row["vector_seconds"] == pytest.approx(2 * 0.5e-3)
    assert row["hbm_seconds"] == pytest.approx(2 * 1.5e-3 + 3e-3)
    assert row["bound_seconds"] == pytest.approx(2 * (1 + 0.5 + 1) * 1e-3)


def test_a_kernel_that_states_no_flops_has_those_that_the_traced_program_says_of_its_results():
    shapes = ((16, 257), (16, 1)), ((16, 257),)
    kernels = tuple(accounting.Kernel("tpu_custom_call", "x", 8, None, 2, shapes=one) for one in shapes)
    plan = compute(account(kernels=kernels), kernel_flops={shapes[0]: 3 * 197 * 10**9, shapes[1]: 197 * 10**9})
    assert plan["roofline_seconds"] == pytest.approx(2 * (3 + 1) * 1e-3 / 0.8)


def test_a_kernel_bound_by_memory_is_charged_its_bytes():
    plan = compute(account(kernels=(accounting.Kernel("sort", "x", 819 * 10**6, None, 1),)))
    assert plan["roofline_seconds"] == pytest.approx(1e-3 / 0.8)


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/jvp(encoder)/while/body/closed_call/attention/dot_general", "encoder attention"),
        ("jit(step)/transpose(jvp(decoder))/while/body/closed_call/mlp/mlp/remat2", "decoder mlp"),
        ("jit(step)/transpose(jvp(encoder))/patch_embed/add", "patch_embed"),
        ("jit(step)/jvp(encoder)/mask/jit(argsort)/sort", "encoder mask"),
        ("jit(step)/jvp(decoder)/norm/mul", "decoder norm"),
        ("jit(step)/jvp(encoder)/attention/norm/mul", "encoder norm"),
        ("jit(step)/jvp(loss)/reduce_sum", "loss"),
        ("jit(step)/augment/gather", "augment"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(encoder)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice", "encoder stacking"),
        ("jit(step)/jvp(decoder)/add", "decoder rest"),
        ("jit(step)/reduce_sum", "other"),
        ("convert", "weight conversion"),
        ("", "other"),
    ],
)
def test_parts_come_from_the_named_scopes(op_name: str, part: str):
    assert estimate.part(op_name) == part


def test_input_needs():
    needs = estimate.input_needs(64_000.0, V5E, 60_000.0, loader_per_core=10.0)
    assert needs["hosts"] == 64
    assert needs["host_images_per_second_needed"] == 1000
    assert needs["storage_bytes_per_second_needed"] == 3.84e9
    assert (needs["host_images_per_second_available"], needs["input_suffices"]) == (1120, True)
    assert not estimate.input_needs(64_000.0, V5E, 60_000.0, loader_per_core=8.0)["input_suffices"]
    assert estimate.input_needs(64_000.0, V5E, 60_000.0, None)["input_suffices"] is None


def test_cost_is_chip_hours_times_price():
    cost = estimate.run_cost(36_000, 0.1, V5E, {"date": "d", "currency": "EUR", "per_chip_hour": {"v5e": 2.0}})
    assert (cost["hours"], cost["chip_hours"], cost["cost"], cost["currency"]) == (1.0, 256.0, 512.0, "EUR")
    assert estimate.run_cost(36_000, 0.1, topologies.parse("v7x:2x2x1"), estimate.PRICES)["cost"] is None


def test_a_price_table_replaces_the_built_in_one(tmp_path: Path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"date": "2026-01", "currency": "EUR", "per_chip_hour": {"v5e": 1}}))
    assert estimate.prices(str(file))["per_chip_hour"] == {"v5e": 1.0}
    assert estimate.prices(None) is estimate.PRICES
    for text in ("{", '{"date": "x"}', '{"date": "x", "currency": "y", "per_chip_hour": {"v5e": "cheap"}}', "[]"):
        file.write_text(text)
        with pytest.raises(UserError, match="cannot read the price table .* its form is"):
            estimate.prices(str(file))


def test_the_pareto_front_has_what_nothing_beats():
    def row(rate: float, memory: float) -> dict[str, float]:
        return {"images_per_second_per_chip": rate, "hbm_bytes_per_chip": memory}

    rows = [row(100, 10), row(90, 5), row(80, 7), row(110, 12), row(90, 6)]
    assert estimate.pareto(rows) == [3, 0, 1]


# ---- topologies


def test_topologies_are_read_and_counted():
    two = topologies.parse("v6e:16x16", 2)
    assert (two.chips, two.devices, two.hosts, str(two)) == (512, 512, 128, "2 x v6e:16x16")
    ironwood = topologies.parse("tpu7x:2x2x1")
    assert (ironwood.kind, ironwood.chips, ironwood.devices, ironwood.hosts) == ("v7x", 4, 8, 1)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e", 1, "cannot read the topology 'v5e'; write .* v5e:16x16"),
        ("v9:4x4", 1, "no TPU chip 'v9'; there are: v4, v5e"),
        ("v5p:4x4", 1, "v5p is a 3-D torus, such as v5p:4x4x8"),
        ("v5e:0x4", 1, "2-D torus"),
        ("v5e:4x4", 0, "--slices=0"),
    ],
)
def test_a_topology_that_cannot_be_is_an_error(text: str, slices: int, message: str):
    with pytest.raises(UserError, match=message):
        topologies.parse(text, slices)


def test_peaks_are_those_of_the_meter():
    from curia_jax import telemetry

    names = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "v7x": "TPU7x"}
    for kind, name in names.items():
        chip = topologies.CHIPS[kind]
        assert chip.flops / chip.devices == telemetry.PEAK_FLOPS[name]
