"""Scores frozen features of a checkpoint with kNN, ridge and logistic probes, against a random encoder and raw pixels.

Probes learn from the train split. Their settings are chosen on the validation split (or by cross-validation over patients
where that lacks a class), then each probe is fitted on both and scores the test split once. Every figure has a 95 %
interval from a bootstrap over patients; differences to the random encoder and to the pixels are paired. Slices without a
value of the label are left out.

Rows of --json: task, backbone, head, metric, value, low, high (ends of the 95 % interval; null where undefined), n (test
cases), and how they were obtained. A metric *_difference is that of `backbone` minus that of `against`.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from curia_common.progress import Progress

BACKBONES = ("checkpoint", "random", "pixels")
EXAMPLES = """
python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=situs --json=results.json
python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=modality,plane --heads=ridge
python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=situs --cases=series --layers=2,4
python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=situs --features=cls+mean --image-sizes=64,96
"""

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser("python -m curia_jax.evaluate", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    made.add_argument("--checkpoint", required=True, help="work directory of curia_jax.pretrain, or folder of a step")
    made.add_argument("--shards", required=True, help="folder that data_pipeline.build wrote")
    made.add_argument(
        "--label", required=True, help="label of the shards, or modality, plane or body_part; several with commas"
    )
    made.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    made.add_argument("--task", help="name of the task in the results (default: the label)")
    made.add_argument("--heads", default="knn,ridge,logistic", help="probes, with commas (%(default)s)")
    made.add_argument("--backbones", default=",".join(BACKBONES), help="sources of features (%(default)s)")
    made.add_argument(
        "--features", default="mean", help="mean or std of the patch tokens, cls, or several: mean+std (%(default)s)"
    )
    made.add_argument(
        "--layers", default="last", help="last (after the final norm) and numbers of blocks, with commas (%(default)s)"
    )
    made.add_argument(
        "--image-sizes", metavar="N,…", help="sides of the encoder's image in px, with commas; features of several sizes are "
        "concatenated (default: as trained)",
    )  # fmt: skip
    made.add_argument(
        "--cases", choices=("slice", "series"), default="slice", help="series: scores are averaged over its slices"
    )
    made.add_argument("--batch-size", type=int, default=64, help="slices at a time (%(default)s)")
    made.add_argument("--draws", type=int, default=2000, help="bootstrap draws (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap and the folds (%(default)s)")
    cli.add_json(made, "the rows")
    made.add_argument(
        "--predictions", metavar="FILE", help="write the scores of every test case to this file (parquet)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), evaluate, argv, stopped="stopped; nothing was written, rerun the same command")


def evaluate(args: argparse.Namespace) -> None:
    import jax
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from curia_jax import checkpoint, trained_model
    from curia_jax.evaluate import features, labels, results, scoring, table
    from curia_jax.models import mae
    from data_pipeline.format.shards import SliceSource

    heads, backbones = _choice("head", args.heads, tuple(scoring.HEADS)), _choice("backbone", args.backbones, BACKBONES)
    layers, sizes = _layers(args.layers), _sizes(args.image_sizes)
    names = [name for name in args.label.split(",") if name]
    if not names:
        raise UserError("--label is empty; name a label of the shards, or modality, plane or body_part")
    if args.task and len(names) != 1:
        raise UserError(f"--task={args.task} names one task, but --label has {len(names)}; leave --task out")
    for option, low in (("batch_size", 1), ("draws", 1), ("seed", 0)):
        cli.at_least(f"--{option.replace('_', '-')}", getattr(args, option), low)
    cli.check_json(args.predictions, "--predictions")

    checkpoint.find(args.checkpoint, args.step)

    # ---- labels, before weights: they are quick to read and often what is wrong
    splits = [str(split) for split in np.unique(labels.read_index(args.shards).column("split").to_pylist())]
    if labels.TEST not in splits:
        raise UserError(
            f"{args.shards} has no test split (it has: {', '.join(splits)}); build it with --test above 0 and enough patients"
        )
    sources = {split: SliceSource(args.shards, split) for split in splits}
    index = pa.concat_tables([source.index for source in sources.values()])
    tasks = [labels.task(index, name, args.task) for name in names]

    # ---- features of every slice that has one of the labels
    trained = trained_model.load(args.checkpoint, args.step)
    if trained.config.encoder.channels != 1:
        raise UserError(
            f"the checkpoint's encoder takes {trained.config.encoder.channels} channels, but a slice has 1; "
            "score a checkpoint that was trained with --config.model.channels=1"
        )

    def view(backbone: str) -> features.View:
        if backbone == "pixels":
            return features.pixel_view(trained.augment)
        params = trained.params
        if backbone == "random":
            # Another seed than the checkpoint's, so that these are not the weights that its training started from.
            params = mae.init(trained.config, jax.random.key(trained.seed + 1))
        return features.encoder_view(
            trained.config.encoder, params["encoder"], trained.augment, pooling=args.features, layers=layers,
            image_sizes=sizes,
        )  # fmt: skip

    views = {name: view(name) for name in backbones}
    wanted = {
        split: np.unique(np.concatenate([task.splits[split].slices for task in tasks])) for split in labels.SPLITS
    }
    extracted = {}
    with Progress("features", sum(len(slices) for slices in wanted.values()), "slices") as progress:
        for split, slices in wanted.items():
            if len(slices):
                extracted[split] = features.extract(
                    sources[split], slices, views, batch_size=args.batch_size, progress=progress.step
                )

    # ---- probes and intervals
    preparation = json.dumps(dataclasses.asdict(trained.augment), sort_keys=True)
    from_encoder = results.Provenance(
        features=args.features, layers=args.layers, step=trained.step, examples_seen=trained.examples_seen,
        encoder_sha256=trained_model.digest(trained.params["encoder"]), image_size=trained.config.encoder.image_size,
        image_sizes=tuple(sizes),
        view_sha256=hashlib.sha256(preparation.encode()).hexdigest()[:16],
    )  # fmt: skip
    other = dataclasses.replace(from_encoder, features=None, layers=None)
    scores, predictions = [], []
    for task in tasks:
        # Features of the task's slices, in its order.
        own = {
            split: {
                name: values[np.searchsorted(wanted[split], task.splits[split].slices)]
                for name, values in by_name.items()
            }
            for split, by_name in extracted.items()
        }
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in task.splits.items())
        log.info(f"task {task.name}: {len(task.classes)} classes, slices: {counts}; intervals over {task.groups}")
        scored, cases = scoring.score(task, own, heads=heads, unit=args.cases, draws=args.draws, seed=args.seed)
        scores += [
            dataclasses.replace(score, provenance=from_encoder if score.backbone in ("checkpoint", "random") else other)
            for score in scored
        ]
        predictions.append(cases)

    cli.write_json(args.json, results.rows(scores))
    if args.predictions:
        pq.write_table(pa.concat_tables(predictions), args.predictions)
    table.show(scores)


def _choice(what: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"no {what} {name!r}; there are: {', '.join(known)}")
    if not names:
        raise UserError(f"no {what} given; there are: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _sizes(text: str | None) -> list[tuple[int, int]]:
    words = text.split(",") if text is not None else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--image-sizes={text}: write numbers of px with commas, such as 96,128")
    return [(int(word), int(word)) for word in words]


def _layers(text: str) -> list[int | str]:
    from curia_jax.evaluate.features import LAST

    words = text.split(",")
    if not all(word == LAST or word.isdecimal() for word in words):
        raise UserError(f"--layers={text}: write {LAST}, or numbers of blocks with commas, such as 6,12")
    return [word if word == LAST else int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
