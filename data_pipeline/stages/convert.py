"""Third stage: one shard of the plan to one ArrayRecord file: spool, read, exclude, encode, pack.

Idempotent and independent of the engine: local processes, Beam or a Slurm array give the same bytes.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from curia_common.errors import DataError, StorageError, UserError, fault_location
from data_pipeline.format import codec, files, records, shards
from data_pipeline.format.files import Json
from data_pipeline.sources import archives, geometry, hu, object_stores, readers
from data_pipeline.sources.base import NO_MEMORY, Heartbeat, ImageFacts, ReadError, ReadRequest, Slice
from data_pipeline.sources.retry import retry_transient
from data_pipeline.sources.stored_values import stored_sha256
from data_pipeline.stages import assignment, card, exclusion, near_duplicates, reformat, units
from data_pipeline.stages.assignment import Conversion, PlannedFile, PlannedSeries, PlannedShard
from data_pipeline.stages.inventory import Labels
from data_pipeline.stages.pack import EncodedSlice, IndexRow, SeriesIdentity, Spool, Tally, align, intensities, pack
from data_pipeline.stages.statistics import slice_statistics

SAME_PIXELS = "the same pixels as another slice of the series"
REPEATED_INSTANCE = "the same instance was sent twice"
GONE = "an input can no longer be read; rerun the same command"
# Worst to best.
FATES = ("quarantined", "excluded", "duplicate", "kept")


# ---- what comes out of a shard


@dataclasses.dataclass(frozen=True)
class FileOutcome:
    """Outcome of an input file; the columns of manifest.parquet that the conversion knows.

    Attributes:
      reason: why it is not kept; of a kept file, what is wrong with its series.
      problems: of its series, whether kept or not.
      stored_sha256: first 16 hex digits, over all stored pixels; "" where they are not whole numbers.
      decoder: name of the library that decoded the pixels.
    """

    fate: str
    reason: str
    series: str
    split: str
    shard: str
    problems: str = ""
    stored_sha256: str = ""
    decoder: str = ""

    def with_problems(self, problems: Sequence[str]) -> "FileOutcome":
        """The outcome of a file of a series with these problems."""
        text = "; ".join(problems)
        return dataclasses.replace(self, problems=text, reason=text if self.fate == "kept" else self.reason)


@dataclasses.dataclass(frozen=True)
class SeriesSummary:
    """What the search for near-duplicates compares; `signature` is that of near_duplicates.signature, flat."""

    series: str
    part: int
    patient: str
    split: str
    modality: str
    plane: str
    signature: Sequence[int]


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """Content of a shard, and the outcome of its inputs. A shard in which nothing is left is a file with 0 records.

    Attributes:
      bytes: of the file.
      slice_counts: slices in each record.
      largest: greatest height and width, px.
      intensity: pixels per bin of the card's histograms, by their kind.
      series: one for each series of which something is kept.
      left_out: slices by the rule that left them out.
      files: by path.
    """

    file: str
    split: str
    records: int
    slices: int
    bytes: int
    sha256: str
    slice_counts: Sequence[int]
    largest: Sequence[int]
    intensity: Mapping[str, Sequence[int]]
    series: Sequence[SeriesSummary]
    left_out: Mapping[str, int]
    files: Mapping[str, FileOutcome]

    @classmethod
    def from_json(cls, value: Json) -> "ShardReport":
        given = {field.name: value[field.name] for field in dataclasses.fields(cls)}
        given["series"] = tuple(SeriesSummary(**one) for one in value["series"])
        given["files"] = {path: FileOutcome(**one) for path, one in value["files"].items()}
        return cls(**given)


def better_outcome(before: FileOutcome | None, outcome: FileOutcome) -> FileOutcome:
    """Of the outcomes of a file whose frames went to several parts of a series, the better one: kept if any slice is."""
    if before is None or FATES.index(outcome.fate) > FATES.index(before.fate):
        return outcome
    return before


# ---- one task


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards of a build share.

    Attributes:
      output, sidecars: dataset folder, and folder of the reports.
      scratch: folder on a local disk, where the output is not on one; else None.
      plan: its hash.
      lines: file of the plan with one line per shard.
    """

    output: str
    sidecars: str
    scratch: str | None
    plan: str
    lines: str
    conversion: Conversion


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard of a job; `at` is offset and length of its line in the plan, bytes."""

    job: Job
    at: tuple[int, int]


def publish(task: ShardTask, skip: Mapping[str, str], heartbeat: Heartbeat) -> str:
    """Converts one shard and writes its report; the work of one task of workers.run.

    Returns:
      The shard's file name. The folder of the sidecars then holds <name>.parquet (rows of the index, with the path of each
      slice's file) and, written last, <name>.json (the report).

    Raises:
      UserError: another plan has replaced the job's own, and as convert_shard.
    """
    job = task.job
    shard = assignment.read_shard(job.lines, task.at)

    def heartbeat_while_planned(item: str | None) -> None:
        heartbeat(item)
        if item is None and not os.path.exists(job.lines):  # seen on a remote machine after the build was started anew
            raise UserError(assignment.REPLACED)

    with _scratch(job) as scratch:
        report, index = convert_shard(job.output, job.conversion, shard, skip, heartbeat_while_planned, scratch)
    path = Path(job.sidecars, report.file)
    names = {name: None for row in index for name in row}  # some rows lack labels
    table = pa.table({name: [row.get(name) for row in index] for name in names})
    files.write_table(path.with_name(f"{path.name}.parquet"), table, private=True)
    content = {"plan": job.plan, "rows": len(index), **dataclasses.asdict(report)}
    files.write_text(path.with_name(f"{path.name}.json"), json.dumps(content), private=True)
    return report.file


def _scratch(job: Job) -> contextlib.AbstractContextManager[str | None]:
    """A scratch folder of this task's own, where the job has scratch space."""
    if job.scratch is None:
        return contextlib.nullcontext()
    parent = scratch_folder(job.scratch, job.output)
    os.makedirs(parent, mode=0o700, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent)


