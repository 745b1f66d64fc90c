"""Scores frozen features of backbones on clinical tasks, with confidence intervals, beside a random encoder, pixels and histogram.

A task (--tasks) is one of
  NAME          a CuriaBench task (see --list); its data is the folder NAME in --data
  FILE.py       a task of your own (see docs/evaluate.md)
  shards/LABEL  a label of the shard folder in --data, or modality, plane or body_part; shards/LABEL:value predicts a number,
                such as an age. Slices without a value are left out.

Heads are trained on the train split. Their settings and features are chosen on the validation split, or by cross-validation
over patients where there is none or it lacks a class. Each head is then refitted on both and scores the test split once.
Intervals are 95 %, from a bootstrap over patients; the first backbone is compared with each other one in pairs.
--across=modality learns from each modality alone and scores on each, to show how much is lost from one to the other;
anatomy-cross-modality is scored so without it.

--output gets
  report.html             all backbones compared; ROC, reliability, confusion and example cases of every task
  results.json, .csv      a row for each figure: task, protocol, backbone, against (other side of a paired difference), head,
                          features, labels (share of the training labels), metric, value, low and high (ends of the interval,
                          null where undefined), n and events (test cases, positive ones), seed, data_sha256, status (ok,
                          not_run, failed), reason, subgroup ("scanner=A"; null for all test cases), across, trained_on and
                          tested_on ("CT", "MR"; null unless across a column)
  table.tex               the first table of the report
  a folder for each task  its predictions
  cache/                  features, and decoded images in the clear: rerunning the command computes only what has changed

A task that fails is a row with its reason; the others finish, and the exit code is 65. A task of --suite without data is not run.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode

EXAMPLES = """
python -m curia_jax.evaluate --list
python -m curia_jax.evaluate --suite=curiabench --data=curiabench --backbones=runs/b16,runs/l16 --output=results
python -m curia_jax.evaluate --suite=curiabench --data=curiabench --backbones=runs/b16 --output=results --protocol=both
python -m curia_jax.evaluate --tasks=shards/situs --data=demo/shards --backbones=demo/run --output=results
python -m curia_jax.evaluate --tasks=shards/situs --data=demo/shards --backbones=demo/run --output=results --subgroups=manufacturer,body_part
python -m curia_jax.evaluate --tasks=anatomy-cross-modality --data=curiabench --backbones=runs/b16 --output=results
python -m curia_jax.evaluate --tasks=shards/situs --data=demo/shards --backbones=demo/run --output=results --across=modality
python -m curia_jax.evaluate --tasks=kits --data=curiabench --backbones=runs/b16,weights/dinov2,timm:vit_base_patch16_224 --output=results
python -m curia_jax.evaluate --tasks=shards/modality,shards/plane --data=demo/shards --backbones=demo/run --output=results --heads=ridge
python -m curia_jax.evaluate --tasks=shards/situs --data=demo/shards --backbones=runs/a,runs/b --output=results --cases=series
python -m curia_jax.evaluate --tasks=shards/situs --data=demo/shards --backbones=demo/run --output=results --features=cls,mean+std@2+4+last
"""
# Options of version 0.3, and what to type instead.
REPLACED = {
    "--checkpoint": "--backbones=RUN",
    "--shards": "--data=SHARDS",
    "--label": "--tasks=shards/LABEL",
    "--step": "--backbones=RUN/checkpoints/STEP",
    "--layers": "--features=mean@6+12",
    "--predictions": "--output=FOLDER, which gets them too",
}

log = logs.get_logger(__name__)


class _Replaced(argparse.Action):
    """An option of an older version, which names the new one."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001 - argparse's signature
        raise UserError(f"{option_string} is now {REPLACED[str(option_string)]}; see --help")


