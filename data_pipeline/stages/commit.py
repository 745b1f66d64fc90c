"""Fourth stage: exact duplicates out, then tables, card and TFDS metadata over everything that was ever added.

A dataset grows by additions. Each has a folder `.build/addition-00000` with its plan, its sidecars and what became of its
files. It counts as soon as shards.parquet lists its shards, and that file is replaced last. Until then readers see the
dataset as it was: new shards are files that no table names yet, and all metadata are written to a separate folder and moved
into place together.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from curia_common import cli
from curia_common.errors import DataError, UserError
from data_pipeline.format import codec, files, records, shards
from data_pipeline.format.files import Json
from data_pipeline.format.shards import ShardRow
from data_pipeline.stages import (
    advice,
    assignment,
    card,
    card_examples,
    card_page,
    convert,
    inventory,
    near_duplicates,
    pseudonyms,
    units,
)
from data_pipeline.stages.assignment import Settings, StoredPlan
from data_pipeline.stages.convert import FileOutcome, SeriesSummary, ShardReport
from data_pipeline.stages.pack import EVIDENCE, PATH

BUILD_FOLDER = ".build"
ADDITIONS = b"additions"  # in the metadata of shards.parquet: how many are finished
FILES, SERIES, SUMMARY, HELD_OUT = "files.parquet", "series.parquet", "summary.json", "held_out.json"
MANIFEST_COLUMNS = ("path", "fate", "reason", "series", "split", "problems", "stored_sha256", "shard", "decoder")
NEAR_COLUMN = "near_duplicate_of"
KIND_COLUMN, PATIENT_COLUMN = "kind", "patient_from"
ADDED_COLUMNS = (NEAR_COLUMN, KIND_COLUMN, PATIENT_COLUMN)  # of the index, which the commit adds to what the shards say
NEAR = "looks like another series"
SAME_PIXELS = "the same pixels as a slice of another series"
KNOWN_INSTANCE = "the same instance is in the dataset already"
REUSED_UID = "its instance UID is that of another image too"
REBUILD = "choose another --output and build it anew"
_PART = 1 << 16  # rows of the manifest that are in memory at a time

Drops = Collection[tuple[int, int]]  # record and slot of slices to leave out


class FileRow(NamedTuple):
    """Outcome of an input file; a row of an addition's files.parquet.

    Attributes:
      path: as the manifest shows it; raw: byte for byte.
      instance: pseudonym of the DICOM instance.
      named, patient: pseudonyms of the patient by the header, and after the label table.
      labels: JSON.
      study, series_uid, patient_from: as of inventory.Entry; "" in the files of older versions.
    """

    path: str
    raw: bytes
    size: int
    modified_ns: int
    fate: str
    reason: str
    series: str
    split: str
    problems: str
    stored_sha256: str
    shard: str
    decoder: str
    instance: str
    named: str
    patient: str
    labels: str
    study: str = ""
    series_uid: str = ""
    patient_from: str = ""

    def entry(self) -> inventory.Entry:
        """The file as the inventory saw it, before a label table renamed its patient."""
        return inventory.Entry(
            os.fsdecode(self.raw), self.size, self.modified_ns, fate="known", series=self.series, patient=self.named,
            study=self.study, series_uid=self.series_uid, patient_from=self.patient_from,
        )  # fmt: skip


_FILES_SCHEMA = pa.schema([
    (name, {"raw": pa.binary(), "size": pa.int64(), "modified_ns": pa.int64()}.get(name, pa.string())) for name in FileRow._fields
])  # fmt: skip


_SERIES_SCHEMA = pa.schema([
    (field.name, {"part": pa.int32(), "signature": pa.binary()}.get(field.name, pa.string())) for field in dataclasses.fields(SeriesSummary)
])  # fmt: skip


def folder_of(private: Path, addition: int) -> Path:
    """Where an addition keeps its plan and sidecars."""
    return private / f"addition-{addition:05d}"


@dataclasses.dataclass(frozen=True)
class Known:
    """What earlier additions brought.

    Attributes:
      additions: how many there are.
      files: by path, the latest row of each.
      instances: pseudonyms of the DICOM instances that are kept.
      splits: by patient, of whom something is kept.
      settings: of the first plan.
    """

    additions: int = 0
    files: Mapping[str, FileRow] = dataclasses.field(default_factory=dict)
    instances: frozenset[str] = frozenset()
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shards: Sequence[ShardRow] = ()
    settings: Settings | None = None

    def first_numbers(self) -> dict[str, int]:
        """By split, the number of its next shard."""
        return dict(collections.Counter(shard.split for shard in self.shards))

    def slices_of(self, output: Path, series: set[str]) -> dict[str, int]:
        """For series that get further slices: the number of the next one."""
        if not self.additions or not series:
            return {}
        table = pq.read_table(output / shards.INDEX, columns=["series", "index", "shard"])
        table = table.filter(pc.field("shard").isin([shard.file for shard in self.shards]))
        table = table.filter(pc.field("series").isin(sorted(series)))
        found = table.group_by("series").aggregate([("index", "max")]).to_pylist()
        return {row["series"]: row["index_max"] + 1 for row in found}


def known(output: Path, private: Path) -> Known:
    """What finished additions brought.

    Raises:
      DataError: the dataset or its private folder is damaged, or of another version.
    """
    path = output / shards.SHARDS
    if not path.exists():
        if (private / assignment.PLAN).exists():
            raise DataError(
                f"{output} holds an unfinished build of another version of this software; remove it to build it anew"
            )
        return Known()
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged; copy the dataset again or build it anew elsewhere") from error
    if ADDITIONS not in metadata:
        raise DataError(
            f"{output} holds a finished dataset of another version of this software, which had no additions; choose another --output, or remove it to build it anew"
        )
    count = int(metadata[ADDITIONS])
    found: dict[str, FileRow] = {}
    for addition in range(count):
        for row in pq.read_table(folder_of(private, addition) / FILES).to_pylist():
            found[os.fsdecode(row["raw"])] = FileRow(**row)
    kept = [row for row in found.values() if row.fate == "kept"]
    first = assignment.read(folder_of(private, 0))
    if first is None:
        plan = folder_of(private, 0) / assignment.PLAN
        raise DataError(f"{plan} is missing or damaged; without it no exams can be added")
    return Known(
        additions=count, files=found, instances=frozenset(row.instance for row in kept if row.instance),
        splits={row.patient: row.split for row in kept},
        shards=[ShardRow(**row) for row in pq.read_table(path).to_pylist()], settings=first.settings,
    )  # fmt: skip


# ---- exact duplicates


def pixel_keys(table: pa.Table) -> UInt64[np.ndarray, "slices"]:
    """For each row of an index 64 bits that identify the pixels of its slice and their size."""
    source = np.fromiter((int(text, 16) for text in table["source"].to_pylist()), np.uint64, len(table))
    size = table["height"].to_numpy().astype(np.uint64) << np.uint64(32) | table["width"].to_numpy().astype(np.uint64)
    return source ^ (size * np.uint64(0x9E3779B97F4A7C15))


def duplicates(
    before: Sequence[UInt64[np.ndarray, "_"]], parts: Sequence[tuple[str, str, pa.Table]]
) -> dict[str, set[tuple[int, int]]]:
    """Slices whose pixels occur more than once: all but the first.

    Slices of the dataset come first, then test, validation and train, so that of two copies the one to train on goes. Within
    a split the order of the shards decides.

    Args:
      before: keys of the slices of earlier additions.
      parts: file, split and index rows of each new shard.

    Returns:
      By file, record and slot of the slices to drop.
    """
    ranked = sorted(parts, key=lambda part: -pseudonyms.SPLITS.index(part[1]))  # stable: the order of shards stays
    keys = [*before, *(pixel_keys(part[2]) for part in ranked)]
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


def _without(table: pa.Table, drop: Drops) -> pa.Table:
    """The index of a shard without the slices in `drop`, records and slots numbered anew."""
    if not drop:
        return table
    record, slot = table["record"].to_pylist(), table["slot"].to_pylist()
    keep = [n for n, place in enumerate(zip(record, slot, strict=True)) if place not in drop]
    table = table.take(pa.array(keep, pa.int64()))
    _, first, numbers = np.unique(table["record"].to_numpy(), return_index=True, return_inverse=True)
    for name, values in (("record", numbers), ("slot", np.arange(len(keep)) - first[numbers])):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))
    return table


def _thin(output: Path, sidecars: Path, report: ShardReport, plan: str, table: pa.Table, drop: Drops) -> ShardReport:
    """Takes the slices in `drop` out of a shard; returns its new report. Done once, however often a commit is repeated."""
    path, final = output / report.file, sidecars / f"{report.file}.final.json"
    name = hashlib.sha256(json.dumps(sorted(drop)).encode()).hexdigest()
    done: Json = json.loads(final.read_text(encoding="utf-8")) if final.exists() else {}
    if done.get("drop") != name or path.stat().st_size != done["report"]["bytes"]:
        intensity = {kind: np.array(bins) for kind, bins in report.intensity.items()}
        for number, slot in sorted(drop):
            header, slices, entries = records.parse(shards.read_record(path, number))
            if not entries[slot].flags & records.REFORMATTED:  # those are not counted
                hu = header.units == "HU"
                histogram = np.bincount(codec.decode(slices[slot]).ravel())
                bins = card.intensities(histogram, header.slope, header.intercept, header.series_percentiles, hu=hu)
                intensity["HU" if hu else "relative"] -= bins
        count, digest, counts = shards.thin(path, drop)
        left = _without(table, drop)
        changed = {
            "records": count, "sha256": digest, "slices": len(left), "slice_counts": counts, "bytes": path.stat().st_size,
            "intensity": {kind: bins.tolist() for kind, bins in intensity.items()},
            "largest": [max(left[side].to_pylist(), default=0) for side in ("height", "width")],
        }  # fmt: skip
        done = {"plan": plan, "drop": name, "report": changed}
        files.write_text(final, json.dumps(done), private=True)
    left_out = {**report.left_out, SAME_PIXELS: len(drop)}
    return dataclasses.replace(report, **done["report"], left_out=left_out)


def is_finished(sidecars: Path, path: Path, plan_hash: str) -> bool:
    """Whether a shard is as the conversion or an earlier commit of this plan published it."""
    if not path.exists() or not all((sidecars / f"{path.name}{end}").exists() for end in (".json", ".parquet")):
        return False
    for ending in (".json", ".final.json"):
        try:
            report = json.loads((sidecars / f"{path.name}{ending}").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if report["plan"] == plan_hash and report.get("report", report)["bytes"] == path.stat().st_size:
            return True
    return False


# ---- the commit


@dataclasses.dataclass(frozen=True)
class Request:
    """What a commit needs to know.

    Attributes:
      name: of the dataset.
      settings: what the card says of the options of the build.
      examples: slices to show on the card.
      entries: what is new among the inputs.
      named: of each entry, the pseudonym of the patient before a label table renamed patients.
      held_out: pseudonyms that must not be in the dataset.
      holdout: what the card says of --holdout; None where it was not given.
      inputs: as they were named.
    """

    output: Path
    private: Path
    name: str
    settings: Mapping[str, str | int | float | bool | None]
    examples: int
    before: Known
    entries: Sequence[inventory.Entry]
    named: Sequence[str]
    held_out: frozenset[str]
    holdout: card.Holdout | None
    inputs: Sequence[str] = ()


def commit(r: Request, plan: StoredPlan) -> card.Card:
    """Publishes the addition whose shards are all converted; returns the dataset card.

    Raises:
      DataError: no slice is left, or a held-out patient is in the dataset.
    """
    own = folder_of(r.private, r.before.additions)
    sidecars = own / "shards"
    reports, tables = [], {}
    for shard in plan.shards:
        file = shards.file_name(r.name, shard.split, shard.number)
        reports.append(ShardReport.from_json(json.loads((sidecars / f"{file}.json").read_text(encoding="utf-8"))))
        tables[file] = pq.read_table(sidecars / f"{file}.parquet")
    drops = duplicates(
        [pixel_keys(table) for table in _index_tables(r.output, r.before, ["source", "height", "width", "shard"])],
        [(report.file, report.split, tables[report.file]) for report in reports if report.slices],
    )
    outcomes: dict[str, FileOutcome] = {}
    left_out: collections.Counter[str] = collections.Counter()
    for number, report in enumerate(reports):
        drop = drops.get(report.file, set())
        found = _mark_duplicates(report, tables[report.file], drop)
        if drop:
            reports[number] = report = _thin(r.output, sidecars, report, plan.hash, tables[report.file], drop)
            tables[report.file] = _without(tables[report.file], drop)
        for path, outcome in found.items():
            outcomes[path] = convert.better_outcome(outcomes.get(path), outcome)
        left_out.update(report.left_out)
    # A split in which nothing is left would be an empty one to train on or to test with.
    splits = {report.split for report in reports if report.slices}
    for report in reports:
        if report.split not in splits:
            (r.output / report.file).unlink(missing_ok=True)
    reports = [report for report in reports if report.split in splits]
    tables = {report.file: tables[report.file] for report in reports}
    near = _near_duplicates(r, own, reports, tables)
    rows = file_rows(r, outcomes, near)
    if not splits and not r.before.additions:
        raise nothing_left(r.output, rows)
    files.write_table(own / FILES, pa.Table.from_pylist([row._asdict() for row in rows], _FILES_SCHEMA), private=True)
    intensity = {
        kind: np.sum([np.zeros(len(edges) - 1, np.int64), *(one.intensity[kind] for one in reports)], axis=0).tolist()
        for kind, edges in card.EDGES.items()
    }
    summary = {"intensity": intensity, "left_out": dict(sorted(left_out.items())), "inputs": list(r.inputs)}
    files.write_text(own / SUMMARY, json.dumps(summary), private=True)
    shard_rows = [*r.before.shards, *(_shard_row(report, r.before.additions) for report in reports)]
    return publish(r, shard_rows, tables, near, r.before.additions + 1)


def publish(
    r: Request, shard_rows: Sequence[ShardRow], tables: Mapping[str, pa.Table], near: Mapping[str, str], additions: int
) -> card.Card:
    """Writes all metadata to a separate folder, then moves them into place, shards.parquet last; returns the dataset card.

    Args:
      tables: rows of the index, by new shard.
      near: new series that look like another one, with that one.

    Raises:
      DataError: a held-out patient is in the dataset.
      UserError: a label column has another type than in earlier additions.
    """
    aside = r.private / "next"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    counts = card.Counts(r.examples, r.held_out, pictures=not r.settings.get("drop_faces"))
    files.write_tables(aside / shards.INDEX, _index_schema(r, tables), _index_parts(r, tables, near, counts))
    if counts.held_out:
        raise DataError(f"{counts.held_out:,} slices of held-out patients are in the dataset; {REBUILD} with --holdout")
    found = _write_manifest(aside / shards.MANIFEST, r.private, additions)
    summaries = [json.loads((folder_of(r.private, n) / SUMMARY).read_text(encoding="utf-8")) for n in range(additions)]
    left_out = sum((collections.Counter(summary["left_out"]) for summary in summaries), collections.Counter())
    made = card.make(
        name=r.name, settings=r.settings, codec=codec.NAMES[codec.DELTA], counts=counts, shard_rows=shard_rows, files=found.fates,
        intensity={kind: np.sum([s["intensity"][kind] for s in summaries], axis=0).tolist() for kind in card.EDGES},
        left_out=left_out, holdout=r.holdout, additions=additions,
        refused=card.UnitsRefused(len(found.refused - set(counts.series)), sum(left_out[rule] for rule in units.REFUSED)),
        inputs=[name for summary in summaries for name in summary.get("inputs", ())],
    )  # fmt: skip
    files.write_text(aside / shards.CARD, json.dumps(made, indent=2) + "\n")
    examples = card_examples.pictures(r.output, counts.examples())
    files.write_text(aside / shards.PAGE, card_page.page(made, examples))
    _tfds_metadata(aside, r.name, shard_rows)
    files.write_table(aside / shards.SHARDS, _shard_table(shard_rows, additions))
    moved = [path.name for path in aside.iterdir() if path.name != shards.SHARDS]
    cli.commit()
    for name in (shards.INDEX, *sorted(set(moved) - {shards.INDEX}), shards.SHARDS):
        os.replace(aside / name, r.output / name)
    aside.rmdir()
    return made


def _index_tables(output: Path, before: Known, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The index of the dataset, part by part, without the rows of an unfinished addition."""
    if not before.additions:
        return
    names = [shard.file for shard in before.shards]
    with pq.ParquetFile(output / shards.INDEX) as file:
        for batch in file.iter_batches(files.ROWS_TOGETHER, columns=columns):
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.field("shard").isin(names))


