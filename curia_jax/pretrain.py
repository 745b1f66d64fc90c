"""Pretrains a ViT-MAE on slice shards, from one CPU to a multi-slice pod.

The work directory holds everything a run leaves: config.json, checkpoints/, metrics.jsonl, events.jsonl and tensorboard/.
The same command resumes from the newest checkpoint, on any number of hosts and chips; no example is skipped or repeated.
A dataset that is not the checkpoint's is refused; --config.data.additions and --config.data.on_change say what to do.

--from starts a new run from the weights of another one, on other data say, with a new optimizer and schedule.
"""

import argparse
import sys
from collections.abc import Sequence

from curia_common import cli
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m curia_jax.pretrain",
        __doc__,
        examples="""
python -m curia_jax.pretrain --config=configs/demo.py --workdir=runs/first --config.data.shards=demo/shards
python -m curia_jax.pretrain --config=configs/demo.py --workdir=runs/b --config.batch_size=256 --config.seed=1
python -m curia_jax.pretrain --config=configs/demo.py --workdir=runs/mr --from=runs/b --config.data.shards=mr/shards
python -m curia_jax.pretrain --config=configs/demo.py --fields          list every field and its value""",
        codes=(ExitCode.DIVERGED, ExitCode.DATA, ExitCode.DOES_NOT_FIT),
        overrides=True,
    )
    made.add_argument("--config", required=True, help="config file or name; --config.field=value changes a field")
    made.add_argument("--workdir", help="folder of this run, or gs://bucket/run; one with checkpoints is resumed")
    made.add_argument(
        "--from", dest="start_from", metavar="RUN",
        help="run or checkpoint, also gs://bucket/run, whose weights a new run starts from instead of random ones; or an export, "
        "which has no decoder: it is new then",
    )  # fmt: skip
    made.add_argument("--fields", action="store_true", help="print the config's fields and values and exit")
    cli.add_json(
        made,
        "the outcome (finished, step, examples_seen, the last metrics, and images_per_second, mfu and stalls over all steps of this "
        "start)",
    )
    return made


def pretrain(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
      UserError: as run.prepare, objectives.mae.make and trainer.train.
    """
    from curia_jax import config as configs

    config = configs.load(args.config, args.overrides)
    if args.fields:
        for field, value in configs.flatten(config).items():
            print(f"{field} = {value!r}")
        return ExitCode.DONE
    if not args.workdir:
        raise UserError("the following arguments are required: --workdir")

    from curia_jax import hosts, run, trainer
    from curia_jax.objectives import mae

    this = run.prepare(config, args.workdir, run.open_shards, args.start_from)
    objective = mae.make(
        config, this.mesh, canvas=this.canvas, warmup_steps=this.warmup_steps, total_steps=this.schedule.total_steps,
        step_offset=this.step_offset,
    )  # fmt: skip
    outcome = trainer.train(this, objective, run.batches)
    if hosts.is_first():
        place = {"step": outcome.step, "examples_seen": outcome.examples_seen}
        cli.write_json(args.json, {"finished": outcome.finished, "workdir": args.workdir, **outcome.metrics, **place})
    return outcome.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), pretrain, argv, saves=True)


if __name__ == "__main__":
    sys.exit(main())
