"""Plans one config, or many: what would fit, and what is fastest."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax.models import mae, vit
from curia_jax.objectives import mae as objective
from curia_jax.plan import compile as compiling
from curia_jax.plan import report
from curia_jax.plan import topology as topologies
from curia_jax.plan.estimator import accounting, estimate, hlo

LARGEST_BATCH = 16_384  # the recipe's learning-rate rule has not been shown beyond


@dataclasses.dataclass(frozen=True)
class Planner:
    """Everything but the config.

    Attributes:
      data: examples, examples_assumed, canvas, bytes_per_image, loader_per_core; see __main__.input_facts.
      prices: see estimate.prices.
      make: what makes the step: objective.make, unless a benchmark plans another.
    """

    topology: topologies.Topology
    data: dict[str, Any]
    prices: dict[str, Any]
    make: Callable[..., objective.MAEObjective] = objective.make

    def plan(self, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Compiles the config's step and says what a run does; see docs/planner.md for the fields.

        Raises:
          UserError: the config, its mesh or its batch do not fit the topology.
        """
        topology, chip = self.topology, self.topology.chip
        job = compiling.job(
            config, topology, examples=self.data["examples"], canvas=self.data["canvas"], make=self.make
        )
        arguments = sorted(compiling.argument_tensors(job), key=lambda row: -row[2])
        with report.waiting(f"compiling for {topology}", compiling.last_seconds()):
            compiled = compiling.compile(
                job.traced,
                topology,
                argument_bytes=sum(row[2] for row in arguments),
                options=job.objective.compiler_options,
            )
        model_flops = 3 * mae.flops(job.objective.model) * config.batch_size
        result: dict[str, Any] = {
            "topology": str(topology),
            "chips": topology.chips,
            "mesh": dict(job.mesh.shape),
            "batch_size": config.batch_size,
            "batch_per_chip": config.batch_size / topology.chips,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(job.objective.abstract_state["params"])),
            "examples": self.data["examples"],
            "examples_assumed": self.data["examples_assumed"],
            "canvas": list(self.data["canvas"]),
            "estimate": "the compiler's own cycles and published link speeds; nothing was run",
            "compiler": topologies.compiler_version(),
            "program_hash": compiled.hash,
            "compile_seconds": compiled.seconds,
            "cached": compiled.cached,
            "fits": compiled.fits,
            "hbm_bytes_per_chip": compiled.total * chip.devices,
            "hbm_limit_bytes": compiled.limit * chip.devices,
            "memory": {name: size * chip.devices for name, size in compiled.memory.items()},
            "largest_tensors": [
                {"tensor": name, "shape": shape, "bytes": size, "kind": "argument"}
                for name, shape, size in arguments[:6]
            ],
            "model_flops_per_step": model_flops,
            "hardware_flops_per_step": compiling.hardware_flops(job.traced)[0],
        }
        if not compiled.text:
            result["largest_tensors"] += [
                {"tensor": name, "shape": shape, "bytes": size, "kind": "temporary"}
                for size, shape, name in compiled.largest[:6]
            ]
            return result
        program = hlo.parse(compiled.text)
        wiring = estimate.Wiring.of(job.mesh, topology)
        result["largest_tensors"] += [
            {"tensor": name, "shape": f"{t.dtype}{list(t.shape)}", "bytes": t.bytes, "kind": "temporary"}
            for t, name in accounting.largest(program, 6)
        ]
        result |= estimate.estimate(
            accounting.account(program, estimate.link_time(wiring)),
            wiring,
            batch_size=config.batch_size,
            model_flops=model_flops,
            hardware_flops=result["hardware_flops_per_step"],
            kernel_flops=compiling.kernel_flops(job.traced),
        )
        result |= estimate.input_needs(
            result["images_per_second"], topology, self.data["bytes_per_image"], self.data["loader_per_core"]
        )
        return result | estimate.run_cost(job.total_steps, result["estimated_step_seconds"], topology, self.prices)


# ---- more than one config


@dataclasses.dataclass
class Row:
    """A candidate: words for the command line and its plan."""

    overrides: list[str]
    plan: dict[str, Any]
    on_front: bool = False
    best: bool = False

    def summary(self) -> dict[str, Any]:
        names = (
            "fits", "hbm_bytes_per_chip", "estimated_step_seconds", "estimated_mfu", "images_per_second_per_chip",
            "exposed_collective_fraction",
        )  # fmt: skip
        return {
            "overrides": self.overrides,
            "pareto": self.on_front,
            "best": self.best,
            **{name: self.plan.get(name) for name in names},
        }


