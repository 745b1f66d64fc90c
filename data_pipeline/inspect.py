"""Shows what is in a dataset: counts, series, the fields of a record, a contact sheet, and what differs from another one.

Series and patients are pseudonyms here too; the beginning of one is enough, as long as it is the only one that begins so.

exit codes: 0 done, or no difference; 1 the two datasets of --diff differ; 2 wrong usage, no dataset, or a damaged one
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curia_common.errors import UserError
from data_pipeline.format import records, shards
from data_pipeline.stages import contact_sheet

COUNTED = ("split", "modality", "units", "plane", "body_part", "manufacturer")
SERIES_SHOWN = 20
KEY = ("series", "plane", "index")  # what a slice is called in every dataset of one key
PLACE = ("shard", "record", "slot")  # where it lies, which is no property of it
FLAGS = {
    records.IRREGULAR: "irregular", records.LOSSY: "lossy", records.CLIPPED: "clipped", records.RESIZED: "resized",
    records.MODALITY_INFERRED: "modality inferred", records.REFORMATTED: "reformatted",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m data_pipeline.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m data_pipeline.inspect shards/
  python -m data_pipeline.inspect shards/ --sheet=sheet.png --count=48
  python -m data_pipeline.inspect shards/ --series 3f2a 91c0 --sheet=sheet.png
  python -m data_pipeline.inspect shards/ --split=test --slice=17
  python -m data_pipeline.inspect shards/ --diff=yesterday/""",
    )  # fmt: skip
    p.add_argument("folder", metavar="SHARDS", help="dataset folder that data_pipeline.build wrote")
    p.add_argument("--series", nargs="+", metavar="ID", help="only these series (pseudonyms, or how they begin)")
    p.add_argument("--split", help="only this split: train, validation or test; several with a plus (default: all)")
    p.add_argument(
        "--slice", type=int, metavar="N", help="print all fields of the record of slice N of what was selected"
    )
    p.add_argument("--sheet", metavar="FILE", help="write a contact sheet of what was selected (PNG)")
    p.add_argument("--count", type=int, default=24, metavar="N", help="slices on the sheet (default: %(default)s)")
    p.add_argument("--columns", type=int, default=6, metavar="N", help="tiles in a row (default: %(default)s)")
    p.add_argument("--tile", type=int, default=192, metavar="PX", help="side of a tile (default: %(default)s)")
    p.add_argument("--diff", metavar="OTHER", help="compare with another dataset folder, slice by slice")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return inspect(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
    return 2


def inspect(args: argparse.Namespace) -> int:
    """Prints what was asked for; returns the exit code."""
    for name, low in (("count", 1), ("columns", 1), ("tile", 32)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} is {getattr(args, name)}; it has to be at least {low}")
    if args.sheet and Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet={args.sheet} has to end in .png")
    folder = Path(args.folder)
    source = shards.SliceSource(folder, args.split or "+".join(_splits(folder)))
    if args.diff:
        other = shards.SliceSource(args.diff, args.split or "+".join(_splits(Path(args.diff))))
        return _print_diff(folder, source.index, Path(args.diff), other.index)
    index = source.index.append_column("number", pa.array(np.arange(len(source)), pa.int64()))
    if args.series:
        index = _select(index, args.series)
    _print_counts(folder, index)
    if args.series:
        _print_series(index)
    if args.slice is not None:
        _print_slice(source, index, args.slice)
    if args.sheet:
        _write_sheet(source, index, args)
    return 0


def _splits(folder: Path) -> list[str]:
    path = folder / shards.SHARDS
    if not path.is_file():
        raise UserError(f"no dataset in {folder}: it has no {shards.SHARDS}; data_pipeline.build writes one")
    try:
        found = set(pq.read_table(path, columns=["split"])["split"].to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged; build the dataset again or copy it again") from error
    return sorted(found)


def _select(index: pa.Table, wanted: Sequence[str]) -> pa.Table:
    names = sorted(set(index["series"].to_pylist()))
    chosen = []
    for text in wanted:
        found = [name for name in names if name.startswith(text)]
        if len(found) != 1:
            state = f"{len(found)} series begin with" if found else "no series begins with"
            example = f"; {names[0]} is one that does exist" if not found and names else ""
            raise UserError(f"--series {text}: {state} it{example}")
        chosen += found
    return index.filter(pc.field("series").isin(chosen))


def _print_counts(folder: Path, index: pa.Table) -> None:
    series, patients = (len(index[name].unique()) for name in ("series", "patient"))
    used = len(index["shard"].unique())
    print(f"{folder}: {len(index):,} slices of {series:,} series of {patients:,} patients in {used:,} shards")
    for name in COUNTED:
        counts = sorted(collections.Counter(index[name].to_pylist()).items(), key=lambda item: (-item[1], item[0]))
        print(f"  {name:<13}" + ", ".join(f"{value or 'unknown'} {count:,}" for value, count in counts))
    flags = collections.Counter(text for value in index["flags"].to_pylist() for text in flag_names(value))
    print(f"  {'flags':<13}" + (", ".join(f"{text} {count:,}" for text, count in flags.most_common()) or "none"))
    sizes = collections.Counter(zip(index["height"].to_pylist(), index["width"].to_pylist(), strict=True))
    shown = ", ".join(f"{height}x{width} {count:,}" for (height, width), count in sizes.most_common(6))
    print(f"  {'px':<13}{shown}" + (f" and {len(sizes) - 6:,} more sizes" if len(sizes) > 6 else ""))
    labels = [name for name in index.column_names if name.startswith("label_")]
    if labels:
        print(f"  {'labels':<13}" + ", ".join(name.removeprefix("label_") for name in labels))


def flag_names(flags: int) -> list[str]:
    """The bits of `flags` in words."""
    return [text for bit, text in FLAGS.items() if flags & bit]


def _print_series(index: pa.Table) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for row in index.to_pylist():
        groups[row["series"], row["plane"]].append(row)
    print(
        "series            patient           split       mod plane    slices  px         mm (row, column, slice)    flags"
    )
    for (series, plane), rows in list(groups.items())[:SERIES_SHOWN]:
        one = rows[0]
        spacing = ", ".join(f"{one[f'spacing_{axis}']:.3g}" for axis in ("rows", "columns", "slices"))
        flags = sorted({text for row in rows for text in flag_names(row["flags"])})
        print(
            f"{series:<17} {one['patient']:<17} {one['split']:<11} {one['modality']:<3} {plane:<8} {len(rows):>6}  "
            f"{one['height']}x{one['width']:<6} {spacing:<26} {', '.join(flags)}".rstrip()
        )
    if len(groups) > SERIES_SHOWN:
        print(f"and {len(groups) - SERIES_SHOWN:,} more series")


def _print_slice(source: shards.SliceSource, index: pa.Table, number: int) -> None:
    if not 0 <= number < len(index):
        raise UserError(f"--slice={number}: what was selected has slices 0 to {len(index) - 1}")
    row = index.slice(number, 1).to_pylist()[0]
    record = records.parse(source.read(row["number"])[0])
    slot = row["slot"]
    print(f"slice {number}: {row['shard']}, record {row['record']}, slot {slot} of {len(record['slices'])}")
    fields: dict[str, Any] = {name: record[name] for name in (*records.TEXT, *records.NUMBERS, *records.VECTORS)}
    names = (*records.SLICE_NUMBERS, *records.SLICE_INTEGERS, records.SLICE_BOX, *records.SLICE_TEXT)
    fields |= {name: record[name][slot] for name in names}
    fields["flags"] = f"{fields['flags']} ({', '.join(flag_names(fields['flags'])) or 'none'})"
    fields["slices"] = f"{len(record['slices'][slot]):,} bytes for {row['height']}x{row['width']} px of 16 bit"
    fields |= {name: row[name] for name in index.column_names if name.startswith("label_")}
    for name, value in fields.items():
        if isinstance(value, list | tuple):
            value = ", ".join(f"{v:.6g}" for v in value)
        print(f"  {name:<20}{f'{value:.6g}' if isinstance(value, float) else value}")


def _write_sheet(source: shards.SliceSource, index: pa.Table, args: argparse.Namespace) -> None:
    # Evenly over what was selected: within a series from end to end, else from series to series.
    numbers = np.unique(np.linspace(0, len(index) - 1, min(args.count, len(index))).round().astype(int))
    tiles = []
    for row in index.take(numbers).to_pylist():
        one = source[row["number"]]
        view = contact_sheet.view_of(one)
        what = " ".join(text for text in (row["modality"], row["plane"], row["body_part"]) if text)
        caption = (what, view.text, f"{row['series'][:8]} slice {row['index']}")
        tiles.append((contact_sheet.tile(one, view, args.tile), caption))
    contact_sheet.sheet(tiles, args.columns).save(args.sheet)
    print(f"{len(tiles)} slices on {args.sheet}")


# ---- two datasets


def _print_diff(folder: Path, ours: pa.Table, other: Path, theirs: pa.Table) -> int:
    counts = difference(ours, theirs)
    print(f"{counts['same']:,} slices are the same in both")
    for name, where in (("only_ours", folder), ("only_theirs", other)):
        if counts[name]:
            print(f"{counts[name]:,} slices only in {where}, of {counts[f'{name}_series']:,} series")
    if counts["differ"]:
        columns = ", ".join(f"{name} {count:,}" for name, count in counts["columns"].items())
        print(f"{counts['differ']:,} slices differ; in how many each column: {columns}")
    for name in counts["new_columns"]:
        print(f"column {name} is in one of them only")
    if not counts["same"] + counts["differ"] and len(ours) and len(theirs):
        pixels = pc.sum(pc.is_in(ours["source"], pc.unique(theirs["source"]))).as_py()
        print(
            f"no series in common: pseudonyms differ where the keys do; by their source pixels {pixels:,} slices are in both"
        )
    return 0 if counts["same"] == len(ours) == len(theirs) and not counts["new_columns"] else 1


def difference(ours: pa.Table, theirs: pa.Table) -> dict[str, Any]:
    """What two indices say of the slices of the same series and number; where they lie in the shards does not count.

    Returns:
      {"same", "differ", "only_ours", "only_theirs", "only_ours_series", "only_theirs_series": counts; "columns": {name: slices
      that differ in it}; "new_columns": names that one of them has}.
    """
    ours, theirs = ours.drop_columns(list(PLACE)), theirs.drop_columns(list(PLACE))
    shared = [name for name in ours.column_names if name in theirs.column_names and name not in KEY]
    both = ours.join(theirs, list(KEY), join_type="inner", right_suffix=" of theirs")
    columns = {}
    differs = np.zeros(len(both), bool)
    for name in shared:
        a, b = both[name], both[f"{name} of theirs"]
        if a.type != b.type:
            a, b = a.cast(pa.string()), b.cast(pa.string())
        unequal = pc.fill_null(pc.not_equal(a, b), False).to_numpy() | (
            pc.is_null(a).to_numpy() != pc.is_null(b).to_numpy()
        )
        if unequal.any():
            columns[name] = int(unequal.sum())
            differs |= unequal
    result: dict[str, Any] = {"same": int((~differs).sum()), "differ": int(differs.sum()), "columns": columns}
    for name, a, b in (("only_ours", ours, theirs), ("only_theirs", theirs, ours)):
        alone = a.select(list(KEY)).join(b.select(list(KEY)), list(KEY), join_type="left anti")
        result |= {name: len(alone), f"{name}_series": len(alone["series"].unique())}
    result["new_columns"] = sorted(set(ours.column_names) ^ set(theirs.column_names))
    return result


if __name__ == "__main__":
    sys.exit(main())
