"""Says what a pretraining run will do on a TPU pod, without one: memory, step time, communication, input, hours, cost.

It compiles the very step that `curia_jax.pretrain` runs, with the real TPU compiler, for any topology (v4, v5e, v5p, v6e,
v7x; one TPU slice or several). Times are the compiler's estimate. Compiling takes minutes; the result is kept in
~/.cache/curia_jax/plan, so that asking again takes seconds.

exit codes:
  0   the run fits
  1   the run does not fit; the report has what would
  2   wrong usage or configuration
"""

import argparse
import json
import sys
import time
from pathlib import Path

from curia_jax.plan import topology as topologies

# Slices in an epoch where neither --examples nor shards say: as many as ImageNet-1k has images, on which the recipe's
# 800 epochs were chosen.
ASSUMED_EXAMPLES = 1_281_167


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m curia_jax.plan --config=configs/pretrain_vit_l16_224.py --topology=v5e:16x16
  python -m curia_jax.plan --config=configs/pretrain_vit_l16_224.py --topology=v5e:16x16 --slices=2 --config.mesh.replica=2
  python -m curia_jax.plan --config=configs/pretrain_vit_b16_224.py --topology=v6e:16x16 --examples=248000000 --search""",
    )
    parser.add_argument("--config", required=True, help="config file of pretrain; --config.field=value changes a field")
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16, v6e:8x8 or v5p:4x4x8"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of that shape (1)")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="slices in an epoch, unless --config.data.shards says"
    )
    parser.add_argument(
        "--search", action="store_true", help="try rematerialisation, loops, batch and mesh; Pareto table"
    )
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="MINUTES", help="start no compilation of a search later (120)"
    )
    parser.add_argument(
        "--prices", metavar="FILE", help="JSON table of prices per chip-hour instead of the built-in one"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that is shown here, with the fields docs/planner.md lists"
    )
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    if args.examples is not None and args.examples < 1:
        parser.error(f"--examples={args.examples} has to be at least 1")
    return args, rest


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(argv)
    topologies.prepare_environment()  # before jax is imported

    from curia_common.errors import UserError

    try:
        return run(args, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    topology = topologies.parse(args.topology, args.slices)
    topologies.compiler_version()  # says at once where it is missing

    from curia_jax import config as configs
    from curia_jax.plan import report
    from curia_jax.plan import search as searches
    from curia_jax.plan.estimator import estimate

    table = estimate.prices(args.prices)
    config = configs.load(args.config, overrides)
    data = input_facts(config, args.examples)
    planner = searches.Planner(topology, data, table)

    if args.search:
        rows = searches.search(planner, args.config, overrides, seconds=args.limit * 60)
        plan = next((row.plan for row in rows if row.best), rows[0].plan)
        report.show(plan)
        report.show_search(rows, args.config)
        plan = plan | {"search": [row.summary() for row in rows]}
    else:
        plan = planner.plan(config)
        if not plan["fits"]:
            report.say("it does not fit; trying what would")
            plan["would_fit"] = searches.what_would_fit(planner, args.config, overrides, seconds=args.limit * 60)
        report.show(plan)
    if args.json:
        words = {"config": args.config, "overrides": overrides}
        Path(args.json).write_text(json.dumps(words | plan, indent=2) + "\n", encoding="utf-8")
    return 0 if plan["fits"] else 1


# ---- the input side


def input_facts(config, examples: int | None) -> dict:
    """Slices in an epoch, pixels of the canvas, bytes of a record and the measured loader rate, from the shards if given."""
    from curia_jax import data
    from data_pipeline.format.shards import SliceSource

    facts = {"examples": examples or ASSUMED_EXAMPLES, "examples_assumed": examples is None, "loader_per_core": None}
    if config.data.shards:
        source = SliceSource(config.data.shards, config.data.split)
        canvas = data.canvas_size(source, config.data.canvas)
        facts["canvas"] = canvas
        facts["bytes_per_image"] = stored_bytes(config.data.shards)
        facts["loader_per_core"] = loader_rate(source, canvas, config)
        if examples is None:
            facts |= {"examples": len(source), "examples_assumed": False}
    else:
        facts["canvas"] = tuple(config.data.canvas or config.model.image_size)
        facts["bytes_per_image"] = 2.0 * facts["canvas"][0] * facts["canvas"][1]  # as if nothing were compressed
    return facts


def stored_bytes(shards: str) -> float:
    """Bytes that a slice takes in a shard folder, on average over all splits."""
    import pyarrow.parquet as pq

    from data_pipeline.format import shards as shard_files

    table = pq.read_table(Path(shards) / shard_files.SHARDS, columns=["bytes", "slices"])
    return sum(table["bytes"].to_pylist()) / max(1, sum(table["slices"].to_pylist()))


def loader_rate(source, canvas: tuple[int, int], config, seconds: float = 3.0) -> float:
    """Images per second of one core of this machine: batches are loaded for `seconds`, and CPU time is counted, so that
    other programs do not matter."""
    from curia_jax import data

    batch = min(64, len(source))
    batches = data.training_batches(
        source, batch_size=batch, canvas=canvas, seed=config.seed, threads=1, prefetch=batch, workers=0
    )
    next(batches)  # opens files
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        images += batch
    return images / max(time.process_time() - cpu, 1e-9)


if __name__ == "__main__":
    sys.exit(main())
