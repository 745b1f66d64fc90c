"""Writes synthetic exams of known anatomy: an anatomical phantom in CT and MR, as DICOM series with masks and labels.

Tests, examples and the demo use it. The output folder gets dicom/<patient>/<series>/*.dcm, masks/<patient>_<series>.nii.gz
(label maps) and labels.csv. The same seed gives the same bytes. Each patient has a chest CT, an abdomen CT and T1- and
T2-weighted MR of the head. See data_pipeline/synthetic_exams.py for what is in it.

With --suite=curiabench it writes the benchmark's tasks instead, in its published schema: <task>/{train,val,test}.parquet with image,
mask, target, filename, series_id and patient_id, and cards (README.md) that `datasets.load_dataset` reads. Classes are as many as
CuriaBench's, and differ in shape and place. See data_pipeline/synthetic_tasks/ for what tells them apart.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.progress import Progress

PATIENTS, SIZE, SLICES = 12, 128, 24
TEST_PATIENTS, SUITE_SIZE = 40, 64

log = logs.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m data_pipeline.phantom", __doc__,
        examples="""
python -m data_pipeline.phantom --output phantom/ --patients 12 --seed 0
python -m data_pipeline.phantom --output phantom/ --patients 300 --series abdomen_ct --size 64 --slices 5 --varied
python -m data_pipeline.phantom --suite curiabench --output suite/
python -m data_pipeline.phantom --suite curiabench --tasks kits,ixi --output suite/
""",
    )  # fmt: skip
    made.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder")
    made.add_argument(
        "--suite", choices=("curiabench",), help="labelled images for the tasks of a benchmark, instead of exams"
    )
    made.add_argument("--tasks", metavar="NAME,…", help="of the suite, with commas (default: all)")
    made.add_argument(
        "--patients", type=int,
        help=f"(default: {PATIENTS}); test patients of each task of a suite (default: {TEST_PATIENTS}), which has as many for "
        "validation and three times as many for training",
    )  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    made.add_argument(
        "--size", type=int, help=f"rows and columns, px (default: {SIZE}; of a suite {SUITE_SIZE}, the demo's)"
    )
    made.add_argument("--slices", type=int, help=f"per series (default: {SLICES})")
    made.add_argument(
        "--series",
        metavar="NAME,…",
        help="of every patient, with commas: chest_ct, abdomen_ct, head_t1, head_t2 (default: all)",
    )
    made.add_argument(
        "--varied", action="store_true",
        help="patients differ in how they lie, in contrast phase and noise, and half of them have situs inversus",
    )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "stopped; the output folder is incomplete: delete it and rerun the same command"
    return cli.run(parser(), write, argv, stopped=stopped)


def write(args: argparse.Namespace) -> None:
    only = ("slices", "series", "varied") if args.suite else ("tasks",)
    if wrong := [name for name in only if getattr(args, name)]:
        raise UserError(f"--{wrong[0]} is {'not for' if args.suite else 'only for'} --suite; leave it out")
    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    if args.suite:
        _write_suite(args, folder)
    else:
        _write_study(args, folder)


def _write_study(args: argparse.Namespace, folder: Path) -> None:
    from data_pipeline import synthetic_exams

    series = synthetic_exams.SERIES_NAMES if args.series is None else tuple(args.series.split(","))
    if unknown := [name for name in series if name not in synthetic_exams.SERIES_NAMES]:
        raise UserError(f"--series: no series {unknown[0]!r}; there are: {', '.join(synthetic_exams.SERIES_NAMES)}")
    patients = PATIENTS if args.patients is None else args.patients
    with Progress("phantom", patients, "patients") as progress:
        table = synthetic_exams.write_study(
            folder, patients=patients, seed=args.seed, size=SIZE if args.size is None else args.size,
            slices=SLICES if args.slices is None else args.slices, series=series, varied=args.varied, progress=progress,
        )  # fmt: skip
    log.info(f"{patients} patients in {folder / 'dicom'}; masks beside them; labels in {table}")


def _write_suite(args: argparse.Namespace, folder: Path) -> None:
    from data_pipeline.synthetic_tasks import tables, tasks

    chosen = tasks.choose(args.tasks)
    patients = TEST_PATIENTS if args.patients is None else args.patients
    size = SUITE_SIZE if args.size is None else args.size
    cli.at_least("--patients", patients, 3)
    cli.at_least("--size", size, 32)
    total = sum(tasks.patients(task, split, patients) for task in chosen for split in tasks.SPLITS)
    with Progress("phantom", total, "patients") as progress:
        tables.write_suite(folder, chosen, test_patients=patients, seed=args.seed, size=size, progress=progress)
    log.info(f"{len(chosen)} tasks in {folder}; README.md says what is in them")
    if args.tasks is None:
        for name, reason in tasks.WITHOUT_FOLDER.items():
            log.info(f"no folder for {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
