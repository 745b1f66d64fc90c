"""Second stage: which series goes to which shard. The plan is written once and never changed; its hash names it.

A plan holds pseudonyms, technical facts and paths; paths make it private to the site, so it stays in the hidden folder
`.build` of the output, readable by its owner alone.
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline import geometry, pseudonyms
from data_pipeline.inventory import Entry


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the plan.

    Attributes:
      key: for splits and order.
      validation, test: shares of the patients.
      shard_bytes: input bytes that one shard is meant to hold.
      held_out: pseudonyms of patients that must not be in the dataset.
      conversion: settings of the conversion stage; they are part of the plan's hash.
    """

    key: bytes
    validation: float
    test: float
    shard_bytes: int
    held_out: frozenset[str]
    conversion: Mapping[str, Any]


# Raised when shards, or what is kept beside them, come out differently from the same plan.
FORMAT = 2
# Small datasets get several shards too, so that several processes can write and read them.
SMALL_SHARDS = 4


def make(entries: Sequence[Entry], options: Options) -> dict[str, Any]:
    """The plan; marks duplicates and held-out patients in `entries`.

    Returns:
      {"hash": …, "format": …, "conversion": …, "shards": [{"split", "number", "count", "series": [series, …]}, …]}, where a series has
      its pseudonyms, split, facts and files in spatial order, each with the frames that belong to it.
    """
    best: dict[str, Entry] = {}
    for entry in entries:
        if not entry.fate and entry.patient in options.held_out:
            entry.fate, entry.reason = "excluded", "patient is held out"
        instance = entry.facts.get("sop")
        # Of several copies the largest file is taken: a transfer that broke off left a smaller one.
        if not entry.fate and instance is not None and (instance not in best or entry.size > best[instance].size):
            best[instance] = entry
    by_series: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.fate:
            continue
        if best.get(entry.facts.get("sop", ""), entry) is not entry:
            entry.fate, entry.reason = "duplicate", "the same instance was sent twice"
            continue
        by_series[entry.series].append(entry)

    series_by_split: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for members in by_series.values():
        split = members[0].split or pseudonyms.split_of(
            options.key, members[0].patient, options.validation, options.test
        )
        for entry in members:
            entry.split = split
        series_by_split[split].extend(_series(members, split))

    shards = []
    for split in pseudonyms.SPLITS:
        items = series_by_split.get(split, [])
        # The keyed hash is the global shuffle: neighbours in a shard are strangers.
        items.sort(key=lambda s: (pseudonyms.digest(options.key, "order", s["series"]), s["part"]))
        total = sum(s["bytes"] for s in items)
        count = min(len(items), max(SMALL_SHARDS, -(-total // options.shard_bytes)))
        for number in range(count):
            part = items[len(items) * number // count : len(items) * (number + 1) // count]
            shards.append({"split": split, "number": number, "count": count, "series": part})
    plan = {"format": FORMAT, "conversion": dict(options.conversion), "shards": shards}
    return {"hash": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(), **plan}


def _series(members: list[Entry], split: str) -> list[dict[str, Any]]:
    """A series, or its parts where it has several orientations."""
    one = members[0]
    common = {"series": one.series, "patient": one.patient, "split": split, "kind": one.kind, "part": 0}
    if one.kind != "dicom":
        return [
            common | {"part": n, "plane": "unknown", "spacing": 0.0, "problems": [], "bytes": e.size, "facts": e.facts,
                      "files": [_file(e, 0)]}
            for n, e in enumerate(members)
        ]  # fmt: skip
    members.sort(key=lambda e: e.facts["sop"])  # names and the order of arrival do not matter
    frames = [(entry, number) for entry in members for number in range(entry.facts["frames"])]
    facts = [entry.facts["geometry"][number] for entry, number in frames]
    parts = geometry.check([f["orientation"] for f in facts], [f["position"] for f in facts])
    result = []
    first = 0
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
                "spacing": part.spacing or members[0].facts["thickness"],
                "problems": list(part.problems),
                "bytes": sum(e.size for e in members) // len(parts),
                "facts": {k: members[0].facts[k] for k in ("modality", "body_part", "manufacturer")},
                "files": files,
            }  # fmt: skip
        )
    return result


def _file(entry: Entry, first: int, frames: Sequence[Any] = ()) -> dict[str, Any]:
    """What the conversion has to know of a file: size and time tell whether it changed under the build; `first` is the
    number within the series of its first slice; `member` is where it lies in an archive."""
    file = {
        "path": entry.path, "size": entry.size, "modified_ns": entry.modified_ns, "first": first, "frames": list(frames),
        "lossy": bool(entry.facts.get("lossy")), "labels": entry.labels,
    }  # fmt: skip
    return file | ({"member": entry.member} if entry.member else {})
