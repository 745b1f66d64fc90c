"""Step estimates: arithmetic, parts of the model, and text that cannot be read."""

import math

import jax
import numpy as np
import pytest

from curia_jax.plan import estimator, topologies
from curia_jax.plan.estimator import accounting
from curia_jax.plan.estimator.cost import Cost
from curia_jax.plan.estimator.network import Network
from curia_jax.plan.estimator.step import part_of, summarize
from tests.plan.estimator import snippets as s

V5E = topologies.parse("v5e:16x16")


def account(**kwargs) -> accounting.Account:
    return accounting.Account(**{"costed": (), "uncosted": (), "collectives": ()} | kwargs)


def estimate(of: accounting.Account, **kwargs) -> estimator.StepEstimate:
    coordinates = np.array(list(np.ndindex(*V5E.shape)))
    network = Network(V5E, coordinates, {"replica": 1, "data": 256, "fsdp": 1})
    defaults = {"batch_size": 4096, "model_flops": 10**14, "hardware_flops": 2 * 10**14, "pallas_flops": {}}
    return summarize(of, network, **defaults | kwargs)


def test_step_is_computation_and_charge_and_exposed_communication():
    groups = (tuple(range(256)),)
    ring = accounting.Collective("all-reduce", "x", 10**6, groups, 2, cycles=3e6, hidden=1.5e6, overlapped=True)
    kernel = accounting.UncostedOp("tpu_custom_call", "jit(step)/jvp(encoder)/attention/k", 10**6, 197 * 10**9, 1)
    costed = (accounting.CostedOp("jit(step)/jvp(encoder)/mlp/dot_general", 15_000_000, 1),)
    found = estimate(account(costed=costed, uncosted=(kernel,), collectives=(ring,)))
    assert found.compute_seconds == pytest.approx(0.01)  # at 1.5 GHz
    assert found.roofline_seconds == pytest.approx(197e9 / 197e12 / 0.8)
    assert found.exposed_collective_seconds == pytest.approx(2 * 1.5e6 / 1.5e9)
    step = 0.01 + 0.00125 + 0.002
    assert found.estimated_step_seconds == pytest.approx(step)
    assert found.unestimated_fraction == pytest.approx(0.00125 / step)
    assert found.exposed_collective_fraction == pytest.approx(0.002 / step)
    assert found.estimated_mfu == pytest.approx(1e14 / step / (197e12 * 256))
    assert found.images_per_second_per_chip == pytest.approx(4096 / step / 256)
    assert {p.part: round(p.fraction, 4) for p in found.parts} == {
        "encoder mlp": round(0.01 / 0.01125, 4),
        "encoder attention": round(0.00125 / 0.01125, 4),
    }
    assert math.isclose(sum(p.fraction for p in found.parts), 1)
    (row,) = found.collectives
    assert (row.count, row.bytes, row.axis, row.overlapped) == (2, 2 * 10**6, "data", True)


