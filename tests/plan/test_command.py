"""The planner as a command: real compilations of a tiny model, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from curia_jax.models import attention
from curia_jax.plan import __main__ as command
from curia_jax.plan import compile as compiling
from curia_jax.plan import report, search
from curia_jax.plan import topology as topologies

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--config=tests/configs/tiny.py", "--config.model.dtype=bfloat16"]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def plan(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Runs the command with its cache in `folder`; the suite's own process has other settings of XLA."""
    file = folder / "plan.json"
    file.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "curia_jax.plan", *TINY, f"--json={file}", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return done, json.loads(file.read_text()) if file.exists() else {}


@needs_libtpu
def test_a_plan_has_what_scripts_rely_on_and_is_remembered(tmp_path: Path):
    done, first = plan(tmp_path, "--topology=v5e:2x2", "--examples=1600", "--config.duration=100 epochs")
    assert done.returncode == 0, done.stderr
    assert first["fits"] and not first["cached"]
    assert 0 < first["hbm_bytes_per_chip"] < first["hbm_limit_bytes"]
    assert first["hbm_bytes_per_chip"] == sum(first["memory"].values())
    assert first["estimated_step_seconds"] > 0
    # Model FLOPs are those of the matrix products, forward and twice backward; the program's own products, augmentation
    # and a patch embedding that needs no gradient of its input included, come near.
    assert 0.8 < first["hardware_flops_per_step"] / first["model_flops_per_step"] < 3
    assert first["estimated_mfu"] == pytest.approx(
        first["model_flops_per_step"] / first["estimated_step_seconds"] / (4 * 197e12)
    )
    assert first["images_per_second_per_chip"] == pytest.approx(16 / first["estimated_step_seconds"] / 4)
    assert 0 <= first["exposed_collective_fraction"] < 1 and 0 <= first["unestimated_fraction"] < 0.1
    assert {"encoder attention", "decoder mlp", "optimizer", "augment", "loss"} <= {p["part"] for p in first["parts"]}
    products = sum(p["product_seconds"] for p in first["parts"]) * 4 * 197e12  # as compiled, loops with their trips
    assert products == pytest.approx(first["hardware_flops_per_step"], rel=0.02)
    assert all(0 <= p["bound_seconds"] < p["seconds"] for p in first["parts"])
    moved = sum(p["hbm_seconds"] for p in first["parts"]) * 819e9
    assert moved > first["memory"]["arguments"]  # each is read, at least
    assert {c["axis"] for c in first["collectives"]} >= {"fsdp"}
    assert any(c["kind"] == "all-gather" for c in first["collectives"])  # kernels are gathered where they are used
    assert first["host_images_per_second_needed"] == pytest.approx(16 / first["estimated_step_seconds"])
    assert first["total_steps"] == 10_000
    assert first["chip_hours"] == pytest.approx(10_000 * first["estimated_step_seconds"] / 3600 * 4)
    assert first["cost"] == pytest.approx(first["chip_hours"] * 1.20)
    assert "where the time goes" in done.stderr and "not measured" in done.stderr and done.stdout == ""

    done, second = plan(tmp_path, "--topology=v5e:2x2", "--examples=1600", "--config.duration=100 epochs")
    assert second["cached"]
    assert {k: v for k, v in second.items() if k != "cached"} == {k: v for k, v in first.items() if k != "cached"}


@needs_libtpu
def test_two_tpu_slices_talk_over_the_data_centre_network(tmp_path: Path):
    mesh = ["--config.mesh.replica=2", "--config.mesh.data=4", "--config.mesh.fsdp=1"]
    done, found = plan(tmp_path, "--topology=v6e:2x2", "--slices=2", *mesh)
    assert done.returncode == 0, done.stderr
    assert found["hbm_limit_bytes"] > 30 * 2**30 and found["chips"] == 8
    between = [c for c in found["collectives"] if c["axis"] == "replica"]
    assert between and all(c["dcn_seconds"] > 0 and c["ici_seconds"] == 0 for c in between)
    # Every gradient crosses, at least two bytes for each parameter; each of four chips sends a quarter.
    assert sum(c["bytes"] for c in between) >= 2 * found["parameters"] / 4


