"""Second stage: which series goes to which shard. The plan is written once and never changed; its hash names it.

A plan holds pseudonyms, technical facts and paths; paths make it private to the site, so it stays in the hidden folder
`.build` of the output, readable by its owner alone. It is kept as a file with a line for each shard, of which whoever converts
a shard reads that line alone, and plan.json, which says where the lines are.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curia_common.errors import UserError
from data_pipeline.format import files
from data_pipeline.format.shards import MOST_SHARDS
from data_pipeline.sources import geometry
from data_pipeline.stages import pseudonyms, reformat
from data_pipeline.stages.inventory import Entry


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the plan.

    Attributes:
      key: for splits and order.
      validation, test: shares of the patients.
      shard_bytes: input bytes that one shard is meant to hold.
      held_out: pseudonyms of patients that must not be in the dataset.
      conversion: settings of the conversion stage; they are part of the plan's hash.
      first: by split, the number of its first shard; 0 unless the dataset has shards already.
      instances: pseudonyms of the DICOM instances that the dataset has already.
      splits: of the patients that the dataset has already.
      continued: of series that the dataset has already, the number of the next slice.
    """

    key: bytes
    validation: float
    test: float
    shard_bytes: int
    held_out: frozenset[str]
    conversion: Mapping[str, Any]
    first: Mapping[str, int] = dataclasses.field(default_factory=dict)
    instances: frozenset[str] = frozenset()
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    continued: Mapping[str, int] = dataclasses.field(default_factory=dict)


# Raised when shards, or what is kept beside them, come out differently from the same plan.
FORMAT = 3
HELD_OUT = "patient is held out"
CONTINUED = "other slices of the series were added before"
# Small datasets get several shards too, so that several processes can write and read them.
SMALL_SHARDS = 4


def settings(key: bytes, validation: float, test: float, conversion: Mapping[str, Any]) -> dict[str, Any]:
    """What all additions to a dataset have in common; it tells keys apart and gives none away."""
    name = pseudonyms.digest(key, "key", "")
    return {"key": name, "validation": validation, "test": test, "format": FORMAT, **conversion}