def _mark_duplicates(report: ShardReport, table: pa.Table, drop: Drops) -> dict[str, FileOutcome]:
    """The outcomes of a shard's files; a file is a duplicate where none of its slices is left."""
    left: collections.Counter[str] = collections.Counter()
    columns = (table[name].to_pylist() for name in ("record", "slot", PATH)) if len(table) else ((), (), ())
    for record, slot, path in zip(*columns, strict=True):
        left[os.fsdecode(path)] += (record, slot) not in drop
    return {
        path: dataclasses.replace(outcome, fate="duplicate", reason=SAME_PIXELS, shard="") if left.get(path) == 0 else outcome
        for path, outcome in report.files.items()
    }  # fmt: skip


def _near_duplicates(
    r: Request, own: Path, reports: Sequence[ShardReport], tables: Mapping[str, pa.Table]
) -> dict[str, str]:
    """New series that look like another one, with the first of those; writes the signatures of this addition."""
    new = []
    for report in reports:
        here = set(tables[report.file]["series"].unique().to_pylist()) if report.slices else set()
        new += [series for series in report.series if series.series in here]
    signed = [vars(one) | {"signature": np.asarray(one.signature, np.int8).tobytes()} for one in new]
    table = pa.Table.from_pylist(signed, _SERIES_SCHEMA)
    files.write_table(own / SERIES, table, private=True)
    every = [pq.read_table(folder_of(r.private, n) / SERIES) for n in range(r.before.additions)] + [table]
    rows = pa.concat_tables(every)
    shape = (len(near_duplicates.PLACES), near_duplicates.SIDE, near_duplicates.SIDE)
    signatures = np.frombuffer(b"".join(rows["signature"].to_pylist()), np.int8).reshape(len(rows), *shape)
    series = rows["series"].to_pylist()
    kinds = [f"{m} {p}" for m, p in zip(rows["modality"].to_pylist(), rows["plane"].to_pylist(), strict=True)]
    first = near_duplicates.groups(signatures, kinds)
    start = len(rows) - len(table)
    return {
        series[n]: series[first[n]] for n in range(start, len(rows)) if first[n] != n and series[first[n]] != series[n]
    }


