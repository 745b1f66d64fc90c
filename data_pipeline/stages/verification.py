"""Checks of a finished dataset: every checksum, record and slice, and that the tables agree. See data_pipeline.verify."""

import collections
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] - an extension module

from curia_common import progress
from curia_common.errors import DataError, UserError, fault_location
from data_pipeline import workers
from data_pipeline.format import codec, records, shards
from data_pipeline.format.files import Json
from data_pipeline.format.shards import ShardRow
from data_pipeline.sources import archives, object_stores
from data_pipeline.sources.base import Heartbeat
from data_pipeline.stages import assignment, commit, inventory, pseudonyms

DAMAGED_SHOWN = 3  # records per shard
UNPACK_BYTES = 100_000_000_000  # of compressed archives that a hold-out file names


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How many lines a hold-out file has, how many patients they name, and what of those is in the index."""

    lines: int
    patients: int
    patients_found: int
    slices_found: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a verification found; counts are of what could be read.

    Attributes:
      problems: one line each.
      unfinished: shards of an addition that is not finished.
      held_out: None unless a hold-out file was given.
    """

    folder: str
    shards: int = 0
    records: int = 0
    slices: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    held_out: HeldOut | None = None

    @property
    def sound(self) -> bool:
        return not self.problems

    def to_json(self) -> Json:
        value = dataclasses.asdict(self) | {"sound": self.sound}
        return {name: one for name, one in value.items() if one is not None}


def verify(folder: Path, *, workers_count: int = 1, holdout: str | None = None, key_file: str | None = None) -> Report:
    """Checks a dataset, and with a hold-out file that none of its patients is in it.

    Raises:
      UserError: there is no dataset in the folder, the hold-out file or the key cannot be read, or the key is not the one
        of the dataset.
    """
    if not (folder / shards.SHARDS).is_file():
        raise UserError(
            f"no dataset in {folder}: it has no {shards.SHARDS}; data_pipeline.build writes it when it has finished"
        )
    table, problems = check_tables(folder)
    report = Report(str(folder), problems=tuple(problems))
    if table is not None:
        report = _verify_shards(folder, table, problems, workers_count)
    if holdout is None:
        return report
    found = held_out(folder, holdout, key_file)
    inside = f"{found.slices_found:,} slices are of {found.patients_found:,} patients of {holdout}"
    problems = (*report.problems, inside) if found.slices_found else report.problems
    return dataclasses.replace(report, problems=problems, held_out=found)


def _verify_shards(folder: Path, table: Sequence[ShardRow], problems: Sequence[str], count: int) -> Report:
    names = {row.file for row in table}
    unfinished = pending(folder, names)
    strays = {path.name for path in folder.glob("[!.]*.array_record*")} - names - unfinished
    problems = [*problems, *(f"{name} is not in {shards.SHARDS}" for name in sorted(strays))]
    tasks = [(str(folder), row) for row in table]
    found: dict[int, ShardFindings] = {}
    done = 0
    with progress.Progress("verify", round(sum(row.bytes for row in table) / 1e6), "MB") as counter:
        # No time limit: a shard on a slow disk is not a broken one.
        for message in workers.run(verify_shard, tasks, workers=min(count, len(tasks)), timeout=math.inf):
            if isinstance(message, workers.Done):
                found[message.number] = message.result
                done += table[message.number].bytes
                counter.update(round(done / 1e6))
    shards_found = [found[number] for number in sorted(found)]
    return Report(
        str(folder), len(shards_found), sum(one.records for one in shards_found), sum(one.slices for one in shards_found),
        sum(one.bytes for one in shards_found), (*problems, *(line for one in shards_found for line in one.problems)),
        tuple(sorted(unfinished)),
    )  # fmt: skip


def held_out(folder: Path, path: str, key_file: str | None) -> HeldOut:
    """Looks for the patients of a hold-out file in the index of a dataset.

    Raises:
      UserError: the file or the key cannot be read, or the key is not the one of the dataset.
    """
    default = folder.resolve()
    default = default.with_name(f"{default.name}.key")
    if key_file is None and pseudonyms.KEY_VARIABLE not in os.environ and not default.exists():
        raise UserError(
            "--holdout needs the key of the dataset: patients are pseudonyms under it; name it with --key-file"
        )
    key = pseudonyms.load_key(key_file, str(folder)).secret
    plan = assignment.read(commit.folder_of(folder / commit.BUILD_FOLDER, 0))
    if plan is not None and plan.settings.key != pseudonyms.digest(key, "key", ""):
        raise UserError(f"the key is not the one that {folder} was built with, so nobody would be found with it")
    lines = inventory.read_holdout(path)
    patients, places = set(), set()
    for number, line in lines:
        # What looks like a place may be a patient ID with a slash.
        (places if inventory.is_place(line) else patients).add(pseudonyms.digest(key, "patient", line))
        if inventory.is_place(line):
            found = _patients_in(line, key)
            if not found:
                raise UserError(f"line {number} of {path} names a place in which no file has a patient")
            patients |= found
    index = pq.read_table(folder / shards.INDEX, columns=["patient"])["patient"].value_counts().to_pylist()
    patients |= places & {row["values"] for row in index}
    inside = {row["values"]: row["counts"] for row in index if row["values"] in patients}
    return HeldOut(len(lines), len(patients), len(inside), sum(inside.values()))


