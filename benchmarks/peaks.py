"""Compiles bare matmuls and a pass over memory for each chip: which share of the published peaks the TPU compiler expects.

Matmuls: a large square one, and those of the MLP of ViT-L/16 at 512 px with 16 images per chip (257 tokens). Memory: one pass
that reads and writes 1 GiB of bf16. Takes a minute per chip on 2 cores; the compiler's answers are cached.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from curia_common import cli

if TYPE_CHECKING:
    import jax

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS, WIDTH, HIDDEN = (16, 257), 1024, 4096
Program = tuple[Callable[..., "jax.Array"], tuple[tuple[int, ...], ...]]


def programs() -> dict[str, Program]:
    """By name: a function, and the shapes of its bf16 arguments on one chip."""
    import jax

    def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x @ weight

    def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())))

    return {
        "matmul of 4096 x 4096 x 4096": (matmul, ((4096, 4096), (4096, 4096))),
        "fc2": (matmul, ((*TOKENS, HIDDEN), (HIDDEN, WIDTH))),
        "gradient of a weight": (weight_gradient, ((*TOKENS, WIDTH), (*TOKENS, HIDDEN))),
        "fc1, whose result is larger than its input": (matmul, ((*TOKENS, WIDTH), (WIDTH, HIDDEN))),
        "x + 1 over 1 GiB": (lambda x: x + 1, ((131_072, 4096),)),
    }


def reached(program: Program, chip: str) -> tuple[float, float]:
    """Shares of the published FLOP/s and of the published HBM bandwidth, by the compiler's estimate.

    FLOP/s count over the time of the matmuls alone, without copies of the result.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from curia_jax import sharding
    from curia_jax.plan import compiler, topologies
    from curia_jax.plan.estimator import accounting, hlo

    topology = topologies.parse(SMALLEST[chip])
    mesh = sharding.make_mesh(data=topology.devices, devices=topologies.devices(topology))
    replicated = NamedSharding(mesh, PartitionSpec())  # every chip does the same
    function, shapes = program
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated) for shape in shapes]
    traced = jax.jit(function, out_shardings=replicated).trace(*arguments)
    account = accounting.account(hlo.parse(compiler.compile_for(topology, traced).text), lambda *_: 0.0)
    seconds = account.cycles / topology.chip.clock
    in_matmuls = sum(op.cycles for op in account.costed if op.cost.flops) / topology.chip.clock
    flops = sum(op.cost.flops * op.trips for op in account.costed)
    moved = sum(op.cost.bytes * op.trips for op in account.costed)
    moved += sum(copy.bytes * copy.trips for copy in account.copies)
    return flops / (in_matmuls or seconds) / topology.chip.flops, moved / seconds / topology.chip.hbm_bandwidth


def parser() -> argparse.ArgumentParser:
    made = cli.parser("python benchmarks/peaks.py", __doc__, examples="python benchmarks/peaks.py --chip=v6e")
    made.add_argument("--chip", action="append", choices=SMALLEST, help="may be repeated; all if absent")
    return made


def run(args: argparse.Namespace) -> None:
    from curia_jax.plan import topologies

    topologies.prepare_environment()
    print("| chip | program | of peak FLOP/s | of HBM bandwidth |\n|---|---|---|---|")
    for chip in args.chip or SMALLEST:
        for name, program in programs().items():
            flops, memory = reached(program, chip)
            print(f"| {chip} | {name} | {flops:.0%} | {memory:.0%} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
