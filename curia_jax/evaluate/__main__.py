"""Scores frozen features of a checkpoint: kNN, ridge and logistic probes, against a random encoder and raw pixels.

Features of the train split are learned from, settings are chosen on the validation split (or by cross-validation over
patients where that does not hold every class), then each probe is fitted on both and meets the test split once.
Every figure comes with a 95 % interval from a bootstrap over patients; differences to the random encoder and to the
pixels are paired. Slices without a value of the label do not take part.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

BACKBONES = ("checkpoint", "random", "pixels")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=lesion --json=results.json
  python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=modality,plane --heads=ridge
  python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=lesion --cases=series \\
      --features=cls+mean --layers=6,12 --predictions=predictions.parquet
  python -m curia_jax.evaluate --checkpoint=demo/run --shards=demo/shards --label=lesion --image-sizes=64,96

rows of --json: task, backbone, head, metric, value, low, high (ends of the 95 % interval; null where undefined), n
  (test cases), and how they came about. A metric *_difference is that of `backbone` minus that of `against`.""",
    )
    parser.add_argument("--checkpoint", required=True, help="work directory of curia_jax.pretrain, or folder of a step")
    parser.add_argument("--shards", required=True, help="folder that data_pipeline.build wrote")
    parser.add_argument(
        "--label", required=True, help="label of the shards, or modality, plane or body_part; several with commas"
    )
    parser.add_argument("--step", type=int, help="checkpoint of this step; the newest unless given")
    parser.add_argument("--task", help="name of the task in the results; the label unless given")
    parser.add_argument("--heads", default="knn,ridge,logistic", help="probes, with commas (%(default)s)")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="where features come from (%(default)s)")
    parser.add_argument(
        "--features", default="mean", help="mean or std of the patch tokens, cls, or several: mean+std (%(default)s)"
    )
    parser.add_argument(
        "--layers", default="last", help="last (after the final norm) and numbers of blocks, with commas (%(default)s)"
    )
    parser.add_argument(
        "--image-sizes", metavar="N,…", help="sides of the image in px that the encoder sees, with commas: features of "
        "several sizes are concatenated; the one of the training unless given",
    )  # fmt: skip
    parser.add_argument(
        "--cases", choices=("slice", "series"), default="slice", help="series: scores are averaged over its slices"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="slices at a time (%(default)s)")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the folds (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--predictions", metavar="FILE", help="write the scores of every test case here (parquet)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    from curia_common.errors import UserError

    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax
    import ml_collections
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from curia_common.errors import UserError
    from curia_jax import checkpoint
    from curia_jax.evaluate import features, labels, scoring, table
    from curia_jax.models import mae
    from data_pipeline.format.shards import SliceSource

    heads, backbones = _choice("head", args.heads, tuple(scoring.HEADS)), _choice("backbone", args.backbones, BACKBONES)
    layers, sizes = _layers(args.layers), _sizes(args.image_sizes)
    names = [name for name in args.label.split(",") if name]
    if args.task and len(names) != 1:
        raise UserError(f"--task={args.task} names one task, but --label has {len(names)}; leave --task out")
    if args.draws < 1:
        raise UserError(f"--draws={args.draws}: a bootstrap needs at least 1 draw")

    # ---- what is scored: labels before weights, because they are quick to read and often what is wrong
    splits = np.unique(labels.read_index(args.shards).column("split").to_pylist())
    if labels.TEST not in splits:
        raise UserError(
            f"{args.shards} has no test split (it has: {', '.join(splits)}); build it from more patients, "
            "so that some are left for the test"
        )
    sources = {str(split): SliceSource(args.shards, str(split)) for split in splits}
    index = pa.concat_tables([source.index for source in sources.values()])
    tasks = [labels.task(index, name, args.task) for name in names]

    loaded = checkpoint.load(args.checkpoint, args.step)
    config = features.model(loaded.config["model"], loaded.params)
    settings = ml_collections.ConfigDict(loaded.config["augment"])

    # ---- features, of every slice that has one of the labels
    views = {}
    for backbone in backbones:
        if backbone == "pixels":
            views[backbone] = features.pixel_view(settings)
            continue
        params = loaded.params
        if backbone == "random":
            # Another seed than the checkpoint started from: weights that no training has touched.
            params = mae.init(config, jax.random.key(loaded.config["seed"] + 1))
        views[backbone] = features.encoder_view(
            config.encoder, params["encoder"], settings, pooling=args.features, layers=layers, image_sizes=sizes
        )
    wanted = {
        split: np.unique(np.concatenate([task.splits[split].slices for task in tasks])) for split in labels.SPLITS
    }
    found = {}
    with features.Progress("features", sum(len(slices) for slices in wanted.values())) as progress:
        for split, slices in wanted.items():
            if len(slices):
                found[split] = features.extract(
                    sources[split], slices, views, batch_size=args.batch_size, progress=progress.advance
                )

    # ---- probes and intervals
    provenance = {
        "step": loaded.step, "examples_seen": loaded.examples_seen,
        "encoder_sha256": features.digest(loaded.params["encoder"]),
        "image_size": list(config.encoder.image_size), "image_sizes": [list(size) for size in sizes],
        "view_sha256": hashlib.sha256(settings.to_json(sort_keys=True).encode()).hexdigest()[:16],
    }  # fmt: skip
    rows, predictions = [], []
    for task in tasks:
        # Features of this task's slices, in its order.
        own = {
            split: {
                name: values[np.searchsorted(wanted[split], task.splits[split].slices)]
                for name, values in by_name.items()
            }
            for split, by_name in found.items()
        }
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in task.splits.items())
        print(f"task {task.name}: {len(task.classes)} classes, slices: {counts}", file=sys.stderr, flush=True)
        scored, cases = scoring.score(task, own, heads=heads, unit=args.cases, draws=args.draws, seed=args.seed)
        for row in scored:
            from_tokens = row["backbone"] in ("checkpoint", "random")
            source = {"features": args.features, "layers": args.layers} if from_tokens else {}
            rows.append(row | source | provenance)
        predictions.append(cases)

    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.predictions:
        pq.write_table(pa.concat_tables(predictions), args.predictions)
    table.show(rows)
    return rows


def _choice(what: str, text: str, known: tuple[str, ...]) -> list[str]:
    from curia_common.errors import UserError

    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"no {what} {name!r}; there are: {', '.join(known)}")
    if not names:
        raise UserError(f"no {what} given; there are: {', '.join(known)}")
    return names


def _sizes(text: str | None) -> list[tuple[int, int]]:
    from curia_common.errors import UserError

    words = text.split(",") if text is not None else []
    if not all(word.isdigit() for word in words):
        raise UserError(f"--image-sizes={text}: write numbers of px with commas, such as 96,128")
    return [(int(word), int(word)) for word in words]


def _layers(text: str) -> list[int | str]:
    from curia_common.errors import UserError
    from curia_jax.evaluate.features import LAST

    words = text.split(",")
    if not all(word == LAST or word.isdigit() for word in words):
        raise UserError(f"--layers={text}: write {LAST}, or numbers of blocks with commas, such as 6,12")
    return [word if word == LAST else int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
