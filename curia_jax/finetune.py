"""Fine-tunes a pretrained encoder for a clinical task, with the loop, mesh, checkpoints and telemetry of curia_jax.pretrain.

A task is one of CuriaBench (python -m curia_jax.evaluate --list), whose data is a folder of its name in --data; FILE.py, your own;
shards/LABEL, a label of the shard folder that --data names (shards/LABEL:value for a number); or shards/A+B, several labels of two
classes each, learned together. The train split is learned from. At every checkpoint the loss on the validation split is taken,
and the weights with the smallest one are kept. They score the test split once, when the run has finished.

--from names the weights to start from: a run, a checkpoint, an export of curia_jax.convert, or none for random ones. The encoder's
shape and the preparation of pixels are those of the weights, unless the config says otherwise.

The work directory holds what a run of curia_jax.pretrain leaves, and results.json and results.csv in the form of
curia_jax.evaluate, test-predictions.parquet, selected.json (the step that was chosen) and cache/, the decoded images of the task.
The same command resumes. With several tasks or seeds each has a work directory of its own below --workdir, <task>/seed-<n>;
those that have finished are left alone, and --workdir has the results of all.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curia_common import cli, logs, signals
from curia_common.errors import UserError
from curia_common.exit_codes import FINAL, ExitCode

if TYPE_CHECKING:
    from curia_jax import run, validation
    from curia_jax.evaluate import finetuned

# In results; of the encoder, by config.finetune.train.
TRAINED = {"full": "full fine-tuning", "lora": "LoRA", "head": "head alone"}

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser(
        "python -m curia_jax.finetune",
        __doc__,
        examples="""
python -m curia_jax.finetune --config=configs/finetune_vit.py --from=runs/b16 --task=ich --data=curiabench --workdir=runs/ich
python -m curia_jax.finetune --config=configs/finetune_vit.py --from=none --task=ich --data=curiabench --workdir=runs/ich-scratch
python -m curia_jax.finetune --config=configs/finetune_vit.py --from=weights/b16 --task=ich --data=curiabench --workdir=runs/ich --against=runs/ich-scratch
python -m curia_jax.finetune --config=configs/finetune_vit.py --from=runs/b16 --task=shards/lesion --data=shards --workdir=runs/lesion
python -m curia_jax.finetune --config=configs/finetune_vit.py --from=runs/b16 --task=ich,kits --seeds=0,1,2 --data=curiabench --workdir=runs/tuned --config.finetune.train=lora""",
        codes=(ExitCode.DIVERGED, ExitCode.DATA, ExitCode.DOES_NOT_FIT),
        overrides=True,
    )
    made.add_argument("--config", required=True, help="config file or name; --config.field=value changes a field")
    made.add_argument(
        "--from", dest="start_from", metavar="RUN",
        help="run, checkpoint or export whose encoder a new run starts from, or none for random weights",
    )  # fmt: skip
    made.add_argument(
        "--task", metavar="TASK,…", help="what to learn: a name of CuriaBench, FILE.py, shards/LABEL, shards/A+B"
    )
    made.add_argument(
        "--data", metavar="DIR", help="folder with a folder for each task, or that data_pipeline.build wrote"
    )
    made.add_argument("--workdir", help="folder of this run, or gs://bucket/run; one with checkpoints is resumed")
    made.add_argument("--seeds", metavar="N,…", help="one run for each, in place of config.seed")
    made.add_argument(
        "--cases", choices=("slice", "series"), default="slice",
        help="of shards: what is learned and scored, a slice or a series as a bag of slices (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--against",
        metavar="RUN,…",
        help="finished runs of the same task, such as one with --from=none: paired differences to them",
    )
    made.add_argument(
        "--cache", metavar="DIR", help="folder for the decoded images of tasks (default: cache in --workdir; where that is a bucket, "
        "tasks other than shards/LABEL need it)",
    )  # fmt: skip
    made.add_argument("--draws", type=int, default=2000, help="bootstrap draws of the intervals (%(default)s)")
    made.add_argument("--fields", action="store_true", help="print the config's fields and values and exit")
    cli.add_json(
        made, "the outcome (finished, step, examples_seen, the last metrics); of several runs, the rows of results.json"
    )
    return made


def finetune(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
      UserError: as task_cases.open_task, run.prepare, objectives.supervised.make and trainer.train.
    """
    from curia_jax import config as configs
    from curia_jax import storage
    from curia_jax.evaluate import results

    config = configs.load(args.config, args.overrides)
    if args.fields:
        for field, value in configs.flatten(config).items():
            print(f"{field} = {value!r}")
        return ExitCode.DONE
    for option in ("task", "data", "workdir"):
        if not getattr(args, option):
            raise UserError(f"the following arguments are required: --{option}")
    cli.at_least("--draws", args.draws, 1)
    tasks, seeds = _words(args.task), _seeds(args.seeds)
    decoded = [word for word in tasks if not word.startswith(results.SHARDS)]
    if decoded and args.cache is None and storage.is_bucket(args.workdir):
        raise UserError(
            f"--workdir={args.workdir} is a bucket; name a folder on this machine for the decoded images of {decoded[0]} in --cache"
        )
    if len(tasks) > 1 or len(seeds) > 1:
        return _every(args, tasks, seeds or [config.seed])
    if seeds:
        config.seed = seeds[0]
    return _one(args, config, tasks[0])


