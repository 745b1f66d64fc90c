"""Pretrains a small ViT-MAE on real CT and MR slices and scores it on labelled sets: the tables of docs/results.md.

It runs the commands that a user types, on the folder of public files that the test suite uses too (see docs/results.md):

  1  a label table: the labels that are scored (tumor, covid, contrast, age), their splits, and all other files for pretraining
  2  python -m data_pipeline.build         slices of a labelled test split are in the split `test` and nowhere else
  3  python -m curia_jax.pretrain          on the split `train`, with configs/real_data.py
  4  python -m curia_jax.evaluate          the labels, few of them, and organ recognition (benchmarks/organ_tasks.py), each
                                           beside a random encoder, raw pixels and their histogram; a folder of results for each command
  5  the tables, in Markdown, on standard output

Rerun the command to resume after an interruption.
"""

import argparse
import csv
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import organ_tasks
from curia_jax import demo
from curia_jax.evaluate import results as evaluate_results
from curia_jax.evaluate.results import ALL_LABELS, FLOORS, RESULTS, SHARDS, Score

ROOT = Path(__file__).resolve().parents[1]

CLASSES, AGE = ("tumor", "covid", "contrast"), "age"
LABELS = (*CLASSES, AGE)
ORGANS, ACROSS = ("anatomy-ct", "anatomy-mri"), "anatomy-cross-modality"
HEADS, TOKEN_HEAD = ("knn", "ridge", "logistic"), "efficient"
# Pooling, layers and image sizes were chosen by cross-validation on the training cases; see docs/results.md.
# Early, middle and last blocks: the last is specialised in the training task, predicting pixels.
FEATURES = "mean+std@4+8+12"
# In px: the size of the training, and larger ones, in which a whole slice shows objects as large as training crops do.
IMAGE_SIZES = "96,128,160"
FEW_LABELS, FEW_HEAD = "0.05,0.1,0.25,0.5,1.0", "ridge"
COLUMNS: tuple[str, ...] = ("file", "split", "patient", "modality", *LABELS)
ULTRASOUND = "registration/prostate_mr_us/us_"
NO_IMAGES = (".txt", ".csv", ".md")


def label_table(data: Path) -> list[dict[str, str | Path]]:
    """One row per file that is used. Unlabelled files are for training; patients are those of the table or of the header."""
    rows: list[dict[str, str | Path]] = []
    tumor = data / "labelled" / "mr_brain_tumor"
    for line in _read(tumor / "labels.csv"):
        # Patients are unknown here: every file counts as one.
        rows.append(
            {
                "file": tumor / line["file"],
                "split": line["split"],
                "modality": "MR",
                "tumor": line["class"],
            }
        )
    covid = data / "labelled" / "ct_covid"
    lines = _read(covid / "labels.csv")
    splits = defaultdict(set)
    for line in lines:
        splits[line["source_group"]].add(line["official_split"])
    for line in lines:
        # A few publications are in two of the official splits: keep them in the later one only.
        last = next(split for split in ("test", "val", "train") if split in splits[line["source_group"]])
        if line["official_split"] == last:
            rows.append(
                {
                    "file": covid / line["file"],
                    # Settings are chosen by cross-validation over publications: 118 validation cases are too few.
                    "split": "test" if last == "test" else "train",
                    "patient": line["source_group"],
                    "modality": "CT",
                    "covid": {"0": "no", "1": "yes"}[line["covid"]],
                }
            )
    contrast = data / "labelled" / "ct_luad_contrast"
    lines = _read(contrast / "labels.csv")
    patients = sorted({line["patient"] for line in lines}, key=point)
    held_out = set(patients[::2])
    for line in lines:
        rows.append(
            {
                "file": contrast / line["file"],
                "split": "test" if line["patient"] in held_out else "train",
                "patient": line["patient"],
                "contrast": {"0": "no", "1": "yes"}[line["contrast"]],
                "age": f"{float(line['age']):g}",
            }
        )
    for folder in ("dicom", "nifti", "registration"):
        for path in sorted(p for p in (data / folder).rglob("*") if p.is_file()):
            name = path.relative_to(data).as_posix()
            if not name.startswith(ULTRASOUND) and not name.endswith(NO_IMAGES):
                words = name.split("/")[1].split("_")
                modality = next((word.upper() for word in words if word in ("ct", "mr")), "")
                rows.append({"file": path, "split": "train", "modality": modality})
    return rows