def _patients_in(place: str, key: bytes) -> set[str]:
    """Pseudonyms of the patients in a folder, an archive, or a part of one."""
    sources: list[inventory.Source] = []
    with tempfile.TemporaryDirectory() as unpacked:
        for found in inventory.find_files([place.partition("!/")[0]]):
            path = inventory.path_of(found)
            if archives.is_archive(path):
                listing = archives.list_members((path, unpacked, UNPACK_BYTES), {}, lambda item: None)
                sources += [
                    one for one in listing.members if inventory.lies_in(object_stores.absolute(one.path), place)
                ]
            else:
                sources.append(found)
        entries = inventory.inspect((sources, inventory.Options(key, unpacked=unpacked)), {}, lambda item: None)
    return {entry.patient for entry in entries if entry.patient}


# ---- the tables


class Tables(NamedTuple):
    """The rows of shards.parquet, None where they are unusable; and what is wrong with it and what has to agree with it."""

    rows: list[ShardRow] | None
    problems: list[str]


def check_tables(folder: Path) -> Tables:
    """Checks everything in a dataset folder but the shards themselves."""
    try:
        table = shards.read_shards(folder)
    except DataError as error:
        return Tables(None, [str(error)])
    rows = [ShardRow(**row) for row in table.select(list(ShardRow._fields)).to_pylist()]
    if not rows:
        return Tables(None, [f"{shards.SHARDS} names no shard"])
    problems = _shard_table_problems(rows)
    for name, check in (
        (shards.INDEX, _index_problems),
        ("TFDS's JSON", _tfds_problems),
        (shards.CARD, _card_problems),
    ):
        try:
            problems += check(folder, rows)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one, the others are checked too
            problems.append(f"{name} cannot be read ({fault_location(error)})")
    return Tables(rows, problems)


def _shard_table_problems(rows: Sequence[ShardRow]) -> list[str]:
    counts = collections.Counter(row.file for row in rows)
    problems = [f"{shards.SHARDS} names {name} {count} times" for name, count in counts.items() if count > 1]
    for row in rows:
        if row.split not in pseudonyms.SPLITS:
            problems.append(f"{shards.SHARDS}: {row.file} is of split {row.split!r}, which does not exist")
    return problems


def pending(folder: Path, known: Collection[str]) -> set[str]:
    """Shards in the folder that an unfinished addition has planned; only where its build folder exists."""
    found: set[str] = set()
    for own in folder.glob(f"{commit.BUILD_FOLDER}/addition-*"):
        if plan := assignment.read(own):
            name = plan.settings.conversion.name
            found |= {shards.file_name(name, place.split, place.number) for place in plan.shards}
    return {name for name in found if name not in known and (folder / name).exists()}


def _index_problems(folder: Path, table: Sequence[ShardRow]) -> list[str]:
    """Of the whole index: rows per shard, and patients in more than one split."""
    try:
        index = pq.read_table(folder / shards.INDEX, columns=["shard", "split", "patient"])
    except (pa.ArrowException, OSError) as error:
        return [f"{shards.INDEX} cannot be read ({type(error).__name__})"]
    problems = []
    groups = index.group_by(["shard", "split"]).aggregate([([], "count_all")]).to_pylist()
    found = {(row["shard"], row["split"]): row["count_all"] for row in groups}
    for row in table:
        rows = found.pop((row.file, row.split), 0)
        if rows != row.slices:
            problems.append(f"{shards.INDEX} has {rows:,} rows for {row.file}, {shards.SHARDS} {row.slices:,} slices")
    for (name, split), rows in sorted(found.items()):
        problems.append(
            f"{shards.INDEX} has {rows:,} rows for {name} in split {split}, which is not a shard of the dataset"
        )
    pairs = index.group_by(["patient", "split"]).aggregate([]).to_pylist()
    splits = collections.defaultdict(list)
    for row in pairs:
        splits[row["patient"]].append(row["split"])
    several = sorted(patient for patient, names in splits.items() if len(names) > 1)
    if several:
        names = " and ".join(sorted(splits[several[0]]))
        problems.append(f"{len(several):,} patients are in several splits, {several[0]} in {names}")
    return problems


