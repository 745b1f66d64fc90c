"""Writes one self-contained HTML page of a run: scores, reconstructed slices, loss, throughput, artefacts.

The pictures are embedded, and are written as PNG to <name>_pictures/ beside the page. Nothing is loaded from a network, and
neither file names, paths of exams, patients nor series are shown.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode

EXAMPLES = """
python -m curia_jax.report --run=demo/run --shards=demo/shards --results=demo/results/results.json --output=report.html
"""
LAYOUTS = {
    "vit_mae": "ViTMAEForPreTraining of transformers", "vit": "ViTModel of transformers",
    "dinov2": "Dinov2Model of transformers", "timm": "timm",
}  # fmt: skip
PACKAGES = ("curia-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")
SLICES_SHOWN = 3  # of each modality

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser("python -m curia_jax.report", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    made.add_argument("--run", required=True, help="work directory of curia_jax.pretrain")
    made.add_argument("--shards", required=True, help="folder that data_pipeline.build wrote")
    made.add_argument("--results", required=True, help="results.json that curia_jax.evaluate wrote")
    made.add_argument("--weights", help="folder with the layouts that curia_jax.convert wrote")
    made.add_argument("--timeline", help="what was run and how long it took, as curia_jax.demo writes it (JSON)")
    made.add_argument("--about", default="", metavar="TEXT", help="what the tasks are, in a paragraph above the scores")
    made.add_argument(
        "--control",
        default="",
        metavar="TASK,…",
        help="tasks of the results whose labels were shuffled, one for each shuffle",
    )
    made.add_argument("--raw-output", action="store_true", help="also show the decoder's output for visible patches")
    made.add_argument("--title", default="A masked autoencoder of CT and MR slices", help="headline (%(default)s)")
    made.add_argument("--output", required=True, help="HTML file to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), report, argv, stopped="stopped; rerun the same command to write the report")


def report(args: argparse.Namespace) -> None:
    import pyarrow as pa
    from etils import epath

    from curia_jax import trained_model
    from curia_jax.evaluate import labels, results
    from curia_jax.report import findings, page, pictures, run_log, sections, timeline
    from data_pipeline.format import files
    from data_pipeline.format.shards import MANIFEST, SliceSource

    # ---- inputs
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output={args.output} is a folder; name a file in it")
    run = run_log.read(args.run)
    controls = args.control.split(",") if args.control else []
    every_score = [score for score in results.read(args.results) if not score.study.few_text]
    scores = [score for score in every_score if score.study.task not in controls]
    story = timeline.read(args.timeline) if args.timeline else None
    index = labels.read_index(args.shards)
    manifest = files.read_table(
        Path(args.shards, MANIFEST), {"fate": pa.string(), "reason": pa.string()}, nullable=("reason",)
    )
    if args.weights and not Path(args.weights).is_dir():
        raise UserError(f"--weights={args.weights} is not a folder; name the parent of the folders that convert wrote")
    layouts = sorted(path for path in Path(args.weights).iterdir() if path.is_dir()) if args.weights else []
    trained = trained_model.load(args.run)

    # ---- pictures
    folder = output.with_name(f"{output.stem}_pictures")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss": pictures.loss_curve(run.metrics, run.resumed_at),
        "throughput": pictures.throughput(run.metrics, run.resumed_at),
    }
    # Slices that no training has seen, if there are any.
    splits = set(index.column("split").to_pylist())
    split = next((name for name in reversed(sections.SPLITS) if name in splits), None)
    if split is None:
        raise UserError(f"{args.shards} has none of the splits {', '.join(sections.SPLITS)}")
    source = SliceSource(args.shards, split)
    for modality in sections.MODALITIES:
        chosen = pictures.choose_slices(source, modality, SLICES_SHOWN)
        if len(chosen):
            examples = pictures.reconstruct(source, chosen, trained)
            figures[modality] = pictures.reconstructions(examples, raw=args.raw_output)
    if any(score.metric == "auroc" for score in scores):
        figures["scores"] = pictures.forest(scores, "auroc")
    images = {name: page.embed(figure, folder / f"{name.lower()}.png") for name, figure in figures.items()}

    # ---- page
    artefacts = [
        (Path(args.shards), "slice shards (a TFDS dataset over ArrayRecord), index.parquet, manifest.parquet"),
        (
            epath.Path(args.run),
            "work directory: checkpoints, metrics.jsonl, events.jsonl, TensorBoard events, config.json",
        ),
        *((path, f"safetensors for {LAYOUTS.get(path.name, path.name)}") for path in layouts),
        (Path(args.results), "scores"),
        (folder, "the pictures of this page"),
        (output, "this page"),
    ]
    found = findings.find(scores)
    not_probed = story.not_probed if story else {}
    parts = [
        sections.key_figures(run, found, index, story),
        sections.scores(
            images.get("scores"),
            scores,
            found,
            not_probed,
            args.about,
            findings.control_sentence(every_score, controls),
        ),
        sections.reconstructions(images, trained.config, split),
        sections.loss(images["loss"], run, trained.config),
        sections.dataset(index, manifest),
        sections.run(images["throughput"], run),
        sections.stages(story),
        sections.artefacts(artefacts),
        sections.next_commands(story),
    ]
    now = datetime.datetime.now().astimezone()
    days = [datetime.datetime.fromtimestamp(run.metrics[i].time).astimezone().strftime("%-d %B %Y") for i in (0, -1)]
    lead = f"Trained {' to '.join(dict.fromkeys(days))}; step {trained.step:,}; written {now.strftime('%-d %B %Y, %H:%M %Z')}."
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    footer = (
        f"Python {platform.python_version()}, {versions}. Made by python -m curia_jax.report. "
        "For research; not a medical device, and no figure here supports a clinical decision."
    )
    output.write_text(page.page(args.title, lead, parts, footer), encoding="utf-8")
    log.info(f"report: {args.output}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
