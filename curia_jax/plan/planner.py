"""Plans one config on a topology: memory, step time, input and cost."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from curia_jax.objectives import base, mae
from curia_jax.plan import compiler, estimator, flops, topologies
from curia_jax.plan.estimator import LargeTensor, StepEstimate
from curia_jax.plan.inputs import InputFacts, InputNeeds, input_needs
from curia_jax.plan.prices import PriceTable, RunCost, run_cost

LARGEST = 6  # arguments that are reported


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Memory of a chip in bytes.

    Attributes:
      used: arguments, temporaries, outputs and code; of a program that does not fit, what is known.
      limit: that a program may use.
      largest: largest tensors, on one device.
    """

    used: Mapping[str, int]
    limit: int
    fits: bool
    largest: tuple[LargeTensor, ...]

    @property
    def total(self) -> int:
        return sum(self.used.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does on a topology.

    Attributes:
      mesh: axis sizes by name.
      parameters: values that are trained.
      state_bytes: of a checkpoint, over all hosts.
      compiler: its name and version.
      compiler_tested: the estimator has been tested with that version.
      cached: the compiler's answer was kept from an earlier time.
      model_flops_per_step: three forward passes, over all chips.
      hardware_flops_per_step: matmuls of the traced step, recomputation included.
      step, input, cost: None if the run does not fit, or if the estimator cannot read the compiled program.
      estimate_error: why the estimator cannot read it; None if it can, or if the run does not fit.
    """

    topology: topologies.Topology
    mesh: Mapping[str, int]
    batch_size: int
    parameters: int
    state_bytes: int
    data: InputFacts
    compiler: str
    compiler_tested: bool
    program_hash: str
    compile_seconds: float
    cached: bool
    memory: MemoryReport
    model_flops_per_step: int
    hardware_flops_per_step: int
    step: StepEstimate | None = None
    input: InputNeeds | None = None
    cost: RunCost | None = None
    estimate_error: str | None = None

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def images_per_second_per_chip(self) -> float:
        """0 without an estimate."""
        return self.step.images_per_second_per_chip if self.step is not None else 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields of --json, as docs/planner.md lists them."""
        step = dataclasses.asdict(self.step) if self.step is not None else {}
        temporaries = step.pop("largest_temporaries", [])
        rest = (dataclasses.asdict(one) for one in (self.input, self.cost) if one is not None)
        return {
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "mesh": dict(self.mesh),
            "batch_size": self.batch_size,
            "batch_per_chip": self.batch_size / self.topology.chips,
            "parameters": self.parameters,
            "state_bytes": self.state_bytes,
            "examples": self.data.examples,
            "examples_assumed": self.data.examples_assumed,
            "canvas": list(self.data.canvas),
            "estimate": "the compiler's own cycles and published link speeds; nothing was run",
            "estimate_error": self.estimate_error,
            "compiler": self.compiler,
            "compiler_tested": self.compiler_tested,
            "program_hash": self.program_hash,
            "compile_seconds": self.compile_seconds,
            "cached": self.cached,
            "fits": self.fits,
            "hbm_bytes_per_chip": self.memory.total,
            "hbm_limit_bytes": self.memory.limit,
            "memory": dict(self.memory.used),
            "largest_tensors": [*map(dataclasses.asdict, self.memory.largest), *temporaries],
            "model_flops_per_step": self.model_flops_per_step,
            "hardware_flops_per_step": self.hardware_flops_per_step,
            **step,
            **{name: value for record in rest for name, value in record.items()},
        }


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans configs on one topology.

    Attributes:
      make: builds the objective, see objectives.maker; benchmarks pass their own.
    """

    topology: topologies.Topology
    data: InputFacts
    prices: PriceTable
    make: Callable[..., base.Objective] = mae.make

    def plan(self, config: ml_collections.ConfigDict) -> Plan:
        """Compiles the config's step, minutes if it is not in the cache.

        Raises:
          UserError: the config, its mesh or its batch do not fit the topology.
        """
        topology, devices_per_chip = self.topology, self.topology.chip.devices
        step = compiler.trace_step(
            config, topology, examples=self.data.examples, canvas=self.data.canvas, make=self.make
        )
        arguments = compiler.arguments(step)
        compiled = compiler.compile_for(
            topology, step.traced, options=step.objective.compiler_options,
            argument_bytes=sum(row.bytes for row in arguments),
        )  # fmt: skip
        refused = (LargeTensor(row.op_name, row.shape, row.bytes, "temporary") for row in compiled.largest[:LARGEST])
        version = topologies.compiler_version()
        plan = Plan(
            topology=topology,
            mesh=dict(step.mesh.shape),
            batch_size=config.batch_size,
            parameters=step.objective.parameters,
            state_bytes=step.objective.state_bytes,
            data=self.data,
            compiler=version,
            compiler_tested=version.removeprefix("libtpu ") in estimator.TESTED_LIBTPU,
            program_hash=compiled.hash,
            compile_seconds=compiled.seconds,
            cached=compiled.cached,
            memory=MemoryReport(
                used={name: size * devices_per_chip for name, size in compiled.memory.items()},
                limit=compiled.limit * devices_per_chip,
                fits=compiled.fits,
                largest=(*arguments[:LARGEST], *refused),
            ),
            model_flops_per_step=round(step.objective.flops_per_example) * config.batch_size,
            hardware_flops_per_step=flops.hardware_flops(step.traced).total,
        )
        if compiled.refused:
            return plan
        try:
            if not compiled.text:
                raise estimator.HloError("the compiler gave no text of its program in a known form")
            found = estimator.estimate(
                compiled.text, topology, step.mesh, batch_size=_images(step.objective),
                model_flops=plan.model_flops_per_step, hardware_flops=plan.hardware_flops_per_step,
                pallas_flops=flops.pallas_flops(step.traced),
            )  # fmt: skip
        except estimator.HloError as error:
            return dataclasses.replace(
                plan, estimate_error=f"{error} (tested with libtpu {', '.join(estimator.TESTED_LIBTPU)})"
            )
        return dataclasses.replace(
            plan,
            step=found,
            input=input_needs(found.images_per_second, topology, self.data),
            cost=run_cost(step.total_steps, found.estimated_step_seconds, topology, self.prices),
        )


def _images(objective: base.Objective) -> int:
    """Of a step: a case of fine-tuning may have several slices."""
    return math.prod(objective.abstract_batch["pixels"].shape[:-2])