def file_rows(r: Request, outcomes: Mapping[str, FileOutcome], near: Mapping[str, str]) -> list[FileRow]:
    """One row per entry: what the inventory, the plan and the conversion made of it."""
    rows = []
    for entry, named in zip(r.entries, r.named, strict=True):
        row = FileRow(
            path=os.fsencode(entry.path).decode("utf-8", "backslashreplace"), raw=os.fsencode(entry.path), size=entry.size,
            modified_ns=entry.modified_ns, fate=entry.fate, reason=entry.reason, series=entry.series, split=entry.split,
            problems="", stored_sha256="", shard="", decoder="", instance=entry.facts.instance, named=named,
            patient=entry.patient, labels=json.dumps(entry.labels, sort_keys=True), study=entry.study,
            series_uid=entry.series_uid, patient_from=entry.patient_from,
        )  # fmt: skip
        if entry.path in outcomes:
            row = row._replace(**dataclasses.asdict(outcomes[entry.path]))
        rows.append(row)
    # What is kept under one UID differs in its pixels, because equal slices are in once.
    kept = collections.Counter(row.instance for row in rows if row.fate == "kept" and row.instance)
    return [_with_cross_references(row, kept, r.before.instances, near) for row in rows]


def _with_cross_references(
    row: FileRow, kept: collections.Counter[str], known: Collection[str], near: Mapping[str, str]
) -> FileRow:
    """A row with what other files and series say of it.

    Args:
      kept: kept files of this addition by instance; known: instances of earlier ones.
      near: as in publish.
    """
    if row.fate == "duplicate" and row.reason == SAME_PIXELS and row.instance in known:
        return row._replace(reason=KNOWN_INSTANCE)
    if row.fate == "duplicate" and row.reason == SAME_PIXELS and row.instance in kept:
        return row._replace(reason=convert.REPEATED_INSTANCE)
    if row.fate == "kept":
        reused = row.instance in known or kept[row.instance] > 1
        found = (row.problems, REUSED_UID if reused else "", NEAR if row.series in near else "")
        problems = "; ".join(filter(None, found))
        return row._replace(problems=problems, reason=problems)
    return row


