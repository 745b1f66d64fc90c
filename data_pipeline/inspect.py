"""Shows what is in a dataset: counts, series, the fields of a record, a contact sheet, and how it differs from another one.

"units from" says what speaks for the unit of a series: proved (its pixels agree with it), declared (its header says so, the
pixels neither agree nor disagree), guessed (modality or unit is inferred from the values).

Series and patients are pseudonyms here too; a unique beginning of one is enough.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode

EXAMPLES = """
python -m data_pipeline.inspect shards/
python -m data_pipeline.inspect shards/ --sheet=sheet.png --count=48
python -m data_pipeline.inspect shards/ --series 3f2a 91c0 --sheet=sheet.png
python -m data_pipeline.inspect shards/ --split=test --slice=17
python -m data_pipeline.inspect shards/ --diff=yesterday/
"""


def parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m data_pipeline.inspect", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    p.add_argument("folder", metavar="SHARDS", help="dataset folder that data_pipeline.build wrote")
    p.add_argument("--series", nargs="+", metavar="ID", help="only these series (pseudonyms, or how they begin)")
    p.add_argument("--split", help="only this split: train, validation or test; several with a plus (default: all)")
    p.add_argument("--slice", type=int, metavar="N", help="print all fields of the record of slice N of the selection")
    p.add_argument("--sheet", metavar="FILE", help="write a contact sheet of the selection (PNG)")
    p.add_argument("--count", type=int, default=24, metavar="N", help="slices on the sheet (default: %(default)s)")
    p.add_argument("--columns", type=int, default=6, metavar="N", help="tiles in a row (default: %(default)s)")
    p.add_argument("--tile", type=int, default=192, metavar="PX", help="side of a tile (default: %(default)s)")
    p.add_argument(
        "--diff", metavar="OTHER", help=f"compare with another dataset folder, slice by slice; exit code {ExitCode.DATA} if they differ"
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), _inspect, argv, stopped="stopped", quote_faults=False)


def _inspect(args: argparse.Namespace) -> ExitCode:
    for name, low in (("count", 1), ("columns", 1), ("tile", 32)):
        cli.at_least(f"--{name}", getattr(args, name), low)
    if args.sheet and Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet={args.sheet} has to end in .png")
    import numpy as np
    import pyarrow as pa

    from data_pipeline.format.shards import SliceSource
    from data_pipeline.stages import inspection

    folder = Path(args.folder)
    source = SliceSource(folder, args.split or "+".join(inspection.splits_of(folder)))
    if args.diff:
        other = SliceSource(args.diff, args.split or "+".join(inspection.splits_of(Path(args.diff))))
        differ = inspection.print_difference(folder, source.index, Path(args.diff), other.index)
        return ExitCode.DATA if differ else ExitCode.DONE
    index = source.index.append_column("number", pa.array(np.arange(len(source)), pa.int64()))
    if args.series:
        index = inspection.select_series(index, args.series)
    inspection.print_counts(folder, index)
    if args.series:
        inspection.print_series(index)
    if args.slice is not None:
        inspection.print_slice(source, index, args.slice)
    if args.sheet:
        inspection.write_sheet(source, index, args.sheet, args.count, args.columns, args.tile)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