def make(entries: Sequence[Entry], options: Options) -> tuple[dict[str, Any], list[Entry]]:
    """The plan, and the entries with duplicates and held-out patients marked.

    Returns:
      {"hash", "format", "settings", "conversion", "shards": [{"split", "number", "series": [series, …]}, …]}, where a series
      has its pseudonyms, split, facts and files in spatial order, each with the frames that belong to it.

    Raises:
      UserError: a patient of the dataset is to be in another split now, or there are more shards than TFDS can name.
    """
    result = list(entries)
    best: dict[str, Entry] = {}
    for number, entry in enumerate(result):
        if not entry.fate and entry.patient in options.held_out:
            entry = entry.with_fate("excluded", HELD_OUT)
        instance = entry.facts.instance
        if not entry.fate and instance in options.instances:
            entry = entry.with_fate("duplicate", "the same instance is in the dataset already")
        # Of several copies the largest file is taken: a transfer that broke off left a smaller one.
        if not entry.fate and instance and (instance not in best or entry.size > best[instance].size):
            best[instance] = entry
        result[number] = entry
    by_series: dict[str, list[Entry]] = defaultdict(list)
    for number, entry in enumerate(result):
        if entry.fate:
            continue
        if best.get(entry.facts.instance, entry) is not entry:
            result[number] = entry.with_fate("duplicate", "the same instance was sent twice")
            continue
        by_series[entry.series].append(entry)

    series_by_split: dict[str, list[dict[str, Any]]] = defaultdict(list)
    split_of: dict[str, str] = {}
    for members in by_series.values():
        patient = members[0].patient
        before = options.splits.get(patient, "")
        if before and members[0].split not in ("", before):
            raise UserError(
                f"the label table puts a patient into {members[0].split} who is in {before} in the dataset already; correct the table or build into a new --output"
            )
        split = (
            members[0].split or before or pseudonyms.split_of(options.key, patient, options.validation, options.test)
        )
        split_of |= {entry.path: split for entry in members}
        series_by_split[split].extend(_series(members, split, options.continued.get(members[0].series, 0)))

    shards = []
    for split in pseudonyms.SPLITS:
        items = series_by_split.get(split, [])
        # The keyed hash is the global shuffle: neighbours in a shard are strangers.
        items.sort(key=lambda s: (pseudonyms.digest(options.key, "order", s["series"]), s["part"]))
        total = sum(s["bytes"] for s in items)
        count = min(len(items), max(SMALL_SHARDS, -(-total // options.shard_bytes)))
        first = options.first.get(split, 0)
        if first + count > MOST_SHARDS:
            raise UserError(
                f"{split} would have {first + count:,} shards, TFDS names {MOST_SHARDS:,} at most; raise --shard-mb"
            )
        for number in range(count):
            part = items[len(items) * number // count : len(items) * (number + 1) // count]
            shards.append({"split": split, "number": first + number, "series": part})
    common = settings(options.key, options.validation, options.test, options.conversion)
    plan = {"format": FORMAT, "settings": common, "conversion": dict(options.conversion)}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for shard in shards:
        digest.update(_line(shard))
    result = [dataclasses.replace(entry, split=split_of.get(entry.path, entry.split)) for entry in result]
    return {"hash": digest.hexdigest(), **plan, "shards": shards}, result


# ---- on the disk

PLAN = "plan.json"


def _line(shard: Mapping[str, Any]) -> bytes:
    return json.dumps(shard).encode() + b"\n"  # in the order in which it was made: labels stay as the table has them


def lines_of(folder: Path, name: str) -> Path:
    """The file with a line for each shard of the plan with this hash. The name tells a worker that another plan took its place."""
    return folder / f"plan-{name[:16]}.jsonl"


def write(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps a plan and returns what plan.json has of it: of each shard split, number, how many files it has, and its place.

    Raises:
      OSError: the disk is full.
    """
    places, end = [], 0
    with files.written(lines_of(folder, made["hash"]), private=True) as file:
        for shard in made["shards"]:
            line = _line(shard)
            count = sum(len(series["files"]) for series in shard["series"])
            places.append({"split": shard["split"], "number": shard["number"], "files": count, "at": [end, len(line)]})
            file.write(line)
            end += len(line)
    short = {**made, "shards": places}
    files.write_text(folder / PLAN, json.dumps(short, sort_keys=True), private=True)
    return short


def read(folder: Path) -> dict[str, Any] | None:
    """What plan.json says, or None where there is no plan."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    return None


def read_shard(lines: str | Path, at: Sequence[int]) -> dict[str, Any]:
    """One shard of a plan.

    Args:
      at: where its line begins, and how long it is.

    Raises:
      UserError: the plan is there no more.
    """
    try:
        with open(lines, "rb") as file:
            file.seek(at[0])
            return json.loads(file.read(at[1]))
    except FileNotFoundError as error:
        raise UserError(REPLACED) from error


REPLACED = "the plan of this build is gone: another build has taken its place; start this one again"


def _series(members: list[Entry], split: str, start: int) -> list[dict[str, Any]]:
    """A series, or its parts where it has several orientations; its slices are numbered from `start`."""
    one = members[0]
    common = {"series": one.series, "patient": one.patient, "split": split, "kind": one.kind, "part": 0}
    if one.kind != "dicom":
        return [
            common | {"part": n, "plane": "unknown", "spacing": 0.0, "problems": [], "bytes": e.size, "facts": {"modality": e.facts.modality},
                      "files": [_file(e, 0)]}
            for n, e in enumerate(members)
        ]  # fmt: skip
    members.sort(key=lambda e: e.facts.instance)  # names and the order of arrival do not matter
    frames = [(entry, number) for entry in members for number in range(entry.facts.frames)]
    facts = [entry.facts.geometry[number] for entry, number in frames]
    parts = geometry.check([f.orientation for f in facts], [f.position for f in facts])
    result = []
    first = start
    for number, part in enumerate(parts):
        # In spatial order; the frames of one file stay together, so that no file is decoded twice.
        by_file: dict[str, tuple[Entry, list[Any]]] = {}
        for index, along in zip(part.order, part.positions, strict=True):
            entry, frame = frames[index]
            by_file.setdefault(entry.path, (entry, []))[1].append([frame, along])
        files = []
        for entry, places in by_file.values():
            files.append(_file(entry, first, places))
            first += len(places)
        result.append(
            common
            | {
                "part": number,
                "plane": part.plane,
                "spacing": part.spacing or members[0].facts.thickness,
                "along": _along(facts[part.order[0]].orientation),
                "problems": [*part.problems, *((CONTINUED,) if start else ())],
                "bytes": sum(e.size for e in members) // len(parts),
                "facts": {k: getattr(members[0].facts, k) for k in ("modality", "body_part", "manufacturer")},
                "files": files,
            }  # fmt: skip
        )
    return result


def _along(orientation: Any) -> Any:
    found = reformat.directions(tuple(orientation)) if orientation is not None else None
    return [list(one) for one in found] if found else None


def _file(entry: Entry, first: int, frames: Sequence[Any] = ()) -> dict[str, Any]:
    """What the conversion has to know of a file: size and time tell whether it changed under the build; `first` is the
    number within the series of its first slice; `member` is where it lies in an archive."""
    file = {
        "path": entry.path, "size": entry.size, "modified_ns": entry.modified_ns, "first": first, "frames": list(frames),
        "lossy": entry.facts.lossy, "labels": entry.labels,
    }  # fmt: skip
    return file | ({"member": entry.member} if entry.member else {})