def scratch_folder(scratch: str, output: str) -> str:
    """Where all builds into one output have their temporary files."""
    return os.path.join(scratch, f"curia-{hashlib.sha256(os.fsencode(os.path.abspath(output))).hexdigest()[:16]}")


def convert_shard(
    folder: str, conversion: Conversion, shard: PlannedShard, skip: Mapping[str, str], heartbeat: Heartbeat,
    scratch: str | None = None,
) -> tuple[ShardReport, list[IndexRow]]:  # fmt: skip
    """Writes a shard.

    Args:
      folder: of the dataset.
      skip: files that must not be opened again, with the reason.
      heartbeat: called with each path before it is read, and with None after the last.
      scratch: a folder on a local disk for temporary files; None takes `folder`.

    Returns:
      The report, and the rows of index.parquet with the path of each slice's file.

    Raises:
      DataError: an input changed since the inventory.
      StorageError: an input cannot be read any more, or the scratch disk is full.
      OSError: the disk of the output is full.
    """
    name = shards.file_name(conversion.name, shard.split, shard.number)
    index: list[IndexRow] = []
    counts: list[int] = []
    largest = (0, 0)
    intensity = {kind: np.zeros(len(edges) - 1, np.int64) for kind, edges in card.EDGES.items()}
    summaries: list[SeriesSummary] = []
    left_out: collections.Counter[str] = collections.Counter()
    outcomes: dict[str, FileOutcome] = {}

    def items() -> Iterator[bytes]:
        nonlocal largest
        for series in shard.series:
            with Spool(Path(scratch or folder)) as spool:
                unpacked = archives.folder(folder)
                context = _Context(name, unpacked, scratch or unpacked, spool, conversion, skip, heartbeat)
                converted = _convert_series(series, context)
                for path, outcome in converted.outcomes.items():
                    outcomes[path] = better_outcome(outcomes.get(path), outcome)
                left_out.update(converted.tally.left_out)
                if converted.identity is None or converted.summary is None:
                    continue
                summaries.append(converted.summary)
                histograms = converted.tally.histograms
                kind, pixels = intensities(converted.identity.units, histograms)
                intensity[kind] += pixels
                per_record = conversion.slices_per_record
                for record in pack(converted.identity, converted.slices, histograms, per_record, spool):
                    where: IndexRow = {"split": shard.split, "shard": name, "record": len(counts)}
                    index.extend(where | row for row in record.rows)
                    counts.append(len(record.rows))
                    largest = (max(largest[0], record.shape[0]), max(largest[1], record.shape[1]))
                    yield record.data
        heartbeat(None)

    path = Path(folder, name)
    written, sha256 = shards.write(path, items(), Path(scratch) if scratch else None)
    report = ShardReport(
        file=name, split=shard.split, records=written, slices=sum(counts), bytes=path.stat().st_size, sha256=sha256,
        slice_counts=counts, largest=largest, intensity={kind: bins.tolist() for kind, bins in intensity.items()},
        series=summaries, left_out=dict(left_out), files=outcomes,
    )  # fmt: skip
    return report, index


# ---- one series


