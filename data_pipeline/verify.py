"""Checks that a finished dataset is as it was written: every checksum, every record and slice, and that the tables agree.

It checks bytes, not meaning: whether values are the HU they should be, labels right or patients told apart, it cannot know.
For that look at the card (index.html), at `python -m data_pipeline.inspect SHARDS` and at its contact sheet.

What is checked:
  shards      size and SHA-256 as published; every record is read, every slice decoded and its mean compared
  index       one row per slice, with the values of the record; no patient in two splits
  TFDS        dataset_info.json and features.json describe these shards
  card        card.json has the right counts; so has manifest.parquet, if it is there
  hold-out    with --holdout and the key: none of its patients is in the index

Each problem is one line on standard output. Nothing is changed or repaired: copy or build damaged shards again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from data_pipeline.stages.pseudonyms import KEY_VARIABLE

EXAMPLES = """
python -m data_pipeline.verify shards/ --json=verified.json
python -m data_pipeline.verify shards/ --holdout=test_patients.txt --key-file ~/curia.key
"""
UNFINISHED = "an addition is not finished: its shards do not count yet; rerun its build to resume it"


def parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m data_pipeline.verify", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    p.add_argument("folder", metavar="SHARDS", help="dataset folder that data_pipeline.build wrote")
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    p.add_argument(
        "--holdout", metavar="FILE",
        help="prove that no patient of this file is in the dataset; one per line, as for data_pipeline.build: an ID, or a folder of DICOM files",
    )  # fmt: skip
    p.add_argument(
        "--key-file", metavar="FILE",
        help=f"secret of the pseudonyms, for --holdout; else the variable {KEY_VARIABLE}, else SHARDS.key",
    )  # fmt: skip
    cli.add_json(p, "counts and problems")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), _verify, argv, stopped="stopped; nothing was changed", quote_faults=False)


def _verify(args: argparse.Namespace) -> ExitCode:
    cli.at_least("--workers", args.workers, 1)
    if args.key_file and not args.holdout:
        raise UserError("--key-file is for --holdout=FILE; name that too")
    from data_pipeline.stages import verification

    report = verification.verify(
        Path(args.folder), workers_count=args.workers, holdout=args.holdout, key_file=args.key_file
    )
    cli.write_json(args.json, report.to_json())
    for problem in report.problems:
        print(problem)
    if report.held_out is not None:
        found = report.held_out
        print(
            f"held out: {found.lines:,} lines of {args.holdout} name {found.patients:,} patients; slices of them in the index: {found.slices_found:,}",
            file=sys.stderr,
        )
    if report.unfinished:
        print(UNFINISHED, file=sys.stderr)
    counts = f"{report.slices:,} slices in {report.records:,} records of {report.shards:,} shards, {report.bytes / 1e6:,.1f} MB"
    if report.problems:
        print(f"damaged: {len(report.problems):,} problems; {counts} could be read", file=sys.stderr)
        return ExitCode.DATA
    print(f"sound: {counts}; this checks bytes, not what they mean (data_pipeline.inspect shows that)", file=sys.stderr)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