def _tfds_problems(folder: Path, table: Sequence[ShardRow]) -> list[str]:
    # Imported here because it is slow and workers do not need it.
    import tensorflow_datasets as tfds

    from data_pipeline import features

    try:
        builder = tfds.builder_from_directory(folder)
        wanted = json.dumps(features.features().to_json(), sort_keys=True)
        described = builder.info.features
        if described is None or json.dumps(described.to_json(), sort_keys=True) != wanted:
            return ["features.json describes other records than this version writes and reads"]
        found = {
            name: [(Path(path).name, length) for path, length in zip(info.filepaths, info.shard_lengths, strict=True)]
            for name, info in builder.info.splits.items()
        }
    except Exception as error:  # noqa: BLE001 - TFDS raises many kinds on damaged metadata
        return [f"TFDS cannot read dataset_info.json and features.json ({type(error).__name__})"]
    problems = []
    for split in sorted({row.split for row in table} | set(found)):
        here = sorted((row.file, row.records) for row in table if row.split == split)
        if sorted(found.get(split, [])) != here:
            problems.append(
                f"dataset_info.json and {shards.SHARDS} differ in the shards or record counts of split {split}"
            )
    return problems


def _card_problems(folder: Path, table: Sequence[ShardRow]) -> list[str]:
    try:
        card = json.loads((folder / shards.CARD).read_text(encoding="utf-8"))
        listed = {shard["file"]: shard["sha256"] for shard in card["shards"]}
        counts = {name: card[name] for name in ("slices", "series", "patients", "bytes")}
        files = dict(card["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{shards.CARD} cannot be read ({type(error).__name__})"]
    problems = []
    if listed != {row.file: row.sha256 for row in table}:
        problems.append(f"{shards.CARD} and {shards.SHARDS} differ in the shards or their checksums")
    here = {"slices": sum(row.slices for row in table), "bytes": sum(row.bytes for row in table)}
    try:
        index = pq.read_table(folder / shards.INDEX, columns=["series", "patient"])
        here |= {"series": len(index["series"].unique()), "patients": len(index["patient"].unique())}
    except (pa.ArrowException, OSError):
        pass  # reported already
    for name, count in here.items():
        if counts[name] != count:
            problems.append(f"{shards.CARD} counts {counts[name]:,} {name}, the dataset has {count:,}")
    if (folder / shards.MANIFEST).exists():
        problems += _manifest_problems(folder, {row.file for row in table}, files)
    return problems


def _manifest_problems(folder: Path, names: set[str], files: Mapping[str, int]) -> list[str]:
    try:
        manifest = pq.read_table(folder / shards.MANIFEST, columns=["fate", "shard"])
    except (pa.ArrowException, OSError) as error:
        return [f"{shards.MANIFEST} cannot be read ({type(error).__name__})"]
    problems = []
    groups = manifest.group_by(["fate", "shard"]).aggregate([([], "count_all")]).to_pylist()
    fates: collections.Counter[str] = collections.Counter()
    for row in groups:
        fates[row["fate"]] += row["count_all"]
        if row["fate"] == "kept" and row["shard"] not in names:
            problems.append(
                f"{shards.MANIFEST} keeps {row['count_all']:,} files in {row['shard'] or 'no shard'}, which is not a shard of the dataset"
            )
    for fate in sorted(set(files) | set(fates)):
        if files.get(fate, 0) != fates[fate]:
            problems.append(
                f"{shards.CARD} counts {files.get(fate, 0):,} files {fate}, {shards.MANIFEST} {fates[fate]:,}"
            )
    return problems


# ---- one shard


class ShardFindings(NamedTuple):
    """Of one shard: problems, one line each, and how much could be read."""

    problems: list[str]
    records: int = 0
    slices: int = 0
    bytes: int = 0


class _Damaged(Exception):
    """A record is damaged; the text says how."""


def verify_shard(task: tuple[str, ShardRow], skip: Mapping[str, str], heartbeat: Heartbeat) -> ShardFindings:
    """Reads one shard whole; the work of one task of workers.run.

    Args:
      task: dataset folder, the shard's row of shards.parquet.
    """
    folder, row = task
    if row.file in skip:
        return ShardFindings([f"{row.file}: {skip[row.file]}"])
    heartbeat(row.file)
    try:
        found = _check_shard(Path(folder, row.file), row)
    except OSError as error:
        found = ShardFindings([f"{row.file} cannot be read ({error.strerror})"])
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one shard, the others are checked too
        found = ShardFindings([f"{row.file} cannot be read ({fault_location(error)})"])
    heartbeat(None)
    return found


def _check_shard(path: Path, row: ShardRow) -> ShardFindings:
    name = row.file
    if not path.is_file():
        return ShardFindings([f"{name} is missing"])
    problems = []
    size = path.stat().st_size
    if size != row.bytes:
        problems.append(f"{name} has {size:,} bytes, published with {row.bytes:,}")
    elif (digest := shards.sha256(path)) != row.sha256:
        problems.append(f"{name} has SHA-256 {digest[:16]}…, published with {row.sha256[:16]}…")
    reader: Any = None  # array_record has no types
    try:
        reader = array_record_module.ArrayRecordReader(str(path), "")
        count = reader.num_records() if reader.ok() else 0
    except Exception:  # noqa: BLE001 - array_record raises a RuntimeError for some kinds of damage
        count = 0
    if count != row.records:
        problems.append(f"{name} holds {count:,} readable records, published with {row.records:,}")
    checked: list[list[dict[str, Any]]] = []
    damaged = []
    for number in range(count):
        try:
            checked.append(_check_record(reader.read([number])[0], number))
        except _Damaged as error:
            damaged.append(f"{name}, record {number}: {error}")
        except Exception:  # noqa: BLE001 - the reader, protobuf and the codec each raise their own kinds
            damaged.append(f"{name}, record {number}: is damaged")
    problems += damaged[:DAMAGED_SHOWN]
    if len(damaged) > DAMAGED_SHOWN:
        problems.append(f"{name}: {len(damaged) - DAMAGED_SHOWN:,} more damaged records")
    counts = [len(rows) for rows in checked]
    rows = [one for rows in checked for one in rows]
    if not damaged and count == row.records:  # else what follows would only repeat it
        published = row.slice_counts if row.slice_counts is not None else [1] * row.records
        if counts != published or sum(counts) != row.slices:
            problems.append(f"{name} holds other numbers of slices in its records than {shards.SHARDS} says")
        largest = [max((one[side] for one in rows), default=0) for side in ("height", "width")]
        if largest != [row.largest_height, row.largest_width]:
            problems.append(
                f"{name}: its largest slice is {largest[0]}x{largest[1]} px, {shards.SHARDS} says {row.largest_height}x{row.largest_width}"
            )
        problems += _compare_with_index(path, rows)
    return ShardFindings(problems, len(checked), len(rows), size)


def _check_record(data: bytes, number: int) -> list[dict[str, Any]]:
    """What the index should have of each slice of a sound record."""
    header, slices, entries = records.parse(data)
    rows = []
    for slot, (encoded, entry) in enumerate(zip(slices, entries, strict=True)):
        pixels = codec.decode(encoded)
        mean = float(pixels.mean(dtype=np.float64)) * header.slope + header.intercept
        if abs(mean - entry.mean) > 1e-4 * max(1.0, entry.std, abs(mean)):
            raise _Damaged("its mean is not that of its pixels")
        rows.append({"record": number, "slot": slot, **records.index_row(header, entry, pixels.shape)})
    sizes = {(row["height"], row["width"]) for row in rows}
    if len(sizes) != 1:
        raise _Damaged(f"slices of {len(sizes)} sizes, a record has one")
    return rows


def _compare_with_index(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where index.parquet says something else of a shard than the shard's own records."""
    try:
        index = pq.read_table(path.parent / shards.INDEX, filters=[("shard", "=", path.name)])
        index = index.sort_by([("record", "ascending"), ("slot", "ascending")]).to_pylist()
    except (pa.ArrowException, OSError):
        return []  # reported with the whole index
    if len(index) != len(rows):
        return []  # reported with its counts
    problems = []
    for name in rows[0] if rows else ():
        if name not in index[0]:
            problems.append(f"{shards.INDEX} has no column {name}")
            continue
        # The index has double, a record single precision.
        single = np.float32 if isinstance(rows[0][name], float) else (lambda value: value)
        wrong = [a for a, b in zip(index, rows, strict=True) if single(a[name]) != single(b[name])]
        if wrong:
            problems.append(
                f"{shards.INDEX} has another {name} than {path.name} for {len(wrong):,} slices, the first in record {wrong[0]['record']}"
            )
    places = collections.Counter((row["series"], row["plane"], row["index"]) for row in rows)
    repeated = sum(count > 1 for count in places.values())
    if repeated:
        problems.append(f"{path.name} holds {repeated:,} slices of a series more than once")
    return problems
