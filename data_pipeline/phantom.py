"""Writes synthetic exams of known anatomy: an anatomical phantom in CT and MR, as DICOM series with masks and labels.

Tests, examples and the demo use it. The output folder gets dicom/<patient>/<series>/*.dcm, masks/<patient>_<series>.nii.gz
(label maps) and labels.csv. The same seed gives the same bytes. Each patient has a chest CT, an abdomen CT and T1- and
T2-weighted MR of the head. See data_pipeline/synthetic_exams.py for what is in it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.progress import Progress


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m data_pipeline.phantom", __doc__,
        examples="""
python -m data_pipeline.phantom --output phantom/ --patients 12 --seed 0
python -m data_pipeline.phantom --output phantom/ --patients 300 --series abdomen_ct --size 64 --slices 5 --varied
""",
    )  # fmt: skip
    made.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder")
    made.add_argument("--patients", type=int, default=12, help="(default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    made.add_argument("--size", type=int, default=128, help="rows and columns, px (default: %(default)s)")
    made.add_argument("--slices", type=int, default=24, help="per series (default: %(default)s)")
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
    from data_pipeline import synthetic_exams

    series = synthetic_exams.SERIES_NAMES if args.series is None else tuple(args.series.split(","))
    if unknown := [name for name in series if name not in synthetic_exams.SERIES_NAMES]:
        raise UserError(f"--series: no series {unknown[0]!r}; there are: {', '.join(synthetic_exams.SERIES_NAMES)}")
    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    with Progress("phantom", args.patients, "patients") as progress:
        table = synthetic_exams.write_study(
            folder, patients=args.patients, seed=args.seed, size=args.size, slices=args.slices, series=series,
            varied=args.varied, progress=progress,
        )  # fmt: skip
    logs.get_logger(__name__).info(
        f"{args.patients} patients in {folder / 'dicom'}; masks beside them; labels in {table}"
    )


if __name__ == "__main__":
    sys.exit(main())