def test_part_states_its_lower_bounds():
    flops, operations, moved = 197 * 10**9, 4096 * 1_500_000, 819 * 10**6  # a millisecond each
    costs = [(flops, 0, moved // 2), (flops // 4, operations // 2, 0), (0, 0, moved)]
    costed = tuple(accounting.CostedOp("jit(step)/encoder/mlp/x", 6_000_000, 2, Cost(*cost)) for cost in costs)
    copies = (accounting.AsyncCopy("jit(step)/encoder/mlp/x", moved, 3),)
    (part,) = estimate(account(costed=costed, copies=copies)).parts
    assert part.seconds == pytest.approx(3 * 4e-3)
    assert part.product_seconds == pytest.approx(2 * 1.25e-3)
    assert part.vector_seconds == pytest.approx(2 * 0.5e-3)
    assert part.hbm_seconds == pytest.approx(2 * 1.5e-3 + 3e-3)
    assert part.bound_seconds == pytest.approx(2 * (1 + 0.5 + 1) * 1e-3)


def test_pallas_kernel_without_stated_flops_takes_the_traced_ones():
    shapes = ((16, 257), (16, 1)), ((16, 257),)
    kernels = tuple(accounting.UncostedOp("tpu_custom_call", "x", 8, None, 2, shapes=one) for one in shapes)
    found = estimate(account(uncosted=kernels), pallas_flops={shapes[0]: 3 * 197 * 10**9, shapes[1]: 197 * 10**9})
    assert found.roofline_seconds == pytest.approx(2 * (3 + 1) * 1e-3 / 0.8)


def test_memory_bound_kernel_is_charged_for_its_bytes():
    found = estimate(account(uncosted=(accounting.UncostedOp("sort", "x", 819 * 10**6, None, 1),)))
    assert found.roofline_seconds == pytest.approx(1e-3 / 0.8)


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
        ("jit(step)/transpose(jvp(head))/dot_general", "head"),
        ("jit(step)/jvp(encoder)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice", "encoder stacking"),
        ("jit(step)/jvp(decoder)/add", "decoder rest"),
        ("jit(step)/reduce_sum", "other"),
        ("convert", "weight conversion"),
        ("", "other"),
    ],
)
def test_parts_come_from_named_scopes(op_name: str, part: str):
    assert part_of(op_name) == part


# ---- the public door


class Device:
    """The one property of a described TPU device that an estimate needs."""

    def __init__(self, coords: tuple[int, int, int]) -> None:
        self.coords = coords


def read(text: str, hardware_flops: int = 0) -> estimator.StepEstimate:
    """Estimates a program for two chips."""
    topology = topologies.parse("v5e:2x1")
    devices = np.empty((1, 2, 1), dtype=object)
    devices[0, :, 0] = [Device((n, 0, 0)) for n in range(2)]
    mesh = jax.sharding.Mesh(devices, ("replica", "data", "fsdp"))
    return estimator.estimate(
        text, topology, mesh, batch_size=2, model_flops=1, hardware_flops=hardware_flops, pallas_flops={}
    )


PROGRAM = s.program(
    f"  %a = {s.X} parameter(0)\n" + s.fusion("f", s.X, "%a", 1500) + s.while_("w", "l"),
    s.loop("l", 12, s.fusion("g", s.X, "%x.l", 250)),
)


def test_estimate_reads_a_program_and_its_largest_tensors():
    found = read(PROGRAM)
    assert found.estimated_step_seconds == pytest.approx(3e-6)
    assert (found.largest_temporaries[0].shape, found.largest_temporaries[0].bytes) == ("f32[8, 128]", 4096)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (PROGRAM, "", "not marked as scheduled"),
        ("is_scheduled=true", "scheduled=yes", "not marked as scheduled"),
        ("ENTRY ", "", "no entry computation"),
        ("estimated_cycles", "predicted_cycles", "no estimated_cycles"),
        ("condition=%l_cond", "condition=%elsewhere", "no computation elsewhere"),
        ("body=%l_body", "loop_body=%l_body", "no computation"),
        ("constant(12)", "constant(twelve)", "trip count"),
        ("direction=LT", "direction=BELOW", "trip count"),
        ("fusion(%a)", "fusion %a", "cannot read the instruction f"),
        ("[8,128]", "[8x128]", "cannot read the shape of p"),
    ],
)
def test_estimate_raises_for_text_in_an_unknown_form(old: str, new: str, message: str):
    assert old in PROGRAM
    with pytest.raises(estimator.HloError, match=message):
        read(PROGRAM.replace(old, new))


def test_estimate_raises_where_the_text_lacks_most_matmuls():
    """Text that is read without error, but not understood."""
    with pytest.raises(estimator.HloError, match="matmul FLOPs by its text, but the traced step has"):
        read(PROGRAM, hardware_flops=10**9)
