"""Where the time of a run's step goes by kind of instruction: products, kernels, LayerNorm's own passes, the rest.

Usage: python benchmarks/kinds.py --config=FILE --topology=v6e:16x16 [--config.field=value ...]. Minutes, unless `python -m
curia_jax.plan` has asked the compiler the same before.
"""

import argparse
import sys
from collections import defaultdict
from typing import Any

from curia_jax.plan import topology as topologies
from curia_jax.plan.estimator import accounting, estimate, hlo


def kind(program: hlo.Program, instruction: hlo.Instruction, flops: int) -> str:
    """What an instruction with an estimate is for."""
    if flops:
        return "products, with what is fused into them"
    name = accounting.part_name(program, instruction)
    if estimate.part(name).endswith((" attention", " mlp")):
        if "transpose" in name:
            return "LayerNorm: second pass of the backward"
        first = instruction.result[0]
        if len(instruction.result) == 1 and first.dtype == "f32" and len(first.shape) == 2:  # (batch, tokens)
            return "LayerNorm: variance"
    return "the rest"


def kinds(program: hlo.Program, chip: topologies.Chip) -> dict[str, tuple[float, float]]:
    """By kind: seconds of a step of unrolled layers, and those that its products take at the chip's peak."""
    body = program.computations[program.entry]
    results = accounting.results_of(body)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for instruction in body:
        if instruction.cycles is not None:
            flops = accounting.cost(program, instruction, results).flops
            row = found[kind(program, instruction, flops)]
            row[0] += instruction.cycles / chip.clock
            row[1] += flops / (chip.flops / chip.devices)
    return {name: (row[0], row[1]) for name, row in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True)
    args, words = parser.parse_known_args()
    topologies.prepare_environment()
    found = compiled(args.config, words, topologies.parse(args.topology))
    print("| | ms | of these products at the peak |\n|---|---|---|")
    for name, (seconds, products) in sorted(found.items(), key=lambda item: -item[1][0]):
        print(f"| {name} | {seconds * 1e3:.1f} | {products * 1e3:.1f} |")
    return 0


def compiled(file: str, words: list[str], topology: topologies.Topology) -> dict[str, Any]:
    """`kinds` of a run's step, and what is charged for its kernels."""
    from curia_jax import config as configs
    from curia_jax.plan import __main__ as command
    from curia_jax.plan import compile as compiling

    config = configs.load(file, words)
    facts = command.input_facts(config, None)
    job = compiling.job(config, topology, examples=facts["examples"], canvas=facts["canvas"])
    text = compiling.compile(job.traced, topology, argument_bytes=0, options=job.objective.compiler_options).text
    if not text:
        raise SystemExit(f"{file} does not fit {topology}")
    program, wiring = hlo.parse(text), estimate.Wiring.of(job.mesh, topology)
    flops = compiling.kernel_flops(job.traced)
    plan = estimate.estimate(
        accounting.account(program, estimate.link_time(wiring)), wiring,
        batch_size=config.batch_size, model_flops=0, hardware_flops=0, kernel_flops=flops,
    )  # fmt: skip
    found = kinds(program, topology.chip)
    in_kernels = sum(part["product_seconds"] for part in plan["parts"]) - sum(row[1] for row in found.values())
    found["attention kernels (charged)"] = plan["roofline_seconds"], in_kernels
    found["exposed communication"] = plan["exposed_collective_seconds"], 0.0
    return found


if __name__ == "__main__":
    sys.exit(main())
