"""Fourth stage: duplicates out, then tables, card and TFDS metadata over everything that was ever added.

A dataset grows by additions. Each has a folder `.build/addition-00000` with its plan, its sidecars and what became of its
files; it counts as soon as shards.parquet says so, which is replaced last. Until then readers see the dataset as it was:
new shards are files that nothing names yet, and all metadata are made aside and moved into place in one go.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curia_common.errors import UserError
from data_pipeline.format import codec, files, records, shards
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import card as cards
from data_pipeline.stages import convert, inventory, pseudonyms
from data_pipeline.stages import near_duplicates as likeness

BUILD_FOLDER = ".build"
ADDITIONS = b"additions"  # in the metadata of shards.parquet: how many are finished
FILES, SERIES, SUMMARY, HELD_OUT = "files.parquet", "series.parquet", "summary.json", "held_out.json"
MANIFEST_COLUMNS = ("path", "fate", "reason", "series", "split", "problems", "stored_sha256", "shard", "decoder")
NEAR_COLUMN = "near_duplicate_of"
NEAR = "looks like another series"
SAME_PIXELS = "the same pixels as a slice of another series"
_TEXT = (
    "fate",
    "reason",
    "series",
    "split",
    "problems",
    "stored_sha256",
    "shard",
    "decoder",
    "instance",
    "named",
    "patient",
)
_FILES_SCHEMA = pa.schema(
    [("path", pa.string()), ("raw", pa.binary()), ("size", pa.int64()), ("modified_ns", pa.int64())]
    + [(name, pa.string()) for name in (*_TEXT, "labels")]
)
_PART = 1 << 16  # rows of the manifest that are in memory at a time


def folder_of(private: Path, addition: int) -> Path:
    """Where an addition keeps its plan and sidecars."""
    return private / f"addition-{addition:05d}"


def finished_additions(output: Path) -> int:
    """How many additions the dataset consists of; 0 where there is none.

    Raises:
      UserError: the dataset is damaged, or of another version.
    """
    path = output / shards.SHARDS
    if not path.exists():
        return 0
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged; copy the dataset again or build it anew elsewhere") from error
    if ADDITIONS not in metadata:
        raise UserError(
            f"{output} holds a finished dataset of another version of this software, which had no additions; choose another --output, or remove it to build it anew"
        )
    return int(metadata[ADDITIONS])


@dataclasses.dataclass
class Known:
    """What earlier additions brought.

    Attributes:
      additions: how many there are.
      files: rows of files.parquet by path, the latest of each.
      instances: pseudonyms of the DICOM instances that are kept.
      splits: of the patients of whom something is kept.
      shards: rows of shards.parquet.
      settings: of the first plan.
    """

    additions: int = 0
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    instances: frozenset[str] = frozenset()
    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] | None = None

    def first_numbers(self) -> dict[str, int]:
        """The number that the next shard of each split has."""
        return dict(collections.Counter(shard["split"] for shard in self.shards))

    def held_out_files(self) -> int:
        return sum(row["reason"] == plan.HELD_OUT for row in self.files.values())

    def slices_of(self, output: Path, series: set[str]) -> dict[str, int]:
        """For series that get further slices: the number that the next one has."""
        if not self.additions or not series:
            return {}
        table = pq.read_table(output / shards.INDEX, columns=["series", "index", "shard"])
        table = table.filter(pc.field("shard").isin([shard["file"] for shard in self.shards]))
        table = table.filter(pc.field("series").isin(sorted(series)))
        found = table.group_by("series").aggregate([("index", "max")]).to_pylist()
        return {row["series"]: row["index_max"] + 1 for row in found}


def known(output: Path, private: Path) -> Known:
    """What finished additions brought."""
    count = finished_additions(output)
    if not count and (private / plan.PLAN).exists():
        raise UserError(
            f"{output} holds an unfinished build of another version of this software; remove it to build it anew"
        )
    if not count:
        return Known()
    found: dict[str, dict[str, Any]] = {}
    for addition in range(count):
        table = pq.read_table(folder_of(private, addition) / FILES)
        for row in table.to_pylist():
            found[os.fsdecode(row["raw"])] = row
    kept = [row for row in found.values() if row["fate"] == "kept"]
    first = plan.read(folder_of(private, 0))
    if first is None:
        raise UserError(f"{folder_of(private, 0) / plan.PLAN} is missing or damaged; without it no exams can be added")
    return Known(
        count, found, frozenset(row["instance"] for row in kept if row["instance"]), {row["patient"]: row["split"] for row in kept},
        pq.read_table(output / shards.SHARDS).to_pylist(), first["settings"],
    )  # fmt: skip


# ---- exact duplicates


def _keys(table: pa.Table) -> np.ndarray:
    """64 bits that stand for the pixels of a slice and its size."""
    source = np.fromiter((int(text, 16) for text in table["source"].to_pylist()), np.uint64, len(table))
    size = table["height"].to_numpy().astype(np.uint64) << np.uint64(32) | table["width"].to_numpy().astype(np.uint64)
    return source ^ (size * np.uint64(0x9E3779B97F4A7C15))


def duplicates(
    before: Sequence[np.ndarray], parts: Sequence[tuple[str, str, pa.Table]]
) -> dict[str, set[tuple[int, int]]]:
    """Slices whose pixels are somewhere else too: all but the first.

    What is in the dataset already comes first, then test, validation and train, so that of two copies the one to train on
    goes; within a split the order of the shards decides.

    Args:
      before: keys of the slices of earlier additions.
      parts: file, split and index rows of each new shard.

    Returns:
      By file, record and slot of the slices to drop.
    """
    ranked = sorted(parts, key=lambda part: -pseudonyms.SPLITS.index(part[1]))  # stable: the order of shards stays
    keys = [*before, *(_keys(part[2]) for part in ranked)]
    if not keys:
        return {}
    _, first = np.unique(np.concatenate(keys), return_index=True)
    repeated = np.ones(sum(len(one) for one in keys), bool)
    repeated[first] = False
    start = sum(len(one) for one in before)
    result = {}
    for file, _, table in ranked:
        gone = np.flatnonzero(repeated[start : start + len(table)])
        start += len(table)
        if len(gone):
            rows = table.select(["record", "slot"]).take(gone).to_pylist()
            result[file] = {(row["record"], row["slot"]) for row in rows}
    return result


def _without(table: pa.Table, drop: set[tuple[int, int]]) -> pa.Table:
    """Rows of a shard's index after `drop` left the shard, with the new numbers of records and slots."""
    if not drop:
        return table
    record, slot = table["record"].to_pylist(), table["slot"].to_pylist()
    keep = [n for n, place in enumerate(zip(record, slot, strict=True)) if place not in drop]
    records_, slots, number, last = [], [], -1, None
    for n in keep:
        number, within = (number, slots[-1] + 1) if record[n] == last else (number + 1, 0)
        last = record[n]
        records_.append(number)
        slots.append(within)
    table = table.take(pa.array(keep, pa.int64()))
    for name, values in (("record", records_), ("slot", slots)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))
    return table