class _Context(NamedTuple):
    """Where and how a series is converted.

    Attributes:
      shard: file name.
      unpacked: folder of the copies of compressed archives.
      scratch: folder for temporary files.
      spool: of the series.
      skip, heartbeat: as in convert_shard.
    """

    shard: str
    unpacked: str
    scratch: str
    spool: Spool
    conversion: Conversion
    skip: Mapping[str, str]
    heartbeat: Heartbeat


class _ConvertedSeries(NamedTuple):
    """`slices` are in the order of their records; identity and summary are None where no slice is kept."""

    outcomes: dict[str, FileOutcome]
    tally: Tally
    slices: list[EncodedSlice]
    identity: SeriesIdentity | None = None
    summary: SeriesSummary | None = None


class _ConvertedFile(NamedTuple):
    """`facts` is None where the file was not read; `slices` are those that are kept."""

    outcome: FileOutcome
    slices: list[EncodedSlice]
    tally: Tally
    facts: ImageFacts | None = None


def _convert_series(series: PlannedSeries, context: _Context) -> _ConvertedSeries:
    tally, slices, facts = Tally(), [], None
    outcomes: dict[str, FileOutcome] = {}
    taken: set[int] = set()
    reused = False
    for file in series.files:
        if file.spare is not None and file.first in taken:
            found = _convert_file(file._replace(first=file.spare), series, tally.sources, context)
            reused |= bool(found.slices)
        else:
            found = _convert_file(file, series, tally.sources, context)
        if found.slices:
            taken.add(file.first)
        outcomes[file.path] = found.outcome
        slices += found.slices
        tally.add(found.tally)
        facts = found.facts or facts
    if not slices or facts is None:
        return _ConvertedSeries(outcomes, tally, [])
    if reused:
        # The plan took them for copies and gave them one place.
        problems = (*series.problems, geometry.REPEATED_POSITION)
        series = dataclasses.replace(series, problems=tuple(dict.fromkeys(problems)))
        slices = [one._replace(flags=one.flags | records.IRREGULAR) for one in slices]
        outcomes = {path: one.with_problems(series.problems) for path, one in outcomes.items()}
    judgement = _judge(series, facts, slices)
    slices = _leave_out(slices, judgement.reasons, outcomes, tally, context.spool)
    if not slices:
        return _ConvertedSeries(outcomes, tally, [])
    slices, tally.histograms = align(slices, tally.histograms, context.spool)
    if len(tally.histograms) > 1:
        series = dataclasses.replace(series, problems=(*series.problems, units.SEVERAL_SCALES))
        outcomes = {path: one.with_problems(series.problems) for path, one in outcomes.items()}
    identity = SeriesIdentity(
        series.series, series.patient, facts.modality, facts.units,
        series.plane if facts.plane is None else facts.plane,
        series.body_part if facts.body_part is None else facts.body_part,
        series.manufacturer if facts.manufacturer is None else facts.manufacturer,
        series.spacing if facts.spacing is None else facts.spacing, judgement.evidence,
    )  # fmt: skip
    shown = [context.spool.pixels(slices[number]) for number in near_duplicates.places(len(slices))]
    summary = SeriesSummary(
        series.series, series.part, series.patient, series.split, identity.modality, identity.plane,
        near_duplicates.signature(shown).ravel().tolist(),
    )  # fmt: skip
    directions = series.directions or facts.directions
    if context.conversion.planes and directions is not None and not series.problems:
        reformats, excluded = _reformat(slices, identity, directions, context)
        slices = slices + reformats
        tally.left_out.update(excluded)
    return _ConvertedSeries(outcomes, tally, slices, identity, summary)


def _judge(series: PlannedSeries, facts: ImageFacts, slices: Sequence[EncodedSlice]) -> units.Judgement:
    """How the units of a series are known, and which slices are not in them."""
    inferred = bool(slices[0].flags & records.MODALITY_INFERRED)
    known = [one.values for one in slices if one.values is not None]
    if series.kind == "image" or series.quantity or len(known) < len(slices):
        return units.Judgement("guessed" if inferred else "declared", [None] * len(slices))
    if facts.units == "HU":
        return units.judge_ct(known, inferred=inferred)
    return units.judge_mr(known, inferred=inferred)