ERRORS = [
    (["--topology=v5e:4x4"], "mesh replica=1, data=2, fsdp=2 does not fit v5e:4x4, which has 16 devices"),
    (["--topology=v5e:2x2", "--slices=2"], "--config.mesh.replica=2 --config.mesh.data=2 --config.mesh.fsdp=2"),
    (["--topology=v5e:2x2", "--config.batch_size=6"], "does not divide over 4 devices"),
    (["--topology=v5e:2x2", "--config.modle.size=B"], "did you mean --config.model.size"),
    (["--topology=v5e:2x2", "--config.duration=1 example"], "less than one step"),
    (["--topology=v5e:3x7"], "libtpu knows no topology v5e:3x7"),
    (["--topology=v5e:2x2", "--prices=/nowhere"], "cannot read the price table"),
]
ASK = """
import contextlib, io, json, sys
from curia_jax.plan import __main__ as command
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        code = command.main(words)
    found.append((code, stream.getvalue()))
print(json.dumps(found))
"""


@needs_libtpu
def test_what_cannot_be_is_one_line():
    lines = json.dumps([[*TINY, *words] for words, _ in ERRORS])
    done = subprocess.run([sys.executable, "-c", ASK, lines], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (words, message), (code, error) in zip(ERRORS, json.loads(done.stdout), strict=True):
        assert (code, error.count("\n")) == (2, 1), (words, error)
        assert error.startswith("error: ") and message in error, words


def test_without_the_compiler_one_line_says_how_to_install_it(monkeypatch, capsys):
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(topologies, "prepare_environment", lambda: None)  # the suite's process keeps its own
    assert command.main([*TINY, "--topology=v5e:2x2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'curia-jax[plan]'" in error


# ---- FLOPs of a traced program


def test_flops_of_products_loops_and_recomputation_are_exact():
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def layer(x, kernel):
        return jnp.sin(x @ kernel)

    def loss(w, a, body):
        return jnp.sum(jax.lax.scan(lambda x, k: (body(x, k), None), a, w)[0])

    one = 2 * 8 * 16 * 16
    forward = jax.jit(lambda w, a: loss(w, a, layer)).trace(w, a)
    assert compiling.hardware_flops(forward) == (5 * one, 0)
    plain = jax.jit(lambda w, a: jax.grad(loss)(w, a, layer)).trace(w, a)
    assert compiling.hardware_flops(plain) == (3 * 5 * one, 0)
    again = jax.jit(lambda w, a: jax.grad(loss)(w, a, jax.checkpoint(layer))).trace(w, a)
    assert compiling.hardware_flops(again) == (4 * 5 * one, 0)


def test_flops_of_batched_products():
    q = jax.ShapeDtypeStruct((2, 7, 3, 4), jnp.float32)
    traced = jax.jit(lambda q: jnp.einsum("bqhd,bkhd->bhqk", q, q)).trace(q)
    assert compiling.hardware_flops(traced) == (2 * 2 * 3 * 7 * 7 * 4, 0)


def test_flops_of_a_custom_kernel_count_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = x[...] @ x[...]

    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, grid=(4,), in_specs=[spec], out_specs=spec, out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32)
    )
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((32, 8), jnp.float32))
    flops = 4 * 2 * 8 * 8 * 8
    assert compiling.hardware_flops(traced) == (flops, flops)
    assert compiling.kernel_flops(traced) == {((32, 8),): flops}


def test_flops_are_those_of_the_program_for_a_tpu():
    """Both passes of attention are kernels there; elsewhere the backward pass is six products instead of five."""
    qkv, bias = jax.ShapeDtypeStruct((2, 17, 3 * 32), jnp.bfloat16), jax.ShapeDtypeStruct((3 * 32,), jnp.float32)
    traced = jax.jit(jax.grad(lambda qkv, bias: jnp.sum(attention.pallas_attention(qkv, bias, 4)))).trace(qkv, bias)
    one = 2 * 2 * 17 * 17 * 32  # q k^T, over all heads
    assert compiling.hardware_flops(traced) == (7 * one, 7 * one)
    assert compiling.kernel_flops(traced) == {((2, 17, 32),): 2 * one, ((2, 17, 96), (2, 1, 96)): 5 * one}


# ---- what does not fit


REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.44G of 15.75G hbm. Exceeded hbm capacity by 5.69G.

