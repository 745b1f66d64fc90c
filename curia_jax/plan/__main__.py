"""Plans a run of pretraining or fine-tuning on a TPU pod without one: memory, step time, communication, input, hours, cost.

It compiles the step that `curia_jax.pretrain` or `curia_jax.finetune` runs, with the real TPU compiler, for any topology (v4, v5e, v5p, v6e, v7x; one
TPU slice or several). Times are the compiler's estimate. Compiling takes minutes; the result is cached in
~/.cache/curia_jax/plan, so that planning the same step again takes seconds.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from curia_common import cli, logs
from curia_common.errors import DoesNotFitError
from curia_common.exit_codes import ExitCode

logger = logs.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m curia_jax.plan",
        __doc__,
        examples="""
python -m curia_jax.plan --config=configs/pretrain_vit_l16_224.py --topology=v5e:16x16
python -m curia_jax.plan --config=configs/pretrain_vit_l16_224.py --topology=v5e:16x16 --slices=2 --config.mesh.replica=2
python -m curia_jax.plan --config=configs/pretrain_vit_b16_224.py --topology=v6e:16x16 --examples=248000000 --search
python -m curia_jax.plan --config=configs/finetune_vit.py --topology=v5e:4x4 --examples=800 --bag=32 --config.model.remat=full""",
        codes=(ExitCode.DOES_NOT_FIT,),
        overrides=True,
    )
    made.add_argument("--config", required=True, help="config file of the run; --config.field=value changes a field")
    made.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16, v6e:8x8 or v5p:4x4x8")
    made.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of that shape (1)")
    made.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="slices per epoch, unless --config.data.shards says; cases of fine-tuning",
    )
    made.add_argument("--bag", type=int, default=1, metavar="N", help="slices of a case, of fine-tuning (1)")
    made.add_argument(
        "--search", action="store_true", help="try rematerialisation, loops, batch and mesh; Pareto table"
    )
    made.add_argument(
        "--limit", type=float, default=120.0, metavar="MINUTES", help="a search starts no compilation later (120)"
    )
    made.add_argument(
        "--prices", metavar="FILE", help="JSON table of prices per chip-hour, instead of the built-in one"
    )
    cli.add_json(made, "all figures, with the fields that docs/planner.md lists,")
    return made


def plan(args: argparse.Namespace) -> None:
    """Plans the run, or searches for a better one."""
    if args.examples is not None:
        cli.at_least("--examples", args.examples, 1)
    cli.at_least("--bag", args.bag, 1)
    from curia_jax.plan import topologies

    topologies.prepare_environment()  # before jax is imported
    topology = topologies.parse(args.topology, args.slices)
    topologies.compiler_version()  # fails early if it is not installed

    from curia_common.progress import Progress
    from curia_jax import config as configs
    from curia_jax.plan import compiler, inputs, objectives, prices, report, search
    from curia_jax.plan.planner import Planner

    table = prices.load(args.prices)
    config = configs.load(args.config, args.overrides)
    facts = inputs.input_facts(config, args.examples)
    planner = Planner(topology, facts, table, objectives.maker(config, args.bag))
    limit = args.limit * 60
    content = {"config": args.config, "overrides": args.overrides}
    remedy = None
    if args.search:
        rows = search.search(planner, args.config, args.overrides, seconds=limit)
        found = next((row.plan for row in rows if row.best), rows[0].plan)
        report.show(found)
        report.show_search(rows, args.config)
        content |= found.to_json() | {"search": [row.to_json() for row in rows]}
    else:
        last = compiler.last_seconds()
        logger.info("compiling for %s: %s", topology, f"the last took {last:.0f} s" if last else "takes minutes")
        with Progress("compile", 1, "programs") as progress:
            found = planner.plan(config)
            progress.step()
        content |= found.to_json()
        if not found.fits:
            logger.info("it does not fit; looking for what does")
            remedy = search.what_would_fit(planner, args.config, args.overrides, seconds=limit)
            content |= {"would_fit": remedy and dataclasses.asdict(remedy)}
        report.show(found)
    cli.write_json(args.json, content)
    if not found.fits:
        raise DoesNotFitError(report.does_not_fit(found, remedy))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