def _leave_out(
    slices: Sequence[EncodedSlice],
    reasons: Sequence[str | None],
    outcomes: dict[str, FileOutcome],
    tally: Tally,
    spool: Spool,
) -> list[EncodedSlice]:
    """The slices without a reason; `tally` forgets the others, and `outcomes` says so of files of which none is left."""
    kept = [one for one, reason in zip(slices, reasons, strict=True) if reason is None]
    paths = {one.path for one in kept}
    for one, reason in zip(slices, reasons, strict=True):
        if reason is not None:
            tally.left_out[reason] += 1
            tally.sources.discard(one.source)
            if one.path not in paths:
                outcomes[one.path] = dataclasses.replace(outcomes[one.path], fate="excluded", reason=reason)
            if kept:
                tally.discount(one.scale, np.bincount(spool.pixels(one).ravel()))
    return kept


def _reformat(
    slices: Sequence[EncodedSlice], identity: SeriesIdentity, directions: assignment.Directions, context: _Context
) -> tuple[list[EncodedSlice], collections.Counter[str]]:
    """Slices in the other wanted planes, and how many were left out by which rule; none unless `slices` form a regular volume."""
    one = slices[0]
    steps = np.diff([each.position for each in slices])
    spacing = (float(np.median(steps)) if len(steps) else 0.0, *one.spacing)
    regular = (
        len({(each.shape, each.scale, each.spacing) for each in slices}) == 1
        and len(slices) >= geometry.MINIMUM_SLICES
        and identity.plane in reformat.PLANES
        and min(spacing) > 0
        and float(np.abs(steps - spacing[0]).max()) <= geometry.SPACING_TOLERANCE * spacing[0]
    )
    left_out: collections.Counter[str] = collections.Counter()
    if not regular:
        return [], left_out
    labels = one.labels if all(each.labels == one.labels for each in slices) else {}
    flags = records.REFORMATTED | (one.flags & (records.LOSSY | records.MODALITY_INFERRED))
    wanted = tuple(plane for plane in context.conversion.planes if plane != identity.plane)
    found, spool = [], context.spool
    with reformat.Stack(spool.folder, spacing, directions) as stack:
        for each in slices:
            stack.add(spool.pixels(each))
        for cut in stack.planes(wanted):
            item = Slice(
                cut.number, cut.pixels, *one.scale, cut.position, flags, stored_sha256(cut.pixels, context.conversion.digest),
                (stack.spacing, stack.spacing),
            )  # fmt: skip
            item = _reduce(item, context.conversion.size)
            histogram = np.bincount(item.pixels.ravel())
            reason = _exclude(item, histogram, identity.units)
            if reason is None:
                encoded = _encode(item, histogram, cut.number, labels, "", spool)
                found.append(encoded._replace(plane=cut.plane, step=stack.spacing))
            else:
                left_out[f"{reason} (reformatted)"] += 1
    return found, left_out


# ---- one file


def _convert_file(file: PlannedFile, series: PlannedSeries, seen: Collection[str], context: _Context) -> _ConvertedFile:
    """A file is taken whole or not at all."""
    heartbeat = context.heartbeat

    def read() -> _ConvertedFile:
        with archives.materialize(_object(file), file.member, context.unpacked, context.scratch, heartbeat) as path:
            return _read_file(file, path, series, seen, context)

    def quarantine(reason: str) -> _ConvertedFile:
        problems = "; ".join(series.problems)
        outcome = FileOutcome("quarantined", reason, series.series, series.split, context.shard, problems)
        return _ConvertedFile(outcome, [], Tally())

    if file.path in context.skip:
        return quarantine(context.skip[file.path])
    heartbeat(file.path)
    _check_unchanged(file)
    try:
        found = retry_transient(read, heartbeat, file.path)
    except UserError:
        raise
    except ReadError as error:
        found = quarantine(str(error))
    except MemoryError:
        found = quarantine(NO_MEMORY)
    except OSError as error:
        if object_stores.is_address(file.path) and error.errno in (errno.ENOENT, errno.EACCES):
            raise StorageError(GONE) from error  # the inventory could read it
        found = quarantine(f"cannot be read ({error.strerror})")
    except Exception as error:  # noqa: BLE001 - no file may end the build, whatever it holds
        found = quarantine(f"the reader failed on it ({fault_location(error)})")
    _check_unchanged(file)
    return found


def _check_unchanged(file: PlannedFile) -> None:
    # Paths can hold names, so the messages have none; the runner knows which file it is.
    try:
        unchanged = archives.is_unchanged(_object(file), file.member)
    except OSError as error:
        raise StorageError(GONE) from error
    if not unchanged:
        raise DataError(object_stores.CHANGED)


def _object(file: PlannedFile) -> object_stores.Object:
    return object_stores.Object(file.path, file.size, file.modified_ns)


