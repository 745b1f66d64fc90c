"""Compiles the train step of a config for a topology, and keeps what the compiler said in the user's cache directory."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import sharding
from curia_jax.objectives import mae as objective
from curia_jax.plan import topology as topologies
from curia_jax.plan.estimator.accounting import Shapes

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one device's program.

    Attributes:
      text: the scheduled program; empty where it does not fit.
      memory: bytes per device: arguments, temporaries, outputs (less aliased), code; what is known of them, or only their
        `total`, where it does not fit.
      limit: bytes per device that a program may use.
      largest: what the compiler lists as the largest allocations of a program that does not fit: (bytes, shape, op_name).
      seconds: the compilation took. cached: not this time.
      hash: of program, compiler and topology.
    """

    text: str
    memory: dict[str, int]
    limit: int
    largest: list[tuple[int, str, str]]
    seconds: float
    cached: bool
    hash: str

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return bool(self.text) and self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Job:
    """A config on a topology, traced but not compiled."""

    objective: objective.MAEObjective
    mesh: jax.sharding.Mesh
    traced: Any
    total_steps: int
    examples: int
    canvas: tuple[int, int]


def job(
    config: ml_collections.ConfigDict,
    topology: topologies.Topology,
    *,
    examples: int,
    canvas: tuple[int, int],
    make: Callable[..., objective.MAEObjective] = objective.make,
) -> Job:
    """Traces the step that `pretrain` runs with this config.

    Args:
      examples: slices in an epoch. canvas: height and width of the pixels in a batch.
      make: what makes the step; benchmarks plan others.

    Raises:
      UserError: the mesh does not fit the topology, or what objective.make raises.
    """
    mesh = make_mesh(config, topology)
    share = {"batch_size": config.batch_size, "examples": examples}
    total_steps = configs.steps(config.duration, **share)
    warmup_steps = max(1, configs.steps(config.warmup, **share, total=total_steps))
    if total_steps < 1:
        raise UserError(f"duration {config.duration!r} is less than one step of {config.batch_size} examples")
    made = make(config, mesh, canvas=canvas, warmup_steps=warmup_steps, total_steps=total_steps)
    return Job(made, mesh, made.trace(), total_steps, examples, canvas)


def make_mesh(config: ml_collections.ConfigDict, topology: topologies.Topology) -> jax.sharding.Mesh:
    """The config's mesh on the topology's devices.

    Raises:
      UserError: they do not fit; the message has a mesh that does.
    """
    devices = topologies.devices(topology)
    sizes = [config.mesh.replica, config.mesh.data, config.mesh.fsdp]
    fixed = math.prod(s for s in sizes if s != -1)
    fits = topology.devices % fixed == 0 if -1 in sizes else fixed == topology.devices
    if not fits or config.mesh.replica not in (-1, topology.slices):
        inner = topology.devices // topology.slices
        fsdp = math.gcd(inner, max(1, config.mesh.fsdp))
        named = ", ".join(f"{name}={size}" for name, size in zip(sharding.AXES, sizes, strict=True))
        raise UserError(
            f"mesh {named} does not fit {topology}, which has {topology.devices} devices in {topology.slices} TPU slice"
            f"{'s' if topology.slices > 1 else ''}; set --config.mesh.replica={topology.slices} "
            f"--config.mesh.data={inner // fsdp} --config.mesh.fsdp={fsdp}"
        )
    return sharding.make_mesh(**config.mesh, devices=devices)


# ---- FLOPs of the traced program


def hardware_flops(traced: Any) -> tuple[int, int]:
    """FLOPs of all matrix products of a traced program, recomputation included, and those of custom kernels among them.

    Over all devices; a multiply-add counts as two, whatever its precision.
    """
    return _flops(traced.jaxpr.jaxpr)


def _flops(jaxpr: Any) -> tuple[int, int]:
    total = kernels = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
            continue
        if name == "conv_general_dilated":
            spec = params["dimension_numbers"].rhs_spec
            kernel = equation.invars[1].aval.shape
            per_output = math.prod(kernel) // kernel[spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * per_output
            continue
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        elif name == "shard_map":
            times = params["mesh"].size
        inner = [_flops(sub) for sub in _branches(params)]
        if name == "cond":
            inner = [max(inner)] if inner else []
        for flops, of_kernels in inner:
            total += times * flops
            kernels += times * (flops if name == "pallas_call" else of_kernels)
    return total, kernels


def kernel_flops(traced: Any) -> dict[Shapes, int]:
    """FLOPs of the matrix products of one call of each custom kernel on one device, by the shapes of its results."""
    found: dict[Shapes, int] = {}

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            inner = _branches(equation.params)
            if equation.primitive.name == "pallas_call":
                shapes = tuple(tuple(out.aval.shape) for out in equation.outvars)
                flops = math.prod(equation.params["grid_mapping"].grid) * sum(_flops(sub)[0] for sub in inner)
                found[shapes] = max(flops, found.get(shapes, 0))
            else:
                for sub in inner:
                    walk(sub)

    walk(traced.jaxpr.jaxpr)
    return found


def _branches(params: dict[str, Any]) -> list[Any]:
    """Programs in an equation; of those that are chosen by the platform, the TPU's."""
    platforms = params.get("branches_platforms")
    if platforms is None:
        return _jaxprs(params)
    chosen = next(n for n, names in enumerate(platforms) if names is None or "tpu" in names)
    return _jaxprs({"branch": params["branches"][chosen]})


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


# ---- compiling, or remembering