def parser() -> cli.Parser:
    made = cli.parser("python -m curia_jax.evaluate", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    made.add_argument(
        "--list", action="store_true", help="show the tasks of CuriaBench and where their data comes from"
    )
    made.add_argument("--tasks", metavar="TASK,…", help="what to score: names of --list, FILE.py, shards/LABEL")
    made.add_argument("--suite", choices=("curiabench",), help="score all its tasks")
    made.add_argument(
        "--data", metavar="DIR", help="folder with a folder for each task, or that data_pipeline.build wrote"
    )
    made.add_argument(
        "--backbones", metavar="BACKBONE,…",
        help="work directories of curia_jax.pretrain, folders of a step, of curia_jax.convert or of transformers, hf:NAME, timm:NAME, "
        "open_clip:NAME@TAG, package.module:function; the first is compared with the others",
    )  # fmt: skip
    made.add_argument(
        "--finetuned", metavar="RUN,…", help="finished work directories of curia_jax.finetune, whose results are listed beside those of "
        "frozen features; on the same data"
    )  # fmt: skip
    made.add_argument(
        "--floors", default="random,pixels,histogram", help="what every backbone is compared with (%(default)s)"
    )
    made.add_argument("--output", metavar="DIR", help="folder of the results")
    made.add_argument(
        "--protocol", choices=("ours", "official", "both"), default="ours",
        help="official: heads and features of CuriaBench's own evaluator; figures of both are never in one table (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--heads",
        default="knn,ridge,logistic,cox",
        help="probes of the protocol ours, with commas; each for the targets it learns; efficient, too, which needs time and disk (%(default)s)",
    )
    made.add_argument(
        "--features", default="cls,mean,mean+std", metavar="FEATURES,…",
        help="of the encoder, the best of which is chosen on validation: mean or std of the patch tokens, cls, or several: "
        "mean+std; after the final norm, before it: mean@prenorm, or after blocks: mean@6+12 (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--labels", default="1.0", metavar="SHARE,…",
        help="how many training labels heads get: shares of the patients such as 0.01,0.1,1.0, or cases of each class such as "
        "5; less than all is repeated with three subsets, the same for every backbone (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--image-sizes", metavar="N,…", help="sides of the image of our own encoders in px, with commas; features of several sizes are "
        "concatenated (default: as trained)",
    )  # fmt: skip
    made.add_argument(
        "--cases", choices=("slice", "series"), default="slice", help="series: scores are averaged over its slices"
    )
    made.add_argument(
        "--subgroups", metavar="COLUMN,…", help="score the test cases of each value of these columns of the data, too; age:10 makes "
        "bands of a column of numbers",
    )  # fmt: skip
    made.add_argument(
        "--across", metavar="COLUMN", help="learn from the cases of each value of this column alone, such as modality or scanner, and score on "
        "those of each; classes that a value lacks are left out",
    )  # fmt: skip
    made.add_argument(
        "--class-map", metavar="FILE", help="CSV of the classes that anatomy-ct and anatomy-mri share, for anatomy-cross-modality (default: by "
        "the names of TotalSegmentator; see docs/evaluate.md)",
    )  # fmt: skip
    made.add_argument(
        "--corpus", metavar="SHARDS,…", help="folders of shards that encoders were trained on: images of the tasks that are in their "
        "train split are counted and named",
    )  # fmt: skip
    made.add_argument(
        "--cache", metavar="DIR", help="folder of the features and of decoded images (default: cache in --output)"
    )
    made.add_argument("--batch-size", type=int, default=64, help="slices at a time (%(default)s)")
    made.add_argument("--draws", type=int, default=2000, help="bootstrap draws (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap and the folds (%(default)s)")
    cli.add_json(made, "the rows of results.json")
    for option in REPLACED:
        made.add_argument(option, action=_Replaced, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), evaluate, argv)