Total hbm usage >= 21.69G:
    reserved        258.00M
    program          21.44G
    arguments         1.25G

  Largest program allocations in hbm:

  1. Size: 6.25G
     Operator: op_name="jit(step)/jvp(decoder)/while" stack_frame_id=273
     Shape: f32[8,256,16,197,197]{4,3,2,1,0:T(8,128)}
     Unpadded size: 4.74G
     ==========================

  2. Size: 108.00M
     Shape: f32[12,768,3072]{2,1,0:T(8,128)}
     Unpadded size: 108.00M
"""


def test_a_refusal_for_memory_is_read():
    memory, limit, largest = compiling.out_of_memory(REFUSAL)
    assert (memory, limit) == ({"total": int(21.44 * 2**30)}, int(15.75 * 2**30))
    assert largest[0] == (
        int(6.25 * 2**30),
        "f32[8,256,16,197,197]{4,3,2,1,0:T(8,128)}",
        "jit(step)/jvp(decoder)/while",
    )
    assert largest[1][0] == 108 * 2**20
    short = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.82G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compiling.out_of_memory(short) == ({"temporaries": int(24.82 * 2**30)}, limit, [])
    assert compiling.out_of_memory("INTERNAL: something else") is None


class Told(search.Planner):
    """A planner that has been told what compilations say: config -> (GiB, images/s per chip), of 10 GiB."""

    def __init__(self, memory) -> None:
        super().__init__(topologies.parse("v5e:2x2"), {}, {})
        object.__setattr__(self, "memory", memory)
        object.__setattr__(self, "asked", [])

    def plan(self, config) -> dict:
        self.asked.append(config)
        used, rate = self.memory(config)
        result = {"fits": used < 10, "hbm_bytes_per_chip": used * 2**30, "hbm_limit_bytes": 10 * 2**30}
        if used < 10:
            result |= {"images_per_second_per_chip": rate, "estimated_mfu": 0.1, "exposed_collective_fraction": 0.0}
        return result | {"topology": "v5e:2x2", "estimated_step_seconds": 1.0}


def test_what_would_fit_is_said():
    told = Told(lambda c: ({"none": 21.0, "matmuls": 12.0, "full": 9.0}[c.model.remat], 1.0))
    would = search.what_would_fit(told, str(ROOT / "tests/configs/tiny.py"), [], seconds=60.0)
    assert would == {"overrides": ["--config.model.remat=full"], "hbm_bytes_per_chip": 9 * 2**30}
    plan = told.plan(told.asked[0]) | {"would_fit": would}
    plan["fits"] = False
    assert "does not fit: v5e:2x2 needs" in report.verdict(
        plan
    ) and "try --config.model.remat=full (9.00 GiB)" in report.verdict(plan)
    assert (
        search.what_would_fit(Told(lambda c: (21.0, 1.0)), str(ROOT / "tests/configs/tiny.py"), [], seconds=60.0)
        is None
    )


def test_a_search_finds_the_fastest_that_fits_and_compiles_nothing_twice():
    def said(c) -> tuple[float, float]:
        memory = {"none": 6.0, "matmuls": 4.0, "full": 2.0}[c.model.remat] * c.batch_size / 16
        return memory, c.batch_size * {"none": 3.0, "matmuls": 2.5, "full": 2.0}[
            c.model.remat
        ] * c.model.unroll / c.mesh.fsdp

    told = Told(said)
    rows = search.search(told, str(ROOT / "tests/configs/tiny.py"), [], seconds=600.0)
    best = next(row for row in rows if row.best)
    assert best is rows[0]
    # Without recomputation, unrolled, parameters whole; twice the batch would not fit.
    assert {"--config.model.unroll=2", "--config.mesh.data=4", "--config.mesh.fsdp=1"} <= set(best.overrides)
    assert not any("batch_size=32" in word for word in best.overrides)
    assert len(told.asked) == len(rows) == len({str(c) for c in told.asked})
    assert best.on_front and any(row.on_front and "remat=full" in " ".join(row.overrides) for row in rows)


def test_a_search_stops_at_its_limit():
    told = Told(lambda c: (1.0, 1.0))
    assert len(search.search(told, str(ROOT / "tests/configs/tiny.py"), [], seconds=-1.0)) == 1