def _read_file(
    file: PlannedFile, path: str, series: PlannedSeries, seen: Collection[str], context: _Context
) -> _ConvertedFile:
    """Reads a file; keeps the slices that no rule excludes and that are not in `seen`, the sources of the series' other files."""
    flags = records.IRREGULAR if set(series.problems) - {geometry.FEW} else 0
    flags |= records.LOSSY if file.lossy else 0
    spool = context.spool
    unit = "arbitrary" if series.quantity else None
    digest = context.conversion.digest
    request = ReadRequest(path, series.modality, str(spool.folder), file.frames, flags, digest, unit, file.tiles)
    tally = Tally()
    same = SAME_PIXELS if file.spare is None else REPEATED_INSTANCE
    found: list[tuple[int, str | None, EncodedSlice | None]] = []
    with readers.open_source(series.kind, request) as source:
        facts = source.facts
        for item in source.slices():
            item = _reduce(item, context.conversion.size)
            rows, columns = item.pixels.shape
            if max(rows, columns) > codec.LONGEST_SIDE:
                raise ReadError(f"{rows:,} x {columns:,} px; a side of a slice may have {codec.LONGEST_SIDE:,}")
            # Rules, statistics and the card's histograms follow from how many pixels have which value.
            histogram = np.bincount(item.pixels.ravel()) if item.histogram is None else item.histogram
            values = units.slice_values(item, histogram, lossy=file.lossy) if facts.modality in ("CT", "MR") else None
            reason = _exclude(item, histogram, facts.units, values) or (same if item.source in seen else None)
            encoded = None
            if reason is None:
                encoded = _encode(item, histogram, file.first + item.rank, file.labels, file.path, spool)
                encoded = encoded._replace(values=values)
                tally.count(encoded.scale, histogram)
            found.append((item.rank, reason, encoded))
    fate, last_reason = "excluded", source.excluded
    kept: list[EncodedSlice] = []
    for _, reason, encoded in sorted(found, key=lambda each: each[0]):
        if encoded is not None and encoded.source in tally.sources:
            # Which of two equal frames comes first in space is known only now.
            reason = same
            tally.discount(encoded.scale, np.bincount(spool.pixels(encoded).ravel()))
        if reason is None and encoded is not None:
            tally.sources.add(encoded.source)
            kept.append(encoded)
        elif reason is not None:
            fate, last_reason = ("duplicate" if reason == same else "excluded"), reason
            tally.left_out[reason] += 1
    problems = "; ".join(series.problems)
    if kept:
        fate, last_reason = "kept", problems
    outcome = FileOutcome(
        fate, last_reason, series.series, series.split, context.shard, problems, source.stored_sha256, source.decoder
    )
    return _ConvertedFile(outcome, kept, tally, source.facts)


def _exclude(
    item: Slice, histogram: Int[np.ndarray, " levels"], unit: str, known: units.SliceValues | None = None
) -> str | None:
    """The rule that leaves a slice out, or None."""
    stored = np.flatnonzero(histogram)
    to_hu = (item.slope, item.intercept) if unit == "HU" else None
    reason = exclusion.exclude_pixels(item.pixels, stored, histogram[stored], to_hu)
    if reason == exclusion.ALL_AIR and known is not None and hu.contradicts(known.profile):
        return units.NO_HU  # an intercept that is applied twice leaves nothing above air
    return reason


def _reduce(item: Slice, size: int | None) -> Slice:
    """Antialiased reduction to a longer side of `size` px; smaller slices stay as they are."""
    rows, columns = item.pixels.shape
    if size is None or max(rows, columns) <= size:
        return item
    height, width = (max(1, round(n * size / max(rows, columns))) for n in (rows, columns))
    pixels = reformat.resize(item.pixels, (height, width))
    spacing = (item.spacing[0] * rows / height, item.spacing[1] * columns / width)
    share = height * width / (rows * columns)
    return dataclasses.replace(
        item, pixels=pixels, spacing=spacing, flags=item.flags | records.RESIZED, padded=round(item.padded * share),
        histogram=None, below=tuple((value, round(count * share)) for value, count in item.below),
    )  # fmt: skip


def _encode(
    item: Slice, histogram: Int[np.ndarray, " levels"], index: int, labels: Labels, path: str, spool: Spool
) -> EncodedSlice:
    rows, columns = item.pixels.shape
    return EncodedSlice(
        spool.add(codec.encode(item.pixels)), (rows, columns), index, item.position, (item.slope, item.intercept), item.flags,
        item.source, item.spacing, slice_statistics(item.pixels, item.slope, item.intercept, histogram), labels, path,
    )  # fmt: skip
