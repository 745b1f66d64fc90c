"""The kinds of instructions add up to the step."""

import pytest

from benchmarks import kinds
from curia_jax.plan import topologies
from curia_jax.plan.estimator import hlo
from tests.plan.estimator import snippets as s


def test_kinds_add_up_to_all_cycles():
    matmul = """%times (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = f32[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %x = f32[8,128]{1,0:T(8,128)} convolution(%p, %q), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(encoder)/mlp/dot_general"}
}

"""
    text = s.program(
        f"  %a = {s.X} parameter(0)\n  %b = f32[128,128]{{1,0:T(8,128)}} parameter(1)\n"
        + s.fusion("f", s.X, "%a, %b", 1000, calls="times")
        + s.fusion("v", "f32[8,257]{1,0:T(8,128)}", "%a", 300, "jit(step)/jvp(encoder)/mlp/square")
        + s.fusion("w", s.X, "%a", 200, "jit(step)/transpose(jvp(encoder))/mlp/mul")
        + s.fusion("o", s.X, "%a", 70, "jit(step)/optimizer/mul"),
        matmul,
    )
    chip = topologies.CHIPS["v6e"]
    found = kinds.kinds(hlo.parse(text), chip)
    cycles = {name: round(seconds * chip.clock) for name, (seconds, _) in found.items()}
    assert list(cycles.values()) == [1000, 300, 200, 70]
    assert [name.split(":")[0].split(",")[0] for name in cycles] == ["matmuls", "LayerNorm", "LayerNorm", "the rest"]
    assert found["matmuls, with what is fused into them"].matmul_seconds == pytest.approx(2 * 8 * 128 * 128 / 918e12)
