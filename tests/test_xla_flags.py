"""Compiler options by chip, and how a run changes them."""

import jax
import pytest

from curia_jax.xla_flags import compiler_options


def test_cpu_gets_no_options() -> None:
    assert compiler_options("cpu", replicas=2) == {}


def test_gpu_options_are_known_to_xla() -> None:
    options: dict[str, str | bool] = {**compiler_options("NVIDIA H200", replicas=1)}
    assert float(jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)(1.0)) == 2.0


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU v4"])
def test_several_tpu_slices_add_one_option(kind: str) -> None:
    one, two = (compiler_options(kind, replicas) for replicas in (1, 2))
    assert two == one | {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def test_overrides_change_add_and_remove_options() -> None:
    limit, combiner = "xla_tpu_scoped_vmem_limit_kib", "xla_tpu_ars_combiner_threshold_in_bytes"
    before = compiler_options("TPU v5 lite", replicas=1)
    after = compiler_options("TPU v5 lite", 1, {limit: 32768, combiner: None, "xla_new": True})
    assert after == {name: value for name, value in before.items() if name != combiner} | {
        limit: "32768",
        "xla_new": "true",
    }
    assert compiler_options("TPU v5 lite", replicas=1) == before