def evaluate(args: argparse.Namespace) -> int:
    from curia_jax import compilations
    from curia_jax.evaluate import (
        backbones,
        corpus,
        features,
        finetuned,
        labels,
        official_protocol,
        results,
        runner,
        scoring,
        shard_tasks,
        subgroups,
        suite,
        table,
    )
    from curia_jax.evaluate import tasks as known_tasks
    from curia_jax.report import evaluation, examples

    if args.list:
        table.show_tasks(known_tasks.CURIABENCH)
        return ExitCode.DONE

    # ---- what was typed, before any work
    heads = _choice("head", args.heads, tuple(scoring.HEADS))
    floors = _choice("floor", args.floors, results.FLOORS) if args.floors else []
    readouts = [features.Readout.parse(word) for word in _words("features", args.features)]
    groups = tuple(map(subgroups.Column.parse, _words("subgroups", args.subgroups))) if args.subgroups else ()
    across = subgroups.Column.parse(args.across, "--across") if args.across is not None else None
    for option, given in (("--suite", args.suite), ("--subgroups", args.subgroups), ("--finetuned", args.finetuned)):
        if across and given:
            raise UserError(
                f"--across={args.across} and {option}={given} do not go together; score them in two commands"
            )
    sizes, few = _sizes(args.image_sizes), _few(args.labels)
    for option, low in (("batch_size", 1), ("draws", 1), ("seed", 0)):
        cli.at_least(f"--{option.replace('_', '-')}", getattr(args, option), low)
    for option in ("data", "backbones", "output"):
        if getattr(args, option) is None:
            raise UserError(f"--{option} is missing; see --help")
    if not Path(args.data).is_dir():
        raise UserError(f"--data={args.data} is not a folder")
    if args.tasks is None and args.suite is None:
        raise UserError("nothing to score; give --tasks=TASK,… or --suite=curiabench; --list shows the tasks")
    words = _words("tasks", args.tasks) if args.tasks is not None else []
    asked = {word: known_tasks.find(word) for word in words if not word.startswith(results.SHARDS)}
    of_suite = known_tasks.SUITES[args.suite] if args.suite else ()
    if args.class_map and not any(task.parts for task in (*asked.values(), *of_suite)):
        raise UserError(
            f"--class-map={args.class_map} is for anatomy-cross-modality, which is not among the tasks to score"
        )
    output = Path(args.output)
    runner.check_output(output)

    given = _words("backbones", args.backbones)
    backbones.check(given)

    tuned = [finetuned.read(place) for place in _words("finetuned", args.finetuned)] if args.finetuned else []
    corpora = tuple(map(corpus.Corpus.open, _words("corpus", args.corpus))) if args.corpus else ()

    # ---- labels, before weights: they are quick to read and often what is wrong
    label_names = [word.removeprefix(results.SHARDS) for word in words if word.startswith(results.SHARDS)]
    protocols = suite.PROTOCOLS[args.protocol]
    if suite.OFFICIAL in protocols and (label_names or sizes or across):
        what = f"--tasks={results.SHARDS}{label_names[0]}" if label_names else f"--image-sizes={args.image_sizes}"
        what = f"--across={args.across}" if across else what
        raise UserError(f"{what} has no place in the official protocol; use --protocol={suite.OURS}")
    dataset = shard_tasks.open_dataset(args.data) if label_names else None
    if dataset:
        dataset.check(label_names)
    official = official_protocol.READOUTS if suite.OFFICIAL in protocols else ()
    compilations.keep()
    models = backbones.open_backbones(
        given, floors, readouts=list(dict.fromkeys((*readouts, *official))), image_sizes=sizes
    )

    # ---- tasks
    settings = runner.Settings(
        tuple(heads),
        args.cases,
        args.draws,
        args.seed,
        few,
        args.batch_size,
        groups,
        corpora,
        tuple(map(str, readouts)),
        across,
        args.class_map,
    )
    cache = Path(args.cache) if args.cache else output / runner.CACHE
    jobs = [shard_tasks.job(dataset, name, models, settings, cache) for name in label_names if dataset]
    for task in (*asked.values(), *(task for task in of_suite if task.name not in words)):
        named = task in asked.values()
        jobs += suite.jobs(task, Path(args.data), models, settings, cache, protocols=protocols, named=named)
    finetuned.check_names(tuned, [job.task for job in jobs])
    outcome = runner.run([finetuned.beside(job, tuned) for job in jobs], output)
    images = {job.task: functools.partial(examples.from_task, job.pictures) for job in jobs if job.pictures}
    if dataset:
        from_test = functools.partial(examples.from_shards, dataset.sources[labels.TEST])
        images |= dict.fromkeys([f"{results.SHARDS}{name}" for name in label_names], from_test)
    evaluation.write(output, outcome.rows, cli.command(), images)
    cli.write_json(args.json, outcome.rows)
    own = outcome.rows[: outcome.own]
    of_all = [results.Score.from_row(row) for row in own if row["status"] == results.OK and row["subgroup"] is None]
    table.show(of_all)
    failed = [row for row in own if row["status"] == results.FAILED]
    for row in failed:
        log.info(f"failed: {row['task']}: {row['reason']}")
    log.info(f"results: {output / results.RESULTS}; report: {output / evaluation.REPORT}")
    return outcome.exit_code


def _words(what: str, text: str) -> list[str]:
    words = list(dict.fromkeys(word for word in text.split(",") if word))
    if not words:
        raise UserError(f"--{what} is empty; see --help")
    return words


def _choice(what: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = _words(f"{what}s", text)
    for name in names:
        if name not in known:
            raise UserError(f"no {what} {name!r}; there are: {', '.join(known)}")
    return names


def _few(text: str) -> tuple[int | float, ...]:
    """Shares, which have a point, and numbers of cases."""
    found: list[int | float] = []
    for word in _words("labels", text):
        amount = int(word) if word.isdecimal() else _number(word)
        if amount is None or not (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1):
            raise UserError(
                f"--labels={text}: write shares above 0 up to 1.0, or whole numbers of cases, such as 0.1,1.0,5"
            )
        found.append(amount)
    return tuple(found)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _sizes(text: str | None) -> list[tuple[int, int]]:
    words = text.split(",") if text is not None else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--image-sizes={text}: write numbers of px with commas, such as 96,128")
    return [(int(word), int(word)) for word in words]


if __name__ == "__main__":
    sys.exit(main())