# ---- one run


def _one(args: argparse.Namespace, config: Any, word: str) -> int:
    from curia_jax import checkpoint, examples, hosts, origin, run, task_cases, trainer, validation
    from curia_jax import workdir as workdirs
    from curia_jax.evaluate import finetuned, labels
    from curia_jax.objectives import supervised
    from curia_jax.settings import Settings

    # ---- what is typed and labelled, before images and devices
    wanted = Settings.of(config).finetune
    if wanted is None:
        raise UserError(f"--config={args.config} has no group finetune; start from configs/finetune_vit.py")
    config.keep_best = validation.LOSS
    task = task_cases.open_task(word, args.data, cases=args.cases)
    head = task.head(kind=wanted.head, pooling=wanted.pooling)
    others = tuple(finetuned.read(place) for place in _words(args.against or ""))
    cache = Path(args.cache or Path(args.workdir) / workdirs.CACHE)
    splits: dict[str, examples.Cases] = {}

    def open_examples(settings: Settings, meta: checkpoint.Meta | None) -> run.Examples:
        place = f"{args.data} with --task={word}"
        if meta is not None:
            task.check_head(head, meta.config)
        splits.update(task.open_cases(cache))
        learned = splits[labels.FIT]
        examples.Order.of(learned.targets, seed=settings.seed, sampling=wanted.sampling)
        examples.target_fields(learned.targets, head, weights=wanted.class_weights)
        dataset = checkpoint.Dataset(task.fingerprint, 0, len(learned), labels.FIT)
        start = run.start_of(
            dataset, meta, settings.data, place, lambda then: "name the data it was trained on in --data"
        )
        height, width = (max(cases.images.largest[axis] for cases in splits.values()) for axis in (0, 1))
        slices = min(wanted.slices, max(cases.slices for cases in splits.values()))
        described = task.described(head, masked=learned.masks is not None, slices=slices)
        return run.Examples(dataset, "cases", (height, width), start, task.shards, described)

    def complete(config: Any, meta: checkpoint.Meta | None) -> None:
        if meta is None and args.start_from is None:
            raise UserError(
                "the following arguments are required: --from; a run, checkpoint or export, or none for random weights"
            )
        origin.adopt(config, args.overrides, args.start_from, meta.config if meta else None)

    this = run.prepare(config, args.workdir, open_examples, args.start_from, complete=complete)
    slices = this.config["task"]["slices"]
    objective = supervised.make(
        config, this.mesh, head=head, canvas=this.canvas, slices=slices, masked=splits[labels.FIT].masks is not None,
        warmup_steps=this.warmup_steps, total_steps=this.schedule.total_steps, step_offset=this.step_offset,
    )  # fmt: skip
    batch_size, reading = this.settings.batch_size, this.settings.data

    def batches(this: run.Run) -> Iterator[Mapping[str, Any]]:
        """Global batches on the devices, from the example after the checkpoint's on."""
        run.name_semaphores(this)
        for batch in examples.training_batches(
            splits[labels.FIT], head, batch_size=batch_size, slices=slices, canvas=this.canvas, seed=this.settings.seed,
            sampling=wanted.sampling, weights=wanted.class_weights, examples_seen=this.position,
            process_index=hosts.number(), process_count=hosts.count(),
            threads=reading.threads, prefetch=reading.prefetch, workers=reading.workers,
        ):  # fmt: skip
            yield examples.to_devices(batch, objective.abstract_batch)

    evaluation = validation.Evaluation(
        task, splits, objective, _scoring(args, this, wanted.train, others), mesh=this.mesh, slices=slices,
        canvas=this.canvas, batch_size=batch_size, augment=this.settings.augment,
    )  # fmt: skip
    outcome = trainer.train(this, objective, batches, evaluation)
    if hosts.is_first():
        place = {"step": outcome.step, "examples_seen": outcome.examples_seen}
        chosen = workdirs.selected(args.workdir) if outcome.finished else None
        selected = {"selected_step": chosen.step, validation.LOSS: chosen.validation_loss} if chosen else {}
        cli.write_json(
            args.json, {"finished": outcome.finished, "workdir": args.workdir, **outcome.metrics, **place, **selected}
        )
    return outcome.exit_code


