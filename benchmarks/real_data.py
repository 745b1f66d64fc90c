"""Pretrains a small ViT-MAE on real CT and MR slices and probes it on labelled sets: the table of docs/results.md.

It runs the commands a user types, on the folder of public files that the test suite uses too (see docs/results.md):

  1  a label table: what is probed (tumor, covid, contrast), its splits, and everything else for pretraining alone
  2  python -m data_pipeline.build         slices of a labelled test split are in the split `test` and nowhere else
  3  python -m curia_jax.pretrain          on the split `train`, with configs/real_data.py
  4  python -m curia_jax.evaluate          against a random encoder and raw pixels, 95 % intervals over patients
  5  the table, in Markdown, on standard output

Started again after an interruption it goes on where it was.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("tumor", "covid", "contrast")
HEADS = ("knn", "ridge", "logistic")
# How features are read off the encoder was chosen by cross-validation on the cases to learn from; see docs/results.md.
FEATURES = "mean+std"
# Early, middle and last blocks: the last alone is best at what it was trained on, filling in pixels.
LAYERS = "4,8,12"
# Of the images, in px: that of the training, and larger ones, in which a whole slice looks as large as in training crops.
IMAGE_SIZES = "96,128,160"
COLUMNS = ("file", "split", "patient", "modality", *LABELS)
# Ultrasound, and files that are no image at all; label maps beside an image are found by the build itself.
LEFT_OUT = ("registration/prostate_mr_us/us_", ".txt", ".csv", ".md")


def label_table(data: Path) -> list[dict[str, str]]:
    """One row a file. Unlabelled files are for training; patients are known by the table or by the header."""
    rows = []
    tumor = data / "labelled" / "mr_brain_tumor"
    for line in _read(tumor / "labels.csv"):
        # Patients are unknown here: the file name stands for one.
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
        # A few publications appear in two of the official splits: those stay in the later one alone.
        last = next(split for split in ("test", "val", "train") if split in splits[line["source_group"]])
        if line["official_split"] == last:
            rows.append(
                {
                    "file": covid / line["file"],
                    # Settings are chosen by cross-validation over publications: 118 cases would choose at random.
                    "split": "test" if last == "test" else "train",
                    "patient": line["source_group"],
                    "modality": "CT",
                    "covid": {"0": "no", "1": "yes"}[line["covid"]],
                }
            )
    contrast = data / "labelled" / "ct_luad_contrast"
    lines = _read(contrast / "labels.csv")
    patients = sorted({line["patient"] for line in lines}, key=_point)
    held_out = set(patients[::2])
    for line in lines:
        rows.append(
            {
                "file": contrast / line["file"],
                "split": "test" if line["patient"] in held_out else "train",
                "patient": line["patient"],
                "contrast": {"0": "no", "1": "yes"}[line["contrast"]],
            }
        )
    for folder in ("dicom", "nifti", "registration"):
        for path in sorted(p for p in (data / folder).rglob("*") if p.is_file()):
            name = path.relative_to(data).as_posix()
            if not any(name.startswith(part) or name.endswith(part) for part in LEFT_OUT):
                words = name.split("/")[1].split("_")
                modality = next((word.upper() for word in words if word in ("ct", "mr")), "")
                rows.append({"file": path, "split": "train", "modality": modality})
    return rows


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _point(text: str) -> float:
    """A fixed point in [0, 1) for a text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/real_data.py
  python benchmarks/real_data.py --output=runs/short --config.duration='10000 examples' --config.seed=1""",
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
    shards, run, results = output / "shards", output / "run", output / "results.json"

    # ---- exams to shards
    labels = output / "labels.csv"
    with labels.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "file": os.path.relpath(row["file"], output)} for row in label_table(args.data))
    key = output / "key"
    key.write_text("these files are public, their pseudonyms have no secret\n", encoding="utf-8")
    command(
        "data_pipeline.build", "--input", str(args.data), f"--output={shards}", f"--labels={labels}",
        "--label-columns", *LABELS, "--split-column=split", "--patient-column=patient",
        "--modality-column=modality", f"--key-file={key}", "--size=256",
    )  # fmt: skip

    # ---- pretraining: what it cost is kept beside it, because a second call finds it done
    cost_file = output / "cost.json"
    cost = json.loads(cost_file.read_text(encoding="utf-8")) if cost_file.exists() else {"wall_s": 0.0, "cpu_s": 0.0}
    wall, cpu = command(
        "curia_jax.pretrain", f"--config={ROOT / 'configs' / 'real_data.py'}", f"--workdir={run}",
        f"--config.data.shards={shards}", *overrides,
    )  # fmt: skip
    cost = {"wall_s": cost["wall_s"] + wall, "cpu_s": cost["cpu_s"] + cpu}
    cost_file.write_text(json.dumps(cost) + "\n", encoding="utf-8")

    # ---- probes
    command(
        "curia_jax.evaluate", f"--checkpoint={run}", f"--shards={shards}", f"--label={','.join(LABELS)}",
        f"--heads={','.join(HEADS)}", f"--features={FEATURES}", f"--layers={LAYERS}",
        f"--image-sizes={IMAGE_SIZES}", f"--json={results}",
    )  # fmt: skip
    print(markdown(json.loads(results.read_text(encoding="utf-8")), run, cost))
    return 0


def command(module: str, *words: str) -> tuple[float, float]:
    """Runs `python -m module words`; returns its wall-clock and CPU seconds.

    glibc gives freed memory back to the kernel and gets it zeroed page by page, in every step anew; keeping it, in huge
    pages, makes a CPU step about a tenth faster.
    """
    keep = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
    print(f"$ {shlex.join(['python', '-m', module, *words])}", file=sys.stderr, flush=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", module, *words], env={"GLIBC_TUNABLES": keep, **os.environ, "PYTHONPATH": str(ROOT)}
    ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(code)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return time.monotonic() - began, cpu


def markdown(rows: list[dict], run: Path, cost: dict[str, float]) -> str:
    """The tables of docs/results.md."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    first, last = (
        json.loads((run / name).read_text(encoding="utf-8").splitlines()[at])
        for name, at in (("events.jsonl", 0), ("metrics.jsonl", -1))
    )
    lines = [
        f"{last['step']:,} steps of {config['batch_size']}, {last['examples_seen']:,} samples of {first['slices']:,} slices, "
        f"seed {config['seed']}; {cost['wall_s'] / 60:.0f} minutes, {cost['cpu_s'] / 60:.0f} core minutes; "
        f"last loss {last['loss']:.4f} against {last['baseline_loss']:.4f} for predicting each patch's mean",
        "",
    ]
    for metric in ("auroc", "accuracy"):
        lines += [
            f"| {metric.upper() if metric == 'auroc' else metric} | probe | checkpoint | random encoder | pixels "
            "| checkpoint - random | checkpoint - pixels | test cases |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for task in LABELS:
            for head in HEADS:
                own = [row for row in rows if row["task"] == task and row["head"] == head]
                cells = [
                    _cell(own, metric, backbone="checkpoint"),
                    _cell(own, metric, backbone="random"),
                    _cell(own, metric, backbone="pixels"),
                    _cell(own, f"{metric}_difference", against="random"),
                    _cell(own, f"{metric}_difference", against="pixels"),
                ]
                lines.append(f"| {task} | {head} | {' | '.join(cells)} | {own[0]['n']} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(rows: list[dict], metric: str, **match: str) -> str:
    row = next(row for row in rows if row["metric"] == metric and all(row[k] == v for k, v in match.items()))
    sign = "+" if metric.endswith("_difference") else ""
    return f"{row['value']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


if __name__ == "__main__":
    sys.exit(main())
