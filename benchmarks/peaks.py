"""What the TPU compiler's estimate grants the simplest programs, of each chip's published peaks: how it prices products and memory.

Products: a large square one, and those of the MLP of a ViT-L/16 at 512 px with 16 images a chip (257 tokens), bare. Memory: one
pass over 1 GiB of bf16 in, and as much out.

Usage: python benchmarks/peaks.py [--chip=v6e ...]. A minute a chip on 2 cores; the compiler's answers are kept.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from curia_jax.plan import topology as topologies

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS, WIDTH, HIDDEN = (16, 257), 1024, 4096


def programs() -> dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]]:
    """By name: a function, and the shapes of its bf16 arguments on one chip."""
    import jax

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    def of_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())))

    return {
        "product of 4096 x 4096 x 4096": (product, ((4096, 4096), (4096, 4096))),
        "fc2": (product, ((*TOKENS, HIDDEN), (HIDDEN, WIDTH))),
        "gradient of a kernel": (of_kernel, ((*TOKENS, WIDTH), (*TOKENS, HIDDEN))),
        "fc1, whose result is the larger": (product, ((*TOKENS, WIDTH), (WIDTH, HIDDEN))),
        "x + 1 over 1 GiB": (lambda x: x + 1, ((131_072, 4096),)),
    }


def reached(name: str, chip: str) -> tuple[float, float]:
    """Shares of the products' and of HBM's published peak, by the compiler's estimate: the first of the time in which it
    multiplies, without copies of the result."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from curia_jax import sharding
    from curia_jax.plan import compile as compiling
    from curia_jax.plan.estimator import accounting, hlo

    topology = topologies.parse(SMALLEST[chip])
    mesh = sharding.make_mesh(data=topology.devices, devices=topologies.devices(topology))
    whole = NamedSharding(mesh, PartitionSpec())  # every chip does the same
    function, shapes = programs()[name]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes]
    traced = jax.jit(function, out_shardings=whole).trace(*arguments)
    compiled = compiling.compile(traced, topology, argument_bytes=0)
    account = accounting.account(hlo.parse(compiled.text), lambda *_: 0.0)
    seconds = account.cycles / topology.chip.clock
    multiplying = sum(work.cycles for work in account.work if work.cost.flops) / topology.chip.clock
    flops = sum(work.cost.flops * work.trips for work in account.work)
    moved = sum(work.cost.bytes * work.trips for work in account.work)
    moved += sum(copy.bytes * copy.trips for copy in account.transfers)
    return flops / (multiplying or seconds) / topology.chip.flops, moved / seconds / topology.chip.hbm_bandwidth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=SMALLEST, help="may be repeated; all if absent")
    args = parser.parse_args()
    topologies.prepare_environment()
    print("| chip | program | of the products' peak | of HBM's |\n|---|---|---|---|")
    for chip in args.chip or SMALLEST:
        for name in programs():
            products, memory = reached(name, chip)
            print(f"| {chip} | {name} | {products:.0%} | {memory:.0%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