def _thin(output: Path, sidecars: Path, report: dict[str, Any], table: pa.Table, drop: set[tuple[int, int]]) -> None:
    """Takes `drop` out of a shard and of its report; done once, however often a commit starts again."""
    path, final = output / report["file"], sidecars / f"{report['file']}.final.json"
    name = hashlib.sha256(json.dumps(sorted(drop)).encode()).hexdigest()
    done = json.loads(final.read_text(encoding="utf-8")) if final.exists() else {}
    if done.get("drop") != name or path.stat().st_size != done["report"]["bytes"]:
        intensity = {kind: list(bins) for kind, bins in report["intensity"].items()}
        for number, slot in sorted(drop):
            one = records.parse(shards.read_record(path, number))
            if not one["flags"][slot] & records.REFORMATTED:  # those are not counted
                kind = "HU" if one["units"] == "HU" else "relative"
                histogram = np.bincount(codec.decode(one["slices"][slot]).ravel())
                scale = (one["slope"], one["intercept"], one["series_percentiles"])
                bins = cards.intensities(histogram, *scale, hu=kind == "HU")
                intensity[kind] = [a - int(b) for a, b in zip(intensity[kind], bins, strict=True)]
        count, digest, counts = shards.thin(path, path, drop)
        left = _without(table, drop)
        changed = {
            "records": count, "sha256": digest, "slices": len(left), "slice_counts": counts, "bytes": path.stat().st_size,
            "intensity": intensity, "largest": [max(left[side].to_pylist(), default=0) for side in ("height", "width")],
        }  # fmt: skip
        done = {"plan": report["plan"], "drop": name, "report": changed}
        files.write_text(final, json.dumps(done), private=True)
    report |= done["report"]