class NothingLeftError(DataError):
    """No file of the inputs is in the dataset, which therefore does not exist."""


def nothing_left(output: Path, rows: Sequence[FileRow]) -> NothingLeftError:
    """The error of a build that keeps nothing; writes manifest.parquet for it all the same."""
    manifest = pa.Table.from_pylist([row._asdict() for row in rows], _FILES_SCHEMA).select(list(MANIFEST_COLUMNS))
    files.write_table(output / shards.MANIFEST, manifest, private=True)
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        reasons[row.fate][row.reason] += 1
    return NothingLeftError(
        f"none of the {len(rows):,} files is a usable slice: {advice.in_words(advice.commonest(reasons, 4))}; "
        f"{output / shards.MANIFEST} has the reason of each file"
    )


def _index_schema(r: Request, tables: Mapping[str, pa.Table]) -> pa.Schema:
    schemas = [table.schema for table in tables.values() if len(table)]
    if r.before.additions:
        schemas.insert(0, pq.read_schema(r.output / shards.INDEX))
    schemas.append(pa.schema([(name, pa.string()) for name in ADDED_COLUMNS]))
    try:
        schema = pa.unify_schemas([s.remove_metadata() for s in schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"a label column holds numbers in one addition and text in another ({error}); rename it in the table"
        ) from error
    return schema.remove(schema.names.index(PATH)) if PATH in schema.names else schema


def _index_parts(
    r: Request, tables: Mapping[str, pa.Table], near: Mapping[str, str], counts: card.Counts
) -> Iterator[pa.Table]:
    """The index of the dataset and of this addition, part by part; each part is added to `counts`."""
    schema = _index_schema(r, tables)
    of_series = {
        entry.series: (entry.kind, entry.patient_from) for entry in r.entries if entry.series and not entry.fate
    }

    def rows() -> Iterator[pa.Table]:
        yield from _index_tables(r.output, r.before)
        for table in tables.values():
            if len(table):
                found = [(near.get(one, ""), *of_series[one]) for one in table["series"].to_pylist()]
                for name, column in zip(ADDED_COLUMNS, zip(*found, strict=True), strict=True):
                    table = table.append_column(name, pa.array(column, pa.string()))
                yield table

    for table in rows():
        columns = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.repeat("declared", len(table))
            if field.name == EVIDENCE
            else pa.nulls(len(table), field.type)
            for field in schema
        ]
        part = pa.Table.from_arrays(columns, schema=schema)
        counts.add(part)
        yield part


