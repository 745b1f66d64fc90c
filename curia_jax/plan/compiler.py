"""Compiles the train step of a config for a TPU topology; keeps the compiler's answers in the user's cache folder."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from curia_common import logs
from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import sharding
from curia_jax.objectives import base, mae
from curia_jax.plan import topologies
from curia_jax.plan.estimator import LargeTensor

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
logger = logs.get_logger(__name__)


class Allocation(NamedTuple):
    """An array in the memory of one device, and the op_name of what makes it."""

    bytes: int
    shape: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer for one device's program.

    Attributes:
      text: of the scheduled program; empty if the compiler gives none in a known form.
      refused: the program needs more memory than there is.
      memory: bytes per device: arguments, temporaries, outputs (without those that reuse an argument's memory), code. Of a
        refused program, what is known of them, or their `total`.
      limit: bytes per device that a program may use.
      largest: largest allocations of a refused program, if the compiler lists them.
      seconds: that compiling took.
      cached: it was compiled before.
      hash: of program, compiler and topology.
    """

    text: str
    refused: bool
    memory: Mapping[str, int]
    limit: int
    largest: tuple[Allocation, ...]
    seconds: float
    cached: bool
    hash: str

    @property
    def fits(self) -> bool:
        return not self.refused and sum(self.memory.values()) <= self.limit


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """The train step of a config, traced for a topology."""

    objective: base.Objective
    mesh: jax.sharding.Mesh
    traced: jax.stages.Traced
    total_steps: int


def trace_step(
    config: ml_collections.ConfigDict,
    topology: topologies.Topology,
    *,
    examples: int,
    canvas: tuple[int, int],
    make: Callable[..., base.Objective] = mae.make,
) -> TracedStep:
    """Traces the step that a run with this config takes.

    Args:
      examples: per epoch.
      canvas: height and width of the pixels in a batch.
      make: builds the objective; benchmarks pass their own.

    Raises:
      UserError: the mesh does not fit the topology, or what `make` raises.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(topology))
    batch = {"batch_size": config.batch_size, "examples": examples}
    total_steps = configs.steps(config.duration, **batch)
    warmup_steps = max(1, configs.steps(config.warmup, **batch, total=total_steps))
    if total_steps < 1:
        raise UserError(f"duration {config.duration!r} is less than one step of {config.batch_size} examples")
    objective = make(config, mesh, canvas=canvas, warmup_steps=warmup_steps, total_steps=total_steps)
    return TracedStep(objective, mesh, objective.trace(), total_steps)


def arguments(step: TracedStep) -> list[LargeTensor]:
    """Every array that the step takes, with its shape and bytes on one device; the largest first."""
    trees = {"state": step.objective.abstract_state, "batch": step.objective.abstract_batch}
    rows = []
    for path, leaf in sharding.paths(trees).items():
        shape, dtype = leaf.sharding.shard_shape(leaf.shape), np.dtype(leaf.dtype)
        rows.append(LargeTensor(path, f"{dtype.name}{list(shape)}", math.prod(shape) * dtype.itemsize, "argument"))
    return sorted(rows, key=lambda row: -row.bytes)


# ---- compiling


def compile_for(
    topology: topologies.Topology,
    traced: jax.stages.Traced,
    *,
    options: Mapping[str, str] | None = None,
    argument_bytes: int = 0,
) -> Compiled:
    """Compiles a program, unless the cache has the compiler's answer.

    Args:
      traced: its arguments are on the topology's devices.
      options: of the compiler.
      argument_bytes: per device; for a program that is refused, of which the compiler may state temporaries alone.

    Raises:
      UserError: the compiler refuses the program for another reason than memory.
    """
    lowered = traced.lower()
    options = dict(options or {})
    key = program_hash(lowered, topology, options)
    if (kept := _load(key)) is not None:
        return kept
    limit = int(topology.chip.hbm / topology.chip.devices)
    began = time.perf_counter()
    try:
        compiled, text = _compile(lowered, options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        refusal = out_of_memory(str(error))
        if refusal is None:
            raise UserError(f"the TPU compiler refuses the program for {topology}: {str(error)[:400]}") from error
        memory = refusal.memory if "total" in refusal.memory else {"arguments": argument_bytes, **refusal.memory}
        seconds = time.perf_counter() - began
        result = Compiled("", True, memory, refusal.limit or limit, refusal.largest, seconds, False, key)
    else:
        stats = compiled.memory_analysis()
        assert stats is not None  # libtpu always reports it
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }
        result = Compiled(text, False, memory, limit, (), time.perf_counter() - began, False, key)
    if result.text or result.refused:  # a missing text may be the fault of a full disk
        _save(result)
    return result


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, str]) -> tuple[jax.stages.Compiled, str]:
    """The executable, and the text of its scheduled program; empty if there is none."""
    # jax 0.10 cannot print a program that uses SparseCores (an operand too many), so the compiler writes it to a file.
    if not any("sparse_core" in name for name in options):
        with _without_jax_cache():
            compiled = lowered.compile(compiler_options=dict(options))
        try:
            return compiled, compiled.as_text() or ""
        except Exception as error:  # noqa: BLE001 - memory and fit are known without the text
            logger.warning("cannot print the compiled program: %s", error)
            return compiled, ""
    with _without_jax_cache(), tempfile.TemporaryDirectory(prefix="curia_jax_plan_") as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.after_codegen.txt"))]
    return compiled, texts[0] if len(texts) == 1 else ""


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """JAX's own compilation cache would keep executables for hardware that is not here."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue] - set at run time
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