def alternatives(config: ml_collections.ConfigDict, topology: topologies.Topology) -> dict[str, list[list[str]]]:
    """For each thing that can be chosen, the words that choose each of its values."""
    model = mae.config(**config.model)
    inner = topology.devices // topology.slices
    width = math.gcd(model.encoder.width, model.decoder_width)
    shares = [n for n in (1, 4, 16, 32, 64) if inner % n == 0 and width % n == 0]
    batches = [n for n in (config.batch_size // 2, config.batch_size, 2 * config.batch_size) if n <= LARGEST_BATCH]
    return {
        "remat": [[f"--config.model.remat={name}"] for name in vit.REMAT],
        "unroll": [[f"--config.model.unroll={n}"] for n in sorted({1, model.encoder.depth})],
        "batch": [[f"--config.batch_size={n}"] for n in batches if n % topology.devices == 0 and n],
        "mesh": [
            [f"--config.mesh.replica={topology.slices}", f"--config.mesh.data={inner // n}", f"--config.mesh.fsdp={n}"]
            for n in shares
        ],
    }


def search(planner: Planner, file: str, overrides: Sequence[str], *, seconds: float) -> list[Row]:
    """Chooses one thing after the other, each time keeping the fastest that fits: not every combination is tried.

    Args:
      seconds: after them nothing new is compiled.

    Returns:
      All candidates, fastest first; those that nothing beats in both speed and memory are marked, and so is the best.
    """
    start = configs.load(file, list(overrides))
    choices = alternatives(start, planner.topology)
    rows: dict[tuple, Row] = {}
    began = time.monotonic()
    total = 1 + sum(len(words) - 1 for words in choices.values())

    def attempt(words: list[str]) -> Row | None:
        config = configs.load(file, words)
        key = tuple(sorted((k, str(v)) for k, v in configs.flatten(config).items()))
        if key not in rows:
            spent = time.monotonic() - began
            if rows and spent > seconds:
                return None
            left = f"; about {spent / len(rows) * (total - len(rows)) / 60:.0f} min left" if rows else ""
            report.say(
                f"candidate {len(rows) + 1} of at most {total}, {spent / 60:.1f} min gone{left}: {' '.join(words)}"
            )
            rows[key] = Row(words, planner.plan(config))
        return rows[key]

    best = attempt(list(overrides))
    for values in choices.values():
        for words in values:
            names = {word.split("=")[0] for word in words}
            base = best.overrides if best is not None else list(overrides)
            row = attempt([w for w in base if w.split("=")[0] not in names] + words)
            if row is not None and _faster(row.plan, best.plan):
                best = row
    fitting = [row for row in rows.values() if row.plan["fits"]]
    for number in estimate.pareto([row.plan for row in fitting]):
        fitting[number].on_front = True
    if best.plan["fits"]:
        best.best = True
    return sorted(rows.values(), key=lambda row: -row.plan.get("images_per_second_per_chip", 0.0))


def _faster(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def rank(plan: dict[str, Any]) -> tuple[bool, float]:
        return plan["fits"], plan.get("images_per_second_per_chip", 0.0) if plan["fits"] else -plan[
            "hbm_bytes_per_chip"
        ]

    return rank(a) > rank(b)


def what_would_fit(planner: Planner, file: str, overrides: Sequence[str], *, seconds: float) -> dict[str, Any] | None:
    """The first of these that fits: recompute more, split the parameters, halve the batch. None if nothing does.

    Returns:
      `overrides`, the words to add, and `hbm_bytes_per_chip`.
    """
    config = configs.load(file, list(overrides))
    choices = alternatives(config, planner.topology)
    remat = [words for words in choices["remat"] if not words[0].endswith(("none", f"={config.model.remat}"))]
    mesh = [words for words in choices["mesh"] if int(words[2].split("=")[1]) > config.mesh.fsdp][:1]
    half = [w for w in choices["batch"] if int(w[0].split("=")[1]) < config.batch_size]
    tries = [*remat, *mesh]
    tries += [[*(remat[-1] if remat else []), *(mesh[0] if mesh else []), *batch] for batch in half]
    began = time.monotonic()
    for words in tries:
        if time.monotonic() - began > seconds:
            return None
        report.say(f"trying {' '.join(words)}")
        try:
            plan = planner.plan(configs.load(file, [*overrides, *words]))
        except UserError as error:  # a mesh that this model does not divide over
            report.say(f"no: {error}")
            continue
        if plan["fits"]:
            return {"overrides": words, "hbm_bytes_per_chip": plan["hbm_bytes_per_chip"]}
    return None