class _Manifest(NamedTuple):
    """What the rows of a manifest add up to.

    Attributes:
      fates: number of files by fate and reason.
      refused: series with a file whose values are not in the unit that its header says.
    """

    fates: dict[str, collections.Counter[str]]
    refused: set[str]


def _write_manifest(path: Path, private: Path, additions: int) -> _Manifest:
    """Every file that was ever an input with its last fate."""
    latest: dict[bytes, int] = {}
    for addition in range(additions):
        table = pq.read_table(folder_of(private, addition) / FILES, columns=["raw"])
        latest.update(dict.fromkeys(table["raw"].to_pylist(), addition))
    found = _Manifest(collections.defaultdict(collections.Counter), set())
    schema = pa.schema([(name, pa.string()) for name in MANIFEST_COLUMNS])

    def rows() -> Iterator[pa.Table]:
        for addition in range(additions):
            with pq.ParquetFile(folder_of(private, addition) / FILES) as file:
                for batch in file.iter_batches(_PART, columns=["raw", *MANIFEST_COLUMNS]):
                    table = pa.Table.from_batches([batch])
                    table = table.filter(pa.array([latest[raw] == addition for raw in table["raw"].to_pylist()]))
                    columns = (table[name].to_pylist() for name in ("fate", "reason", "series"))
                    for fate, reason, series in zip(*columns, strict=True):
                        found.fates[fate][reason] += 1
                        if fate == "excluded" and reason in units.REFUSED:
                            found.refused.add(series)
                    yield table.select(list(MANIFEST_COLUMNS)).cast(schema)

    files.write_tables(path, schema, rows(), private=True)
    return found