class Refusal(NamedTuple):
    """A refusal for memory.

    Attributes:
      memory: bytes per device, as `total` or as `temporaries` alone; empty if the message states none.
      limit: bytes that there are; None if the message does not say.
    """

    memory: dict[str, int]
    limit: int | None
    largest: tuple[Allocation, ...]


def out_of_memory(message: str) -> Refusal | None:
    """Reads the compiler's refusal for memory; None for any other message."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    forms = {
        "temporaries": rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)",
        "total": rf"[Uu]sed {size} of {size} hbm",
    }
    listed = rf"Size: {size}\s+(?:Operator: op_name=\"([^\"]*)\"[^\n]*\s+)?Shape: (\S+)"
    largest = tuple(
        Allocation(int(float(amount) * UNITS[unit]), shape, op_name)
        for amount, unit, op_name, shape in re.findall(listed, message)
    )
    for name, form in forms.items():
        if (match := re.search(form, message)) is not None:
            used, limit = (int(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))
            return Refusal({name: used}, limit, largest)
    if "RESOURCE_EXHAUSTED" in message and "hbm" in message.lower():  # in words of another libtpu version; not VMEM
        return Refusal({}, None, largest)
    return None


# ---- cache


def cache_folder() -> Path:
    """Where the compiler's answers are kept: $XDG_CACHE_HOME/curia_jax/plan or ~/.cache/curia_jax/plan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curia_jax" / "plan"


def program_hash(lowered: jax.stages.Lowered, topology: topologies.Topology, options: Mapping[str, str]) -> str:
    """Hash of the program, its op_names, the compiler's version and options, and the topology."""
    # op_names are in the program's locations, whose files and lines must not count.
    names = sorted(set(re.findall(r'"(jit\([^"]*)"', lowered.as_text(debug_info=True))))
    versions = [topologies.compiler_version(), jax.__version__, str(topology)]
    whole = "\0".join([lowered.as_text(), *names, *versions, *map(str, sorted(options.items()))])
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _load(key: str) -> Compiled | None:
    file = cache_folder() / f"{key}.json.gz"
    try:
        fields = json.loads(gzip.decompress(file.read_bytes()))
        fields["largest"] = tuple(Allocation(*row) for row in fields["largest"])
        return Compiled(**fields | {"cached": True})
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # damaged, or of an earlier version: compiled again
        file.unlink(missing_ok=True)
        return None


def _save(result: Compiled) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{result.hash}.{os.getpid()}.tmp"
    temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), 5))
    os.replace(temporary, folder / f"{result.hash}.json.gz")


def last_seconds() -> float | None:
    """How long the newest answer in the cache took to compile; None without one."""
    files = sorted(cache_folder().glob("*.json.gz"), key=lambda f: f.stat().st_mtime)
    kept = _load(files[-1].name.split(".")[0]) if files else None
    return kept.seconds if kept else None
