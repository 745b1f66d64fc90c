"""Sorts the time of a planned step by kind of instruction: matmuls, Pallas kernels, LayerNorm's own passes, the rest.

Takes minutes, unless `python -m curia_jax.plan` has compiled the same step before. Layers have to be unrolled.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from curia_common import cli
from curia_common.errors import DoesNotFitError
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    from curia_jax.plan.estimator import hlo
    from curia_jax.plan.topologies import Chip, Topology


class Time(NamedTuple):
    """Seconds of a step, and the seconds that the matmuls among them take at the chip's peak."""

    seconds: float
    matmul_seconds: float


def kind(program: "hlo.Program", instruction: "hlo.Instruction", flops: int) -> str:
    """The kind of an instruction that the compiler has estimated."""
    from curia_jax.plan.estimator import accounting, step

    if flops:
        return "matmuls, with what is fused into them"
    scope = accounting.scope_of(program, instruction)
    if step.part_of(scope).endswith((" attention", " mlp")):
        if "transpose" in scope:
            return "LayerNorm: second pass of the backward"
        first = instruction.result[0]
        if len(instruction.result) == 1 and first.dtype == "f32" and len(first.shape) == 2:  # (batch, tokens)
            return "LayerNorm: variance"
    return "the rest"


def kinds(program: "hlo.Program", chip: "Chip") -> dict[str, Time]:
    """Times of the entry computation by kind."""
    from curia_jax.plan.estimator import cost

    body = program.computation(program.entry)
    results = cost.results_of(body)
    cycles: defaultdict[str, int] = defaultdict(int)
    flops: defaultdict[str, int] = defaultdict(int)
    for instruction in body:
        if instruction.cycles is not None:
            own = cost.cost(program, instruction, results).flops
            name = kind(program, instruction, own)
            cycles[name] += instruction.cycles
            flops[name] += own
    return {name: Time(cycles[name] / chip.clock, flops[name] / (chip.flops / chip.devices)) for name in cycles}


def times(file: str, overrides: Sequence[str], topology: "Topology") -> dict[str, Time]:
    """Times of a run's step by kind, with what is charged for its Pallas kernels.

    Raises:
      DoesNotFitError: the run does not fit the topology.
    """
    from curia_jax import config as configs
    from curia_jax.plan import compiler, flops, inputs
    from curia_jax.plan.estimator import accounting, hlo, step
    from curia_jax.plan.estimator.network import Network

    config = configs.load(file, list(overrides))
    facts = inputs.input_facts(config, None)
    traced = compiler.trace_step(config, topology, examples=facts.examples, canvas=facts.canvas)
    compiled = compiler.compile_for(topology, traced.traced, options=traced.objective.compiler_options)
    if compiled.refused:
        raise DoesNotFitError(f"{file} does not fit {topology}; plan it with python -m curia_jax.plan")
    program, network = hlo.parse(compiled.text), Network.of(traced.mesh, topology)
    found = step.summarize(
        accounting.account(program, network.cycles), network,
        batch_size=config.batch_size, model_flops=0, hardware_flops=0, pallas_flops=flops.pallas_flops(traced.traced),
    )  # fmt: skip
    rows = kinds(program, topology.chip)
    in_kernels = sum(part.product_seconds for part in found.parts) - sum(row.matmul_seconds for row in rows.values())
    rows["Pallas kernels (charged by roofline)"] = Time(found.roofline_seconds, in_kernels)
    rows["exposed communication"] = Time(found.exposed_collective_seconds, 0.0)
    return rows


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python benchmarks/kinds.py",
        __doc__,
        examples="python benchmarks/kinds.py --config=configs/pretrain_vit_l16_512.py --topology=v6e:16x16",
        codes=(ExitCode.DOES_NOT_FIT,),
        overrides=True,
    )
    made.add_argument("--config", required=True, metavar="FILE", help="config file of pretrain")
    made.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v6e:16x16")
    return made


def run(args: argparse.Namespace) -> None:
    from curia_jax.plan import topologies

    topologies.prepare_environment()
    found = times(args.config, args.overrides, topologies.parse(args.topology))
    print("| | ms | ms of its matmuls at the peak |\n|---|---|---|")
    for name, row in sorted(found.items(), key=lambda item: -item[1].seconds):
        print(f"| {name} | {row.seconds * 1e3:.1f} | {row.matmul_seconds * 1e3:.1f} |")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