def left_out(data: Path) -> list[Path]:
    """Images that no row of the label table names: ultrasound, and pictures that are in two of the official splits."""
    used = {row["file"] for row in label_table(data)}
    files = (path for path in sorted(data.rglob("*")) if path.is_file() and path.suffix not in NO_IMAGES)
    return [path for path in files if path not in used]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def point(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m benchmarks.real_data
  python -m benchmarks.real_data --output=runs/short --config.duration='10000 examples' --config.seed=1""",
    )
    data = Path(os.environ.get("CURIA_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data, help="or the variable CURIA_DATA (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/real_data"), help="(%(default)s)")
    args, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    if not (args.data / "labelled").is_dir():
        parser.error(f"--data={args.data} has no folder 'labelled'; name the folder that docs/results.md describes")
    return args, overrides


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(argv)
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    shards, run, results = output / "shards", output / "run", output / "results"

    # ---- exams to shards
    labels = output / "labels.csv"
    with labels.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "file": os.path.relpath(row["file"], output)} for row in label_table(args.data))
    unused = output / "unused.txt"
    unused.write_text("".join(f"{path}\n" for path in left_out(args.data)), encoding="utf-8")
    key = output / "key"
    key.write_text("these files are public, their pseudonyms have no secret\n", encoding="utf-8")
    command(
        "data_pipeline.build", "--input", str(args.data), f"--output={shards}", f"--labels={labels}", f"--holdout={unused}",
        "--label-columns", *LABELS, "--split-column=split", "--patient-column=patient",
        "--modality-column=modality", f"--key-file={key}", "--size=256",
    )  # fmt: skip

    # ---- pretraining; its cost is saved, because a second call finds it finished
    cost_file, metrics = output / "cost.json", run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    cost = json.loads(cost_file.read_text(encoding="utf-8")) if cost_file.exists() else {"wall_s": 0.0, "cpu_s": 0.0}
    wall, cpu = command(
        "curia_jax.pretrain", "--config=real_data", f"--workdir={run}",
        f"--config.data.shards={shards}", *overrides,
    )  # fmt: skip
    if metrics.stat().st_size > before:
        cost = {"wall_s": cost["wall_s"] + wall, "cpu_s": cost["cpu_s"] + cpu}
    cost_file.write_text(json.dumps(cost) + "\n", encoding="utf-8")

    # ---- scores
    organs = output / "organs"
    organ_tasks.write(args.data, organs)
    for one in studies(shards, organs):
        command(
            "curia_jax.evaluate", f"--tasks={','.join(one.tasks)}", f"--data={one.data}", f"--backbones={run}",
            f"--corpus={shards}", f"--cache={output / 'cache'}", f"--output={results / one.name}", *one.options,
        )  # fmt: skip
    scores = {one.name: evaluate_results.read(results / one.name / RESULTS) for one in studies(shards, organs)}
    print(markdown(scores, run, cost))
    return 0


class Study(NamedTuple):
    """One evaluate command: the folder of its results below `results`, and what it gets."""

    name: str
    tasks: Sequence[str]
    data: Path
    options: Sequence[str]


def studies(shards: Path, organs: Path) -> tuple[Study, ...]:
    """All evaluate commands."""
    features = f"--features={FEATURES}"
    labels = [f"{SHARDS}{label}" for label in CLASSES]
    return (
        Study(
            "labels", (*labels, f"{SHARDS}{AGE}:value"), shards,
            (f"--heads={','.join(HEADS)}", features, f"--image-sizes={IMAGE_SIZES}"),
        ),
        # At the size of the training alone: the official protocol has no other.
        Study(
            "organs", (*ORGANS, ACROSS), organs,
            (
                "--protocol=both", f"--heads={','.join((*HEADS, TOKEN_HEAD))}", features,
                f"--class-map={organs / organ_tasks.CLASS_MAP}",
            ),
        ),
        Study(
            "few_labels", labels[:2], shards,
            (f"--heads={FEW_HEAD}", features, f"--image-sizes={IMAGE_SIZES}", f"--labels={FEW_LABELS}"),
        ),
        # The same: this head learns from all tokens, of which larger images have many.
        Study("tokens", labels, shards, (f"--heads={TOKEN_HEAD}",)),
    )  # fmt: skip


def command(module: str, *words: str) -> tuple[float, float]:
    """Runs `python -m module words`; returns its wall-clock and CPU seconds."""
    tunables = demo.ENVIRONMENT["GLIBC_TUNABLES"]
    print(f"$ {shlex.join(['python', '-m', module, *words])}", file=sys.stderr, flush=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", module, *words], env={"GLIBC_TUNABLES": tunables, **os.environ, "PYTHONPATH": str(ROOT)}
    ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(code)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return time.monotonic() - began, cpu


def markdown(scores: Mapping[str, Sequence[Score]], run: Path, cost: Mapping[str, float]) -> str:
    """The tables of docs/results.md.

    Args:
      scores: by the name of their study.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    first, last = (
        json.loads((run / name).read_text(encoding="utf-8").splitlines()[at])
        for name, at in (("events.jsonl", 0), ("metrics.jsonl", -1))
    )
    pretraining = (
        f"{last['step']:,} steps of {config['batch_size']}, {last['examples_seen']:,} samples of {first['slices']:,} slices, "
        f"seed {config['seed']}; {cost['wall_s'] / 60:.0f} minutes, {cost['cpu_s'] / 60:.0f} core minutes; "
        f"last loss {last['loss']:.4f} against {last['baseline_loss']:.4f} for predicting each patch's mean"
    )
    of_labels = [*scores["labels"], *scores["tokens"]]
    return "\n\n".join(
        (
            pretraining,
            table(of_labels, "auroc", run),
            table(of_labels, "accuracy", run),
            table(of_labels, "mae", run),
            table(scores["organs"], "accuracy", run),
            lost(scores["organs"], run),
            few_labels(scores["few_labels"], run),
        )
    )


def table(scores: Sequence[Score], metric: str, run: Path) -> str:
    """A metric of the checkpoint and of all floors, and their differences; a row for each task and head."""
    lines = [
        f"| {metric} | head | checkpoint | {' | '.join(FLOORS)} | {' | '.join(f'checkpoint - {name}' for name in FLOORS)} | test cases |",
        "|" + "---|" * (4 + 2 * len(FLOORS)),
    ]
    own = [score for score in scores if score.metric == metric and score.head != "none"]
    by_row: dict[tuple[str, str], dict[tuple[str, str | None], Score]] = defaultdict(dict)
    for score in own:
        head = score.head if score.study.protocol == "ours" else f"{score.head} ({score.study.protocol})"
        by_row[score.study.title, head][score.backbone, score.against] = score
    for (title, head), found in by_row.items():
        wanted = [(str(run), None), *((name, None) for name in FLOORS), *((str(run), name) for name in FLOORS)]
        cells = [_cell(found[one]) for one in wanted]
        lines.append(f"| {title} | {head} | {' | '.join(cells)} | {found[wanted[0]].study.n} |")
    return "\n".join(lines)


def _cell(score: Score) -> str:
    """A value with its interval, and a question mark where the interval means little."""
    return f"{score.value_text} {score.interval_text}{'?' if score.doubt else ''}"


def lost(scores: Sequence[Score], run: Path) -> str:
    """Accuracy of heads that learned from the other modality, minus that of heads that learned from the one that is tested."""
    lines = [f"| accuracy lost | head | checkpoint | {' | '.join(FLOORS)} |", "|" + "---|" * (3 + len(FLOORS))]
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for score in scores:
        if score.metric == "accuracy" and score.against == f"trained on {score.study.tested_on}":
            cells[score.study.title, score.head][score.backbone] = _cell(score)
    for (title, head), found in cells.items():
        if head != "none":
            lines.append(f"| {title} | {head} | {' | '.join(found[name] for name in (str(run), *FLOORS))} |")
    return "\n".join(lines)


def few_labels(scores: Sequence[Score], run: Path) -> str:
    """AUROC of one head by the share of the labels, mean and range over the subsets."""
    lines = [f"| AUROC, {FEW_HEAD} | labels | checkpoint | {' | '.join(FLOORS)} |", "|" + "---|" * (3 + len(FLOORS))]
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for score in scores:
        if score.metric == "auroc" and score.against is None and score.value is not None:
            values[score.study.title, score.study.labels, score.backbone].append(score.value)
    for title, share in dict.fromkeys(key[:2] for key in values):
        cells = []
        for backbone in (str(run), *FLOORS):
            found = values[title, share, backbone]
            spread = "" if share == ALL_LABELS else f" ({min(found):.3f} to {max(found):.3f})"
            cells.append(f"{sum(found) / len(found):.3f}{spread}")
        lines.append(f"| {title} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
