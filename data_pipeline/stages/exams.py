"""Exams as slices without a dataset: the inventory, plan and conversion of a build, a few series at a time.

What a build would leave out is left out here too, for the same reasons. Slices of a group of series lie in a temporary folder in the
form of a dataset while they are in use.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from curia_common import progress
from data_pipeline import workers
from data_pipeline.format import files, shards
from data_pipeline.format.shards import ShardRow, SliceSource
from data_pipeline.sources import archives, dicom_pixels
from data_pipeline.sources.base import Heartbeat
from data_pipeline.stages import assignment, convert, inventory
from data_pipeline.stages.assignment import Conversion, PlannedSeries, PlannedShard

SPLIT = "test"  # that all series are in
CONVERSION = Conversion(name="exams", keep_maps=False)
GROUP_BYTES = 64 << 20  # of input files that are converted together


@dataclasses.dataclass(frozen=True)
class Options:
    """How exams are read; see data_pipeline.build, whose options these are.

    Attributes:
      folder: private, for temporary files.
      key: for pseudonyms.
    """

    folder: Path
    key: bytes
    modality: str = "auto"
    workers: int = 1
    timeout: int | float = 60.0
    memory_gb: int | float = 4.0
    unpack_gb: int = 100


class FileOutcome(NamedTuple):
    """What became of an input file; `fate` as in the manifest of a build."""

    fate: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Exam:
    """A series, all of its orientations.

    Attributes:
      identity: digest of its files, as the inventory saw them, and of how they are read.
      series, patient: pseudonyms.
      path: of its file, or of the folder that all of its files are in.
    """

    identity: str
    series: str
    patient: str
    path: str
    parts: tuple[PlannedSeries, ...]

    @classmethod
    def of(cls, parts: Sequence[PlannedSeries]) -> "Exam":
        text = json.dumps([part.to_json() for part in parts], sort_keys=True)
        paths = [file.path for part in parts for file in part.files]
        path = paths[0]
        if len(paths) > 1:
            path = os.path.commonpath([os.path.dirname(one) for one in paths])
        identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(identity, parts[0].series, parts[0].patient, path, tuple(parts))

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Found:
    """What is below the inputs.

    Attributes:
      exams: in an order that depends on the key alone.
      files: all of them, sorted; those of exams have no outcome yet.
    """

    exams: tuple[Exam, ...]
    files: Mapping[str, FileOutcome | None]


class Group(NamedTuple):
    """Some exams, converted.

    Attributes:
      slices: None where no slice is left of any of them.
      files: outcomes of their files.
    """

    exams: tuple[Exam, ...]
    slices: SliceSource | None
    files: Mapping[str, FileOutcome]


def find(inputs: Sequence[str], options: Options, leave_out: Collection[str] = ()) -> Found:
    """Exams below the inputs, by their headers.

    Args:
      inputs: files, folders, archives and buckets.
      leave_out: files that are not part of the input.

    Raises:
      UserError: an input does not exist.
      DataError: there is no file.
      StorageError: a folder or a bucket cannot be listed at the moment.
    """
    dicom_pixels.check_plugins()
    unwanted = {os.path.realpath(path) for path in leave_out}
    found = inventory.find_files(inputs, leave_out=str(options.folder))
    found = [one for one in found if os.path.realpath(inventory.path_of(one)) not in unwanted]
    wishes = inventory.Options(
        key=options.key, modality=options.modality, unpacked=archives.folder(options.folder), unpack_gb=options.unpack_gb,
    )  # fmt: skip

    def run(label: str, items: int, function: workers.Work, tasks: Sequence[Any]) -> list[Any]:
        results: dict[int, Any] = {}
        with progress.Progress(label, items) as counter:
            for message in _run(function, tasks, options):
                if isinstance(message, workers.Done):
                    results[message.number] = message.result
                else:
                    counter.step()
        return [results[number] for number in sorted(results)]

    entries = assignment.split_kinds(inventory.take(found, wishes, run), options.key)
    plan, entries = assignment.make(entries, assignment.Options(
        key=options.key, validation=0.0, test=1.0, shard_bytes=GROUP_BYTES, held_out=frozenset(), conversion=CONVERSION,
    ))  # fmt: skip
    series = itertools.groupby((one for shard in plan.shards for one in shard.series), key=lambda one: one.series)
    return Found(
        tuple(Exam.of(list(parts)) for _, parts in series),
        {
            entry.path: FileOutcome(entry.fate, entry.reason) if entry.fate else None
            for entry in sorted(entries, key=lambda entry: entry.path)
        },
    )


def read(exams: Sequence[Exam], options: Options) -> Iterator[Group]:
    """Converts exams on local workers, a group at a time. The slices of a group are there until the next one is asked for.

    Raises:
      TaskError: a file changed since it was found, the disk is full, or memory ran out.
    """
    tasks = [(str(options.folder), number, group) for number, group in enumerate(_groups(exams, options.workers))]
    for leftover in options.folder.glob("group-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for message in _run(_convert, tasks, options):
        if isinstance(message, workers.Done):
            _, number, group = tasks[message.number]
            records, outcomes = message.result
            place = _place(options.folder, number)
            yield Group(tuple(group), SliceSource(place, SPLIT) if records else None, outcomes)
            shutil.rmtree(place, ignore_errors=True)


def _run(function: workers.Work, tasks: Sequence[Any], options: Options) -> Iterator[workers.Progress | workers.Done]:
    count = max(1, min(options.workers, len(tasks)))
    memory = int(options.memory_gb * 1e9)
    return workers.run(function, tasks, workers=count, timeout=options.timeout, memory=memory)


def _groups(exams: Sequence[Exam], count: int) -> list[list[Exam]]:
    """Groups of about GROUP_BYTES, and at least a few for each worker where there are exams enough."""
    target = min(GROUP_BYTES, sum(exam.bytes for exam in exams) // (4 * count))
    groups: list[list[Exam]] = []
    size = 0
    for exam in exams:
        if not groups or size > target:
            groups.append([])
            size = 0
        groups[-1].append(exam)
        size += exam.bytes
    return groups


def _place(folder: Path, number: int) -> Path:
    return folder / f"group-{number:06d}"


def _convert(
    task: tuple[str, int, Sequence[Exam]], skip: Mapping[str, str], heartbeat: Heartbeat
) -> tuple[int, dict[str, FileOutcome]]:
    """Converts a group; the work of one task of workers.run. Returns how many records there are, and what became of its files."""
    folder, number, group = task
    shard = PlannedShard(SPLIT, number, tuple(part for exam in group for part in exam.parts))
    report, rows = convert.convert_shard(folder, CONVERSION, shard, skip, heartbeat)
    outcomes = {path: FileOutcome(one.fate, one.reason) for path, one in report.files.items()}
    written = Path(folder, report.file)
    if not report.records:
        written.unlink()
        return 0, outcomes
    place = _place(Path(folder), number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    written.rename(place / report.file)
    row = ShardRow(
        report.file, SPLIT, report.records, report.slices, report.bytes, report.sha256, report.largest[0], report.largest[1], None, 0
    )  # fmt: skip
    files.write_table(place / shards.SHARDS, pa.Table.from_pylist([row._asdict()]), private=True)
    files.write_table(place / shards.INDEX, pa.Table.from_pylist(rows), private=True)
    return report.records, outcomes