def is_finished(sidecars: Path, path: Path, plan_hash: str) -> bool:
    """Whether a shard is published as a worker or an earlier commit left it."""
    if not path.exists():
        return False
    for name, size in ((f"{path.name}.json", lambda r: r["bytes"]), (f"{path.name}.final.json", lambda r: r["report"]["bytes"])):  # fmt: skip
        try:
            report = json.loads((sidecars / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # made again
        if report["plan"] == plan_hash and size(report) == path.stat().st_size:
            return (sidecars / f"{path.name}.parquet").exists() and (sidecars / f"{path.name}.json").exists()
    return False


# ---- the commit


@dataclasses.dataclass
class Request:
    """What a commit needs to know.

    Attributes:
      named: patients by the pseudonyms of their headers, before a label table renamed them; one per entry.
      held_out: pseudonyms that must not be in the dataset.
      holdout: what the card says of them, or None.
    """

    output: Path
    private: Path
    name: str
    settings: Mapping[str, Any]
    examples: int
    before: Known
    made: Mapping[str, Any]
    entries: Sequence[inventory.Entry]
    named: Sequence[str]
    held_out: frozenset[str]
    holdout: dict[str, Any] | None


def commit(request: Request) -> dict[str, Any]:
    """Publishes the addition whose shards are all converted; returns the dataset card.

    Raises:
      UserError: no slice is left, or a held-out patient is in the dataset.
    """
    r = request
    own = folder_of(r.private, r.before.additions)
    sidecars = own / "shards"
    reports, tables = [], {}
    for shard in r.made["shards"]:
        file = shards.file_name(r.name, shard["split"], shard["number"])
        reports.append(json.loads((sidecars / f"{file}.json").read_text(encoding="utf-8")))
        tables[file] = pq.read_table(sidecars / f"{file}.parquet")
    drops = duplicates(
        [_keys(table) for table in _index_tables(r.output, r.before, ["source", "height", "width", "shard"])],
        [(report["file"], report["split"], tables[report["file"]]) for report in reports if report["slices"]],
    )
    outcomes: dict[str, dict[str, Any]] = {}
    for report in reports:
        table, drop = tables[report["file"]], drops.get(report["file"], set())
        _mark_duplicates(report, table, drop)
        if drop:
            _thin(r.output, sidecars, report, table, drop)
            report["left_out"][SAME_PIXELS] = len(drop)
        tables[report["file"]] = _without(table, drop)
        for path, outcome in report["files"].items():
            convert.merge_outcome(outcomes, path, outcome)
    # A split of which nothing is left would be an empty one to train on or to test with.
    splits = {report["split"] for report in reports if report["slices"]}
    for report in reports:
        if report["split"] not in splits:
            (r.output / report["file"]).unlink(missing_ok=True)
    left_out = collections.Counter()
    for report in reports:
        left_out.update(report["left_out"])
    reports = [report for report in reports if report["split"] in splits]
    tables = {report["file"]: tables[report["file"]] for report in reports}
    near = _near_duplicates(r, own, reports, tables)
    rows = file_rows(r, outcomes, near)
    if not splits and not r.before.additions:
        raise nothing_left(r.output, rows)
    files.write_table(own / FILES, pa.Table.from_pylist(rows, _FILES_SCHEMA), private=True)
    bins = {"HU": len(cards.HU_EDGES) - 1, "relative": len(cards.RELATIVE_EDGES) - 1}
    intensity = {
        kind: np.sum([report["intensity"][kind] for report in reports], axis=0, initial=0, dtype=np.int64).tolist()
        if reports
        else [0] * count
        for kind, count in bins.items()
    }
    summary = {"intensity": intensity, "left_out": dict(sorted(left_out.items()))}
    files.write_text(own / SUMMARY, json.dumps(summary), private=True)
    shard_rows = r.before.shards + [_shard_row(report, r.before.additions) for report in reports]
    return publish(r, shard_rows, tables, near, r.before.additions + 1)


def publish(
    r: Request, shard_rows: list[dict[str, Any]], tables: Mapping[str, pa.Table], near: Mapping[str, str], additions: int
) -> dict[str, Any]:  # fmt: skip
    """Makes all metadata aside, then moves them into place, shards.parquet last."""
    aside = r.private / "next"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    counts = cards.Counts(r.examples, r.held_out)
    _write_index(aside / shards.INDEX, r, tables, near, counts)
    if counts.held_out:
        raise UserError(
            f"{counts.held_out:,} slices of held-out patients are in the dataset; choose another --output and build it anew with --holdout"
        )
    fates = _write_manifest(aside / shards.MANIFEST, r.private, additions)
    summaries = [json.loads((folder_of(r.private, n) / SUMMARY).read_text(encoding="utf-8")) for n in range(additions)]
    left_out = collections.Counter()
    for summary in summaries:
        left_out.update(summary["left_out"])
    card = cards.make(
        name=r.name, settings=r.settings, codec=codec.NAMES[codec.DELTA], counts=counts, shard_table=shard_rows, files=fates,
        intensity={kind: np.sum([s["intensity"][kind] for s in summaries], axis=0).tolist() for kind in ("HU", "relative")},
        left_out=left_out, held_out=r.holdout, additions=additions,
    )  # fmt: skip
    files.write_text(aside / shards.CARD, json.dumps(card, indent=2) + "\n")
    files.write_text(aside / shards.PAGE, cards.page(card, cards.examples(r.output, counts.examples())))
    _tfds_metadata(aside, r.name, shard_rows)
    files.write_table(aside / shards.SHARDS, _shard_table(shard_rows, additions))
    moved = [path.name for path in aside.iterdir() if path.name != shards.SHARDS]
    for name in (shards.INDEX, *sorted(set(moved) - {shards.INDEX}), shards.SHARDS):
        os.replace(aside / name, r.output / name)
    aside.rmdir()
    return card


def _index_tables(output: Path, before: Known, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The index of the dataset as it is, part by part; rows of an addition that was never finished are left out."""
    if not before.additions:
        return
    names = [shard["file"] for shard in before.shards]
    with pq.ParquetFile(output / shards.INDEX) as file:
        for batch in file.iter_batches(files.ROWS_TOGETHER, columns=columns):
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.field("shard").isin(names))


def _mark_duplicates(report: dict[str, Any], table: pa.Table, drop: set[tuple[int, int]]) -> None:
    """A file of whose slices none is left is a duplicate."""
    left: collections.Counter[str] = collections.Counter()
    columns = (table[name].to_pylist() for name in ("record", "slot", convert.PATH)) if len(table) else ((), (), ())
    for record, slot, path in zip(*columns, strict=True):
        left[os.fsdecode(path)] += (record, slot) not in drop
    for path, count in left.items():
        if not count and path:
            report["files"][path] |= {"fate": "duplicate", "reason": SAME_PIXELS, "shard": ""}


def _near_duplicates(
    r: Request, own: Path, reports: Sequence[Mapping[str, Any]], tables: Mapping[str, pa.Table]
) -> dict[str, str]:
    """New series that look like another one, with the first of those; writes the signatures of this addition."""
    new = []
    for report in reports:
        here = set(tables[report["file"]]["series"].unique().to_pylist()) if report["slices"] else set()
        new += [series for series in report["series"] if series["series"] in here]
    names = ("series", "part", "patient", "split", "modality", "plane")
    table = pa.table(
        {name: pa.array([s[name] for s in new], pa.int32() if name == "part" else pa.string()) for name in names}
        | {"signature": pa.array([np.asarray(s["signature"], np.int8).tobytes() for s in new], pa.binary())}
    )
    files.write_table(own / SERIES, table, private=True)
    every = [pq.read_table(folder_of(r.private, n) / SERIES) for n in range(r.before.additions)] + [table]
    rows = pa.concat_tables(every)
    shape = (len(likeness.PLACES), likeness.SIDE, likeness.SIDE)
    signatures = np.frombuffer(b"".join(rows["signature"].to_pylist()), np.int8).reshape(len(rows), *shape)
    series = rows["series"].to_pylist()
    kinds = [f"{m} {p}" for m, p in zip(rows["modality"].to_pylist(), rows["plane"].to_pylist(), strict=True)]
    first = likeness.groups(signatures, kinds)
    start = len(rows) - len(table)
    return {
        series[n]: series[first[n]] for n in range(start, len(rows)) if first[n] != n and series[first[n]] != series[n]
    }


def file_rows(r: Request, outcomes: Mapping[str, Mapping[str, Any]], near: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for entry, named in zip(r.entries, r.named, strict=True):
        row: dict[str, Any] = {
            "path": os.fsencode(entry.path).decode("utf-8", "backslashreplace"), "raw": os.fsencode(entry.path),
            "size": entry.size, "modified_ns": entry.modified_ns, "fate": entry.fate, "reason": entry.reason,
            "series": entry.series, "split": entry.split, "instance": entry.facts.instance, "named": named,
            "patient": entry.patient, "labels": json.dumps(entry.labels, sort_keys=True),
            "problems": "", "stored_sha256": "", "shard": "", "decoder": "",
        }  # fmt: skip
        row |= outcomes.get(entry.path, {})
        if row["fate"] == "kept" and row["series"] in near:
            row["problems"] = row["reason"] = "; ".join(filter(None, (row["problems"], NEAR)))
        rows.append(row)
    return rows


def nothing_left(output: Path, rows: Sequence[Mapping[str, Any]]) -> UserError:
    """The error of a build that keeps nothing; manifest.parquet is written for it all the same."""
    manifest = [{name: row[name] for name in MANIFEST_COLUMNS} for row in rows]
    files.write_table(output / shards.MANIFEST, pa.Table.from_pylist(manifest), private=True)
    reasons = collections.Counter(row["reason"] for row in manifest)
    return UserError(
        f"none of the {len(manifest):,} files is a usable slice: "
        + "; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(4))
        + f"; {output / shards.MANIFEST} says it for each file"
    )


def _write_index(
    path: Path, r: Request, tables: Mapping[str, pa.Table], near: Mapping[str, str], counts: cards.Counts
) -> None:
    new = [table for table in tables.values() if len(table)]
    schemas = [table.schema for table in new]
    if r.before.additions:
        schemas.insert(0, pq.read_schema(r.output / shards.INDEX))
    schemas.append(pa.schema([(NEAR_COLUMN, pa.string())]))
    try:
        schema = pa.unify_schemas([s.remove_metadata() for s in schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"a label column holds numbers in one addition and text in another ({error}); rename it in the table"
        ) from error
    if convert.PATH in schema.names:
        schema = schema.remove(schema.names.index(convert.PATH))

    def rows() -> Iterator[pa.Table]:
        for table in _index_tables(r.output, r.before):
            yield table
        for table in new:
            others = [near.get(series, "") for series in table["series"].to_pylist()]
            yield table.append_column(NEAR_COLUMN, pa.array(others, pa.string()))

    def fitted() -> Iterator[pa.Table]:
        for table in rows():
            columns = [
                table[name].cast(field.type) if (name := field.name) in table.column_names else pa.nulls(len(table), field.type)
                for field in schema
            ]  # fmt: skip
            one = pa.Table.from_arrays(columns, schema=schema)
            counts.add(one)
            yield one

    files.write_tables(path, schema, fitted())


def _write_manifest(path: Path, private: Path, additions: int) -> dict[str, collections.Counter[str]]:
    """Every file that was ever an input, with what became of it last; returns numbers of files by fate and reason."""
    latest: dict[bytes, int] = {}
    for addition in range(additions):
        table = pq.read_table(folder_of(private, addition) / FILES, columns=["raw"])
        latest.update(dict.fromkeys(table["raw"].to_pylist(), addition))
    fates: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    schema = pa.schema([(name, pa.string()) for name in MANIFEST_COLUMNS])

    def rows() -> Iterator[pa.Table]:
        for addition in range(additions):
            with pq.ParquetFile(folder_of(private, addition) / FILES) as file:
                for batch in file.iter_batches(_PART, columns=["raw", *MANIFEST_COLUMNS]):
                    table = pa.Table.from_batches([batch])
                    table = table.filter(pa.array([latest[raw] == addition for raw in table["raw"].to_pylist()]))
                    for fate, reason in zip(table["fate"].to_pylist(), table["reason"].to_pylist(), strict=True):
                        fates[fate][reason] += 1
                    yield table.select(list(MANIFEST_COLUMNS)).cast(schema)

    files.write_tables(path, schema, rows(), private=True)
    return fates


def _shard_row(report: Mapping[str, Any], addition: int) -> dict[str, Any]:
    row = {name: report[name] for name in ("file", "split", "records", "slices", "bytes", "sha256")}
    counts = None if set(report["slice_counts"]) <= {1} else report["slice_counts"]
    return row | {
        "largest_height": report["largest"][0], "largest_width": report["largest"][1], "slice_counts": counts, "addition": addition,
    }  # fmt: skip


def _shard_table(rows: Sequence[Mapping[str, Any]], additions: int) -> pa.Table:
    names = ("file", "split", "records", "slices", "bytes", "sha256", "largest_height", "largest_width")
    table = {name: [row[name] for row in rows] for name in names}
    table["slice_counts"] = pa.array([row["slice_counts"] for row in rows], pa.list_(pa.int32()))
    table["addition"] = pa.array([row["addition"] for row in rows], pa.int32())
    return pa.table(table).replace_schema_metadata({ADDITIONS: str(additions)})


def _tfds_metadata(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    # Imported here: the other stages and the workers do not need it.
    import tensorflow_datasets as tfds

    from data_pipeline import features

    infos = []
    for split in pseudonyms.SPLITS:
        part = [row for row in rows if row["split"] == split]
        if part:
            template = tfds.core.ShardedFileTemplate(
                dataset_name=name,
                data_dir=folder,
                split=split,
                filetype_suffix="array_record",
                template=shards.FILE_TEMPLATE,
            )
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[row["records"] for row in part], num_bytes=sum(row["bytes"] for row in part),
                    filename_template=template,
                )
            )  # fmt: skip
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features.features(), description="CT and MR slices, see card.json"
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
