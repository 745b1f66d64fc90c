"""Checks a finished dataset: every checksum, every record and slice, and that the tables tell of the same slices.

what is checked:
  shards      size and SHA-256 as published; every record is read, every slice decoded and its mean compared
  index       one row per slice, with the values that the record holds; no patient in two splits
  TFDS        dataset_info.json and features.json describe these shards
  card        card.json counts what is there; so does manifest.parquet, if it was not left out

  hold-out    with --holdout and the key: none of its patients is in the index

Each problem is one line on standard output. Nothing is changed or repaired: copy or build damaged shards again.

exit codes: 0 sound, 1 damaged, 2 wrong usage or no dataset, 75 stopped by Ctrl-C
"""

import argparse
import collections
import json
import math
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from curia_common import progress
from curia_common.errors import UserError, fault_location
from data_pipeline import workers
from data_pipeline.format import codec, records, shards
from data_pipeline.sources import archives
from data_pipeline.sources import object_stores as objects
from data_pipeline.sources.base import Heartbeat
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import commit, inventory, pseudonyms

EXIT_STOPPED = 75
DAMAGED_SHOWN = 3  # records per shard
UNPACK_BYTES = 100_000_000_000  # of compressed archives that a hold-out file names
UNFINISHED = "an addition is not finished: its shards do not count yet; start its build again"
HELD_OUT = "held out: {lines:,} lines of {file} stand for {patients:,} patients; slices of theirs in the index: {slices_found:,}"
COLUMNS = ("file", "split", "records", "slices", "bytes", "sha256", "largest_height", "largest_width", "slice_counts")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m data_pipeline.verify shards/ --json=verified.json
  python -m data_pipeline.verify shards/ --holdout=test_patients.txt --key-file ~/curia.key""",
    )  # fmt: skip
    p.add_argument("folder", metavar="SHARDS", help="dataset folder that data_pipeline.build wrote")
    p.add_argument("--json", metavar="FILE", help="write counts and problems here too")
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    p.add_argument(
        "--holdout",
        metavar="FILE",
        help="prove that nobody is in the dataset of whom this file of data_pipeline.build has the id, or a folder of DICOM files",
    )
    p.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"secret of the pseudonyms, for --holdout; else the variable {pseudonyms.KEY_VARIABLE}, else SHARDS.key",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.workers < 1:
            raise UserError(f"--workers is {args.workers}; it has to be at least 1")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise UserError(f"--json: no folder {Path(args.json).parent}; make it first")
        if args.key_file and not args.holdout:
            raise UserError("--key-file is for --holdout=FILE; name that too")
        report = verify(Path(args.folder), workers_count=args.workers)
        if args.holdout:
            report["held_out"] = held_out(Path(args.folder), args.holdout, args.key_file)
            if report["held_out"]["slices_found"]:
                report["sound"] = False
                report["problems"].append(
                    f"{report['held_out']['slices_found']:,} slices are of {report['held_out']['patients_found']:,} patients of {args.holdout}"
                )
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return EXIT_STOPPED
    for problem in report["problems"]:
        print(problem)
    if "held_out" in report:
        print(HELD_OUT.format(**report["held_out"], file=args.holdout), file=sys.stderr)
    if report["unfinished"]:
        print(UNFINISHED, file=sys.stderr)
    counts = f"{report['slices']:,} slices in {report['records']:,} records of {report['shards']:,} shards, {report['bytes'] / 1e6:,.1f} MB"
    if report["problems"]:
        print(f"damaged: {len(report['problems']):,} problems; {counts} could be read", file=sys.stderr)
        return 1
    print(f"sound: {counts}", file=sys.stderr)
    return 0


def verify(folder: Path, *, workers_count: int = 1) -> dict[str, Any]:
    """Checks a dataset.

    Returns:
      {"folder", "sound", "shards", "records", "slices", "bytes", "problems": one line each, "unfinished": shards of an
      addition that is not finished}; counts are of what was read.

    Raises:
      UserError: there is no dataset in the folder.
    """
    if not (folder / shards.SHARDS).is_file():
        raise UserError(
            f"no dataset in {folder}: it has no {shards.SHARDS}; data_pipeline.build writes it when it has finished"
        )
    report: dict[str, Any] = {"folder": str(folder), "sound": False, "shards": 0, "records": 0, "slices": 0, "bytes": 0}
    report["unfinished"] = []
    problems: list[str] = []
    report["problems"] = problems
    table = _shard_table(folder, problems)
    if table is None:
        return report
    report["unfinished"] = sorted(pending(folder, {row["file"] for row in table}))
    problems += _index_problems(folder, table) + _tfds_problems(folder, table)
    problems += _card_problems(folder, table) + _stray_problems(folder, table)
    tasks = [(str(folder), row) for row in table]
    total = round(sum(row["bytes"] for row in table) / 1e6)
    found: dict[int, dict[str, Any]] = {}
    done = 0
    with progress.Progress("verify", total, "MB") as counter:
        # No time limit: a shard on a slow disk is not a broken one.
        run = workers.run(verify_shard, tasks, workers=min(workers_count, len(tasks)), timeout=math.inf)
        for message in run:
            if isinstance(message, workers.Done):
                found[message.number] = message.result
                before, done = done, done + table[message.number]["bytes"]
                counter.step(round(done / 1e6) - round(before / 1e6))
    for number in sorted(found):
        result = found[number]
        problems += result["problems"]
        report["shards"] += 1
        for name in ("records", "slices", "bytes"):
            report[name] += result[name]
    report["sound"] = not problems
    return report


def held_out(folder: Path, path: str, key_file: str | None) -> dict[str, int]:
    """Looks for the patients of a hold-out file in the index.

    Returns:
      {"lines", "patients", "patients_found", "slices_found"}.

    Raises:
      UserError: the file or the key cannot be read, or the key is not the one of the dataset.
    """
    default = Path(folder).resolve()
    if (
        key_file is None
        and pseudonyms.KEY_VARIABLE not in os.environ
        and not default.with_name(f"{default.name}.key").exists()
    ):
        raise UserError(
            "--holdout needs the key of the dataset: patients are pseudonyms under it; name it with --key-file"
        )
    key, _ = pseudonyms.load_key(key_file, str(folder))
    made = plan.read(commit.folder_of(folder / commit.BUILD_FOLDER, 0))
    if made is not None:
        named = made["settings"]["key"]
        if named != pseudonyms.digest(key, "key", ""):
            raise UserError(f"the key is not the one that {folder} was built with, and would find nobody")
    lines = inventory.read_holdout(path)
    patients = {pseudonyms.digest(key, "patient", line) for _, line in lines}
    for number, line in lines:
        if inventory.is_place(line):
            found = _patients_in(line, key)
            if not found:
                raise UserError(f"line {number} of {path} names a place in which no file says whose it is")
            patients |= found
    index = pq.read_table(folder / shards.INDEX, columns=["patient"])["patient"].value_counts().to_pylist()
    inside = {row["values"]: row["counts"] for row in index if row["values"] in patients}
    return {
        "lines": len(lines), "patients": len(patients), "patients_found": len(inside), "slices_found": sum(inside.values()),
    }  # fmt: skip


def _patients_in(place: str, key: bytes) -> set[str]:
    """Pseudonyms of those of whom there is something in a folder, an archive, or a part of one."""
    sources: list[str | objects.Object | archives.Member] = []
    with tempfile.TemporaryDirectory() as unpacked:
        for found in inventory.find_files([place.partition("!/")[0]]):
            path = inventory.path_of(found)
            if archives.is_archive(path):
                listing = archives.list_members((path, unpacked, UNPACK_BYTES), {}, lambda item: None)
                sources += [one for one in listing.members if inventory.lies_in(objects.absolute(one.path), place)]
            else:
                sources.append(found if isinstance(found, objects.Object) else path)
        entries = inventory.inspect((sources, inventory.Options(key, unpacked=unpacked)), {}, lambda item: None)
    return {entry.patient for entry in entries if entry.patient}


def _shard_table(folder: Path, problems: list[str]) -> list[dict[str, Any]] | None:
    try:
        table = pq.read_table(folder / shards.SHARDS)
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{shards.SHARDS} cannot be read ({type(error).__name__})")
        return None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        problems.append(f"{shards.SHARDS} has no column {', '.join(missing)}")
        return None
    rows = table.to_pylist()
    if not rows:
        problems.append(f"{shards.SHARDS} names no shard")
        return None
    for name, count in collections.Counter(row["file"] for row in rows).items():
        if count > 1:
            problems.append(f"{shards.SHARDS} names {name} {count} times")
        if Path(name).name != name:
            problems.append(f"{shards.SHARDS} names {name!r}, which is no file of this folder")
            return None
    for row in rows:
        if row["split"] not in pseudonyms.SPLITS:
            problems.append(f"{shards.SHARDS}: {row['file']} is of split {row['split']!r}, which does not exist")
    return rows


def _stray_problems(folder: Path, table: Sequence[Mapping[str, Any]]) -> list[str]:
    known = {row["file"] for row in table}
    known |= pending(folder, known)
    strays = sorted(path.name for path in folder.glob("[!.]*.array_record*") if path.name not in known)
    return [f"{name} is not in {shards.SHARDS}" for name in strays]


def pending(folder: Path, known: Collection[str]) -> set[str]:
    """Shards in the folder that an unfinished addition has planned; only the site that adds can tell."""
    found: set[str] = set()
    for own in folder.glob(f"{commit.BUILD_FOLDER}/addition-*"):
        made = plan.read(own) or {"shards": []}
        names = {shards.file_name(made["conversion"]["name"], s["split"], s["number"]) for s in made["shards"]}
        found |= {name for name in names if name not in known and (folder / name).exists()}
    return found


def _index_problems(folder: Path, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the whole index shows: rows per shard, and patients in one split each."""
    try:
        index = pq.read_table(folder / shards.INDEX, columns=["shard", "split", "patient"])
    except (pa.ArrowException, OSError) as error:
        return [f"{shards.INDEX} cannot be read ({type(error).__name__})"]
    problems = []
    groups = index.group_by(["shard", "split"]).aggregate([([], "count_all")]).to_pylist()
    found = {(row["shard"], row["split"]): row["count_all"] for row in groups}
    for row in table:
        rows = found.pop((row["file"], row["split"]), 0)
        if rows != row["slices"]:
            problems.append(
                f"{shards.INDEX} has {rows:,} rows for {row['file']}, {shards.SHARDS} {row['slices']:,} slices"
            )
    for (name, split), rows in sorted(found.items()):
        problems.append(
            f"{shards.INDEX} has {rows:,} rows for {name} in split {split}, which is no shard of the dataset"
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


def _tfds_problems(folder: Path, table: Sequence[Mapping[str, Any]]) -> list[str]:
    # Imported here: the workers do not need it.
    import tensorflow_datasets as tfds

    from data_pipeline import features

    try:
        builder = tfds.builder_from_directory(folder)
        wanted = json.dumps(features.features().to_json(), sort_keys=True)
        if json.dumps(builder.info.features.to_json(), sort_keys=True) != wanted:
            return ["features.json describes other records than this version writes and reads"]
        found = {
            name: [(Path(path).name, length) for path, length in zip(info.filepaths, info.shard_lengths, strict=True)]
            for name, info in builder.info.splits.items()
        }
    except Exception as error:  # noqa: BLE001 - TFDS raises many kinds on damaged metadata
        return [f"TFDS cannot read dataset_info.json and features.json ({type(error).__name__})"]
    problems = []
    for split in sorted({row["split"] for row in table} | set(found)):
        here = sorted((row["file"], row["records"]) for row in table if row["split"] == split)
        if sorted(found.get(split, [])) != here:
            problems.append(
                f"dataset_info.json and {shards.SHARDS} differ in the shards or record counts of split {split}"
            )
    return problems


def _card_problems(folder: Path, table: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        card = json.loads((folder / shards.CARD).read_text(encoding="utf-8"))
        listed = {shard["file"]: shard["sha256"] for shard in card["shards"]}
        counts = {name: card[name] for name in ("slices", "series", "patients", "bytes")}
        files = dict(card["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{shards.CARD} cannot be read ({type(error).__name__})"]
    problems = []
    if listed != {row["file"]: row["sha256"] for row in table}:
        problems.append(f"{shards.CARD} and {shards.SHARDS} differ in the shards or their checksums")
    here = {"slices": sum(row["slices"] for row in table), "bytes": sum(row["bytes"] for row in table)}
    try:
        index = pq.read_table(folder / shards.INDEX, columns=["series", "patient"])
        here |= {"series": len(index["series"].unique()), "patients": len(index["patient"].unique())}
    except (pa.ArrowException, OSError):
        pass  # said already
    for name, count in here.items():
        if counts[name] != count:
            problems.append(f"{shards.CARD} counts {counts[name]:,} {name}, the dataset has {count:,}")
    if (folder / shards.MANIFEST).exists():
        problems += _manifest_problems(folder, {row["file"] for row in table}, files)
    return problems


def _manifest_problems(folder: Path, names: set[str], files: Mapping[str, int]) -> list[str]:
    try:
        manifest = pq.read_table(folder / shards.MANIFEST, columns=["fate", "shard"])
    except (pa.ArrowException, OSError) as error:
        return [f"{shards.MANIFEST} cannot be read ({type(error).__name__})"]
    problems = []
    groups = manifest.group_by(["fate", "shard"]).aggregate([([], "count_all")]).to_pylist()
    fates = collections.Counter()
    for row in groups:
        fates[row["fate"]] += row["count_all"]
        if row["fate"] == "kept" and row["shard"] not in names:
            problems.append(
                f"{shards.MANIFEST} keeps {row['count_all']:,} files in {row['shard'] or 'no shard'}, which is no shard of the dataset"
            )
    for fate in sorted(set(files) | set(fates)):
        if files.get(fate, 0) != fates[fate]:
            problems.append(
                f"{shards.CARD} counts {files.get(fate, 0):,} files {fate}, {shards.MANIFEST} {fates[fate]:,}"
            )
    return problems


# ---- one shard


def verify_shard(task: tuple[str, dict[str, Any]], skip: Mapping[str, str], touch: Heartbeat) -> dict[str, Any]:
    """Reads one shard whole; the work of one task of workers.run.

    Args:
      task: dataset folder, the shard's row of shards.parquet.

    Returns:
      {"problems", "records", "slices", "bytes"}: lines, and what could be read.
    """
    folder, row = task
    path = Path(folder, row["file"])
    report: dict[str, Any] = {"problems": [], "records": 0, "slices": 0, "bytes": 0}
    if row["file"] in skip:
        report["problems"].append(f"{row['file']}: {skip[row['file']]}")
        return report
    touch(row["file"])
    try:
        _check_shard(path, row, report)
    except OSError as error:
        report["problems"].append(f"{row['file']} cannot be read ({error.strerror})")
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one shard, the others are looked at too
        report["problems"].append(f"{row['file']} cannot be read ({fault_location(error)})")
    touch(None)
    return report


def _check_shard(path: Path, row: Mapping[str, Any], report: dict[str, Any]) -> None:
    problems, name = report["problems"], row["file"]
    if not path.is_file():
        problems.append(f"{name} is missing")
        return
    size = path.stat().st_size
    report["bytes"] = size
    if size != row["bytes"]:
        problems.append(f"{name} has {size:,} bytes, published with {row['bytes']:,}")
    elif (digest := shards.sha256(path)) != row["sha256"]:
        problems.append(f"{name} has SHA-256 {digest[:16]}…, published with {row['sha256'][:16]}…")
    try:
        reader = array_record_module.ArrayRecordReader(str(path), "")
        count = reader.num_records() if reader.ok() else 0
    except Exception:  # noqa: BLE001 - array_record raises a RuntimeError for some kinds of damage
        count = 0
    if count != row["records"]:
        problems.append(f"{name} holds {count:,} readable records, published with {row['records']:,}")
    counts, largest, damaged, rows = [], [0, 0], [], []
    for number in range(count):
        try:
            record = records.parse(reader.read([number])[0])
            pixels = [codec.decode(data) for data in record["slices"]]
            for slot, one in enumerate(pixels):
                mean = float(one.mean(dtype=np.float64)) * record["slope"] + record["intercept"]
                if abs(mean - record["mean"][slot]) > 1e-4 * max(1.0, record["std"][slot], abs(mean)):
                    raise ValueError("its mean is not that of its pixels")
        except Exception as error:  # noqa: BLE001 - the reader, protobuf and the codec each raise their own kinds
            text = str(error) if isinstance(error, ValueError) and str(error).startswith("its mean") else "is damaged"
            damaged.append(f"{name}, record {number}: {text}")
            continue
        shapes = {one.shape for one in pixels}
        if len(shapes) != 1:
            damaged.append(f"{name}, record {number}: slices of {len(shapes)} sizes, a record has one")
            continue
        shape = shapes.pop()
        largest = [max(a, b) for a, b in zip(largest, shape, strict=True)]
        counts.append(len(pixels))
        report["records"] += 1
        report["slices"] += len(pixels)
        rows += [_row(record, shape, number, slot) for slot in range(len(pixels))]
    problems += damaged[:DAMAGED_SHOWN]
    if len(damaged) > DAMAGED_SHOWN:
        problems.append(f"{name}: {len(damaged) - DAMAGED_SHOWN:,} more damaged records")
    if damaged or count != row["records"]:
        return  # what follows would only say it again
    published = row["slice_counts"] if row["slice_counts"] is not None else [1] * row["records"]
    if counts != published or sum(counts) != row["slices"]:
        problems.append(f"{name} holds other numbers of slices in its records than {shards.SHARDS} says")
    if largest != [row["largest_height"], row["largest_width"]]:
        problems.append(
            f"{name}: its largest slice is {largest[0]}x{largest[1]} px, {shards.SHARDS} says {row['largest_height']}x{row['largest_width']}"
        )
    problems += _compare(path, rows)


def _row(record: Mapping[str, Any], shape: tuple[int, ...], number: int, slot: int) -> dict[str, Any]:
    """What index.parquet has to say of a slice."""
    row = {"record": number, "slot": slot, "height": shape[0], "width": shape[1]}
    row |= {name: record[name] for name in (*records.TEXT, *records.NUMBERS)}
    row |= {f"spacing_{axis}": v for axis, v in zip(("rows", "columns", "slices"), record["spacing"], strict=True)}
    names = (*records.SLICE_NUMBERS, *records.SLICE_INTEGERS, *records.SLICE_TEXT)
    return row | {name: record[name][slot] for name in names}


def _compare(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        index = pq.read_table(path.parent / shards.INDEX, filters=[("shard", "=", path.name)])
        index = index.sort_by([("record", "ascending"), ("slot", "ascending")]).to_pylist()
    except (pa.ArrowException, OSError):
        return []  # the whole index was looked at already
    if len(index) != len(rows):
        return []  # and its counts
    problems = []
    for name in rows[0] if rows else ():
        if name not in index[0]:
            problems.append(f"{shards.INDEX} has no column {name}")
            continue
        # The index holds doubles, a record holds singles.
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


if __name__ == "__main__":
    sys.exit(main())