def cache_folder() -> Path:
    """Where results are kept: $XDG_CACHE_HOME/curia_jax/plan or ~/.cache/curia_jax/plan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curia_jax" / "plan"


def program_hash(lowered: Any, topology: topologies.Topology, options: Mapping[str, str]) -> str:
    """Hash of the program, the names of its parts, the compiler's version and options, and the topology."""
    text = lowered.as_text()
    # Names of parts come from the program's locations, of which file and line do not matter.
    names = sorted(set(re.findall(r'"(jit\([^"]*)"', lowered.as_text(debug_info=True))))
    whole = "\0".join(
        [
            text,
            *names,
            topologies.compiler_version(),
            jax.__version__,
            str(topology),
            *map(str, sorted(options.items())),
        ]
    )
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def compile(
    traced: Any, topology: topologies.Topology, *, argument_bytes: int, options: Mapping[str, str] | None = None
) -> Compiled:
    """Compiles, unless the same program has been compiled before.

    Args:
      traced: a traced program (jax.stages.Traced) whose arguments are on the topology's devices.
      options: of the compiler.
      argument_bytes: of them per device, for a program that does not fit, of which the compiler says little.

    Raises:
      UserError: the compiler refuses the program for another reason than its memory.
    """
    lowered = traced.lower()
    options = dict(options or {})
    key = program_hash(lowered, topology, options)
    kept = _load(key)
    if kept is not None:
        return kept
    began = time.perf_counter()
    limit = int(topology.chip.hbm / topology.chip.devices)
    # Its own text of a program that uses the SparseCores cannot be read through jax 0.10: an operand too many.
    dumped = any("sparse_core" in name for name in options)
    folder = tempfile.TemporaryDirectory(prefix="curia_jax_plan_") if dumped else contextlib.nullcontext("")
    try:
        with _without_jax_cache(), folder as place:
            dump = {"xla_dump_to": place, "xla_dump_hlo_as_text": True} if dumped else {}
            compiled = lowered.compile(compiler_options=options | dump)
            text = _dumped_text(Path(place)) if dumped else compiled.as_text()
    except UserError:
        raise
    except Exception as error:
        parsed = out_of_memory(str(error))
        if parsed is None:
            raise UserError(f"the TPU compiler refuses the program for {topology}: {str(error)[:400]}") from error
        memory, limit, largest = parsed
        if "total" not in memory:
            memory = {"arguments": argument_bytes, **memory}
        result = Compiled("", memory, limit, largest, time.perf_counter() - began, False, key)
    else:
        stats = compiled.memory_analysis()
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }
        result = Compiled(text, memory, limit, [], time.perf_counter() - began, False, key)
    _save(result)
    return result


def _dumped_text(folder: Path) -> str:
    """The scheduled program that the compiler wrote into a folder."""
    found = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.after_codegen.txt"))]
    if len(found) != 1:
        raise UserError(
            f"the TPU compiler wrote {len(found)} programs to {folder}, wanted 1; is there space left on the disk?"
        )
    return found[0]


@contextlib.contextmanager
def _without_jax_cache() -> Any:
    """JAX's own compilation cache would keep executables for hardware that is not here."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def out_of_memory(message: str) -> tuple[dict[str, int], int, list[tuple[int, str, str]]] | None:
    """What a refusal for memory says, None for any other refusal.

    Returns:
      Bytes per device as `total` or as `temporaries` alone, bytes that there are, and the largest allocations if they are
      listed.
    """
    size = r"([\d.]+)([KMGT]?)i?B?"
    forms = {
        "temporaries": rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)",
        "total": rf"[Uu]sed {size} of {size} hbm",
    }
    found = {name: match for name, form in forms.items() if (match := re.search(form, message)) is not None}
    if not found:
        return None
    name, match = next(iter(found.items()))
    used, limit = (int(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))
    listed = rf"Size: {size}\s+(?:Operator: op_name=\"([^\"]*)\"[^\n]*\s+)?Shape: (\S+)"
    largest = [
        (int(float(amount) * UNITS[unit]), shape, operator)
        for amount, unit, operator, shape in re.findall(listed, message)
    ]
    return {name: used}, limit, largest


def _load(key: str) -> Compiled | None:
    file = cache_folder() / f"{key}.json.gz"
    try:
        fields = json.loads(gzip.decompress(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError):  # torn by a full disk: compiled again
        file.unlink(missing_ok=True)
        return None
    fields["largest"] = [tuple(row) for row in fields["largest"]]
    return Compiled(**fields | {"cached": True})


def _save(result: Compiled) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{result.hash}.{os.getpid()}.tmp"
    beside.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), 5))
    os.replace(beside, folder / f"{result.hash}.json.gz")


def last_seconds() -> float | None:
    """How long the newest result in the cache took to compile: what one more will take, roughly."""
    files = sorted(cache_folder().glob("*.json.gz"), key=lambda f: f.stat().st_mtime)
    kept = _load(files[-1].name.split(".")[0]) if files else None
    return kept.seconds if kept else None


def argument_tensors(job: Job) -> list[tuple[str, str, int]]:
    """Name, shape on one device and bytes of every array that the step takes."""
    rows = []
    trees = {"state": job.objective.abstract_state, "batch": job.objective.abstract_batch}
    for path, leaf in sharding.paths(trees).items():
        shape = leaf.sharding.shard_shape(leaf.shape)
        rows.append(
            (path, f"{np.dtype(leaf.dtype).name}{list(shape)}", math.prod(shape) * np.dtype(leaf.dtype).itemsize)
        )
    return rows