def _shard_row(report: ShardReport, addition: int) -> ShardRow:
    counts = None if set(report.slice_counts) <= {1} else list(report.slice_counts)
    return ShardRow(
        report.file, report.split, report.records, report.slices, report.bytes, report.sha256, report.largest[0],
        report.largest[1], counts, addition,
    )  # fmt: skip


def _shard_table(rows: Sequence[ShardRow], additions: int) -> pa.Table:
    types = {"slice_counts": pa.list_(pa.int32()), "addition": pa.int32()}
    table = {name: pa.array([getattr(row, name) for row in rows], types.get(name)) for name in ShardRow._fields}
    return pa.table(table).replace_schema_metadata({ADDITIONS: str(additions), shards.COUNT: str(len(rows))})


def _tfds_metadata(folder: Path, name: str, rows: Sequence[ShardRow]) -> None:
    # Imported here because it is slow and workers do not need it.
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import dataset_info, splits

    from data_pipeline import features

    infos = []
    for split in pseudonyms.SPLITS:
        part = [row for row in rows if row.split == split]
        if part:
            template = tfds.core.ShardedFileTemplate(
                dataset_name=name, data_dir=epath.Path(folder), split=split, filetype_suffix="array_record",
                template=shards.FILE_TEMPLATE,
            )  # fmt: skip
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[row.records for row in part], num_bytes=sum(row.bytes for row in part),
                    filename_template=template,
                )
            )  # fmt: skip
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features.features(), description="CT and MR slices, see card.json"
    )
    info.set_file_format("array_record")
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(folder)