def _scoring(
    args: argparse.Namespace, this: "run.Run", train: str, others: "Sequence[finetuned.Finished]"
) -> "validation.Scoring":
    """How the test split is scored, and what its results are called.

    Raises:
      UserError: a run to compare with has the same name in results.
    """
    from curia_jax import validation

    how = TRAINED[train]
    backbone = f"{this.origin.place}, {how}" if this.origin else f"from scratch, {how}"
    for other in others:
        if other.backbone == backbone:
            raise UserError(
                f"--against={other.place}: it is called {backbone!r} too; compare runs that start or train differently"
            )
    return validation.Scoring(backbone, f"fine-tuned ({train})", args.draws, this.settings.seed, tuple(others))


# ---- several runs


def _every(args: argparse.Namespace, tasks: Sequence[str], seeds: Sequence[int]) -> int:
    """A run of each task and seed, each in a process of its own; those that fail are rows, and the others continue."""
    from curia_jax import storage
    from curia_jax.evaluate import finetuned, results
    from curia_jax.evaluate import tasks as known

    names = {task: task if task.startswith(results.SHARDS) else known.find(task).name for task in tasks}
    worst, rows = ExitCode.DONE, []
    for task in tasks:
        for seed in seeds:
            own = f"{names[task]}/seed-{seed}"
            workdir = f"{args.workdir.rstrip('/')}/{own}"
            log.info(f"{names[task]}, seed {seed}: {workdir}")
            code = _child(args, task, seed, workdir, own)
            if code != ExitCode.DONE and code not in FINAL:
                return code
            if code == ExitCode.DONE:
                rows += finetuned.read(workdir).rows
            else:
                worst = worst or ExitCode.DATA
                reason = f"exit code {code} of {workdir}"
                rows += results.rows([results.NotScored(names[task], "ours", results.FAILED, reason)])
            finetuned.publish(storage.root(args.workdir), rows)
    cli.write_json(args.json, rows)
    log.info(f"results: {args.workdir}/{results.RESULTS}")
    return worst


def _child(args: argparse.Namespace, task: str, seed: int, workdir: str, own: str) -> int:
    """Runs the command for one task and seed, and passes on the signals that ask to stop."""
    from curia_jax import storage

    words = [
        f"--config={args.config}", *args.overrides, f"--task={task}", f"--seeds={seed}", f"--data={args.data}",
        f"--workdir={workdir}", f"--cases={args.cases}", f"--draws={args.draws}",
    ]  # fmt: skip
    cache = args.cache or (None if storage.is_bucket(args.workdir) else f"{args.workdir}/cache")
    if cache:
        words.append(f"--cache={cache}")
    if args.start_from is not None:
        words.append(f"--from={args.start_from}")
    if args.against:
        words.append("--against=" + ",".join(f"{place.rstrip('/')}/{own}" for place in _words(args.against)))
    with signals.receiving() as received:
        process = subprocess.Popen([sys.executable, "-m", "curia_jax.finetune", *words])
        received.on_stop = process.terminate
        if received.stop_requested:
            process.terminate()
        code = process.wait()
    return code if code >= 0 else ExitCode.RESTART


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word for word in text.split(",") if word))


def _seeds(text: str | None) -> list[int]:
    words = _words(text or "")
    if not all(word.isdecimal() for word in words) or (text is not None and not words):
        raise UserError(f"--seeds={text}: write whole numbers of at least 0 with commas, such as 0,1,2")
    return [int(word) for word in words]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), finetune, argv, saves=True)


if __name__ == "__main__":
    sys.exit(main())
