"""What a dataset holds, printed; contact sheets; and how two datasets differ. See data_pipeline.inspect."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curia_common.errors import DataError, UserError
from data_pipeline.format import records, shards
from data_pipeline.stages import card, contact_sheet, inventory

COUNTED = ("split", "modality", "units", "plane", "body_part", "manufacturer")
SERIES_SHOWN = 20
KEY = ("series", "plane", "index")  # identifies a slice in all datasets that were built with one key
PLACE = ("shard", "record", "slot")  # where a slice is stored, which is not a property of it
FLAGS = {
    records.IRREGULAR: "irregular", records.LOSSY: "lossy", records.CLIPPED: "clipped", records.RESIZED: "resized",
    records.MODALITY_INFERRED: "modality inferred", records.REFORMATTED: "reformatted",
}  # fmt: skip


def splits_of(folder: Path) -> list[str]:
    """The splits that a dataset has.

    Raises:
      UserError: there is no dataset in the folder.
      DataError: its table of shards is damaged.
    """
    return sorted(set(shards.read_shards(folder)["split"].to_pylist()))


def select_series(index: pa.Table, wanted: Sequence[str]) -> pa.Table:
    """Rows of the series that `wanted` names, each by its pseudonym or a unique beginning of it."""
    names = sorted(set(index["series"].to_pylist()))
    chosen = []
    for text in wanted:
        found = [name for name in names if name.startswith(text)]
        if len(found) != 1:
            state = f"{len(found)} series begin with" if found else "no series begins with"
            example = f"; an existing one is {names[0]}" if not found and names else ""
            raise UserError(f"--series {text}: {state} it{example}")
        chosen += found
    return index.filter(pc.field("series").isin(chosen))


def print_counts(folder: Path, index: pa.Table) -> None:
    """Prints how many slices there are of which kind, and what speaks for their units."""
    series, patients = (len(index[name].unique()) for name in ("series", "patient"))
    used = len(index["shard"].unique())
    print(f"{folder}: {len(index):,} slices of {series:,} series of {patients:,} patients in {used:,} shards")
    for name in COUNTED:
        counts = sorted(collections.Counter(index[name].to_pylist()).items(), key=lambda item: (-item[1], item[0]))
        print(f"  {name:<13}" + ", ".join(f"{value or 'unknown'} {count:,}" for value, count in counts))
    print(f"  {'units from':<13}{_units_from(index)}")
    if unknown := _unknown_patients(index):
        print(f"  {'patients':<13}{unknown:,} unknown: each is a file, series or study that names no patient")
    flags = collections.Counter(text for value in index["flags"].to_pylist() for text in flag_names(value))
    print(f"  {'flags':<13}" + (", ".join(f"{text} {count:,}" for text, count in flags.most_common()) or "none"))
    sizes = collections.Counter(zip(index["height"].to_pylist(), index["width"].to_pylist(), strict=True))
    shown = ", ".join(f"{height}x{width} {count:,}" for (height, width), count in sizes.most_common(6))
    print(f"  {'px':<13}{shown}" + (f" and {len(sizes) - 6:,} more sizes" if len(sizes) > 6 else ""))
    labels = [name for name in index.column_names if name.startswith("label_")]
    if labels:
        print(f"  {'labels':<13}" + ", ".join(name.removeprefix("label_") for name in labels))


def _units_from(index: pa.Table) -> str:
    """How many series have their unit proved, declared or guessed; datasets of older versions do not say."""
    if "units_evidence" not in index.column_names:
        return f"declared {len(index['series'].unique()):,} series"
    rows = index.group_by(["series", "units_evidence"]).aggregate([]).to_pylist()
    counts = collections.Counter(row["units_evidence"] or card.DECLARED for row in rows)
    return ", ".join(f"{name} {counts[name]:,} series" for name in card.EVIDENCE if counts[name])


def _unknown_patients(index: pa.Table) -> int:
    if "patient_from" not in index.column_names:
        return 0
    return len(index.filter(pc.field("patient_from").isin(inventory.PATIENT_UNKNOWN))["patient"].unique())


def flag_names(flags: int) -> list[str]:
    """The bits of `flags` in words."""
    return [text for bit, text in FLAGS.items() if flags & bit]


def print_series(index: pa.Table) -> None:
    """Prints a line for each series and plane."""
    groups: dict[tuple[str, str], list[dict]] = collections.defaultdict(list)
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


def print_slice(source: shards.SliceSource, index: pa.Table, number: int) -> None:
    """Prints every field of the record of row `number`."""
    if not 0 <= number < len(index):
        raise UserError(f"--slice={number}: the selection has slices 0 to {len(index) - 1}")
    row = index.slice(number, 1).to_pylist()[0]
    slot = row["slot"]
    try:
        record = records.parse(source.read(row["number"])[0])
        entry = record.entries[slot]
    except Exception as error:  # protobuf raises its own kinds
        raise DataError(f"{source.place(row['number'])} is damaged; {shards.REMEDY}") from error
    print(f"slice {number}: {row['shard']}, record {row['record']}, slot {slot} of {len(record.slices)}")
    fields: dict = vars(record.header) | entry._asdict()
    flags = entry.flags
    fields["flags"] = f"{flags} ({', '.join(flag_names(flags)) or 'none'})"
    fields["slices"] = f"{len(record.slices[slot]):,} bytes for {row['height']}x{row['width']} px of 16 bit"
    fields |= {name: row[name] for name in index.column_names if name.startswith("label_")}
    for name, value in fields.items():
        if isinstance(value, list | tuple):
            value = ", ".join(f"{v:.6g}" for v in value)
        print(f"  {name:<20}{f'{value:.6g}' if isinstance(value, float) else value}")


def write_sheet(source: shards.SliceSource, index: pa.Table, file: str, count: int, columns: int, side: int) -> None:
    """Writes a contact sheet of `count` slices, spread evenly over the rows of the index; `side` is that of a tile, px."""
    numbers = np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int))
    tiles = []
    for row in index.take(numbers).to_pylist():
        one = source[row["number"]]
        view = contact_sheet.view_of(one)
        what = " ".join(text for text in (row["modality"], row["plane"], row["body_part"]) if text)
        caption = (what, view.text, f"{row['series'][:8]} slice {row['index']}")
        tiles.append((contact_sheet.tile(one, view, side), caption))
    contact_sheet.sheet(tiles, columns).save(file)
    print(f"{len(tiles)} slices on {file}")


# ---- two datasets


class Difference(NamedTuple):
    """How two datasets differ, in slices; `series` counts the series of the slices that one of them alone has.

    Attributes:
      columns: slices that differ in a column.
      new_columns: columns that one of them alone has.
    """

    same: int
    differ: int
    only_ours: int
    only_ours_series: int
    only_theirs: int
    only_theirs_series: int
    columns: dict[str, int]
    new_columns: list[str]


def print_difference(folder: Path, ours: pa.Table, other: Path, theirs: pa.Table) -> bool:
    """Prints how the indices of two datasets differ; returns whether they do."""
    found = difference(ours, theirs)
    print(f"{found.same:,} slices are the same in both")
    for count, series, where in (
        (found.only_ours, found.only_ours_series, folder), (found.only_theirs, found.only_theirs_series, other),
    ):  # fmt: skip
        if count:
            print(f"{count:,} slices only in {where}, of {series:,} series")
    if found.differ:
        columns = ", ".join(f"{name} {count:,}" for name, count in found.columns.items())
        print(f"{found.differ:,} slices differ; in how many each column: {columns}")
    for name in found.new_columns:
        print(f"column {name} is in one of them only")
    if not found.same + found.differ and len(ours) and len(theirs):
        pixels = int(np.isin(ours["source"].to_pylist(), theirs["source"].to_pylist()).sum())
        print(
            f"no series in common: pseudonyms differ where the keys do; by their source pixels {pixels:,} slices are in both"
        )
    return not found.same == len(ours) == len(theirs) or bool(found.new_columns)


def difference(ours: pa.Table, theirs: pa.Table) -> Difference:
    """Compares two indices by the slices of the same series and number; their place in the shards does not count."""
    ours, theirs = ours.drop_columns(list(PLACE)), theirs.drop_columns(list(PLACE))
    shared = [name for name in ours.column_names if name in theirs.column_names and name not in KEY]
    both = ours.join(theirs, list(KEY), join_type="inner", right_suffix=" of theirs")
    columns = {}
    differs = np.zeros(len(both), bool)
    for name in shared:
        a, b = both[name], both[f"{name} of theirs"]
        if a.type != b.type:
            a, b = a.cast(pa.string()), b.cast(pa.string())
        unequal = pc.fill_null(pc.call_function("not_equal", [a, b]), False).to_numpy() | (
            a.is_null().to_numpy() != b.is_null().to_numpy()
        )
        if unequal.any():
            columns[name] = int(unequal.sum())
            differs |= unequal

    def alone(a: pa.Table, b: pa.Table) -> tuple[int, int]:
        rest = a.select(list(KEY)).join(b.select(list(KEY)), list(KEY), join_type="left anti")
        return len(rest), len(rest["series"].unique())

    (our_slices, our_series), (their_slices, their_series) = alone(ours, theirs), alone(theirs, ours)
    return Difference(
        int((~differs).sum()), int(differs.sum()), our_slices, our_series, their_slices, their_series, columns,
        sorted(set(ours.column_names) ^ set(theirs.column_names))
    )  # fmt: skip
