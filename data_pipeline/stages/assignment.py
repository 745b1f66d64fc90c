"""Second stage: which series goes to which shard. The plan is written once and never changed; its hash identifies it.

A plan holds pseudonyms, technical facts and paths. Paths make it private to the site, so it stays in the hidden folder
`.build` of the output, readable by its owner alone. On disk it is a file with one line per shard, of which a worker reads
its own line alone, and plan.json, which says where each line is.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curia_common.errors import UserError
from data_pipeline.format import codec, files
from data_pipeline.format.files import Json
from data_pipeline.format.shards import MOST_SHARDS
from data_pipeline.sources import geometry
from data_pipeline.sources.archives import Member
from data_pipeline.sources.dicom_header import FrameGeometry
from data_pipeline.sources.stored_values import DigestKind
from data_pipeline.stages import exclusion, pseudonyms, reformat
from data_pipeline.stages.inventory import Entry, Labels

Directions = tuple[geometry.Direction, geometry.Direction, geometry.Direction]
# Raised when the same plan gives different shards, or different files beside them.
FORMAT = 3
HELD_OUT = "patient is held out"
CONTINUED = "other slices of the series were added before"
# Small datasets get several shards too, so that several processes can write and read them.
SMALL_SHARDS = 4


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Settings of the conversion; they are part of the plan's hash.

    Attributes:
      name: dataset name, with which shard names start.
      size: longer side to which larger slices are reduced, px; None keeps the native size.
      slices_per_record: neighbours of a series stored together.
      planes: planes into which regular series are reformatted too.
      drop_faces, drop_lossy: leave out series that may show a face, and slices that were compressed with loss.
      digest: how stored values become digests; all additions to a dataset have one.
      keep_maps: keep maps of a quantity.
    """

    name: str
    size: int | None = None
    slices_per_record: int = 1
    codec: int = codec.DELTA
    planes: tuple[str, ...] = ()
    drop_faces: bool = False
    drop_lossy: bool = False
    digest: DigestKind = "smallest"
    keep_maps: bool = False

    @classmethod
    def from_json(cls, value: Json) -> "Conversion":
        """Plans of older versions lack the later fields."""
        found: Json = {field.name: value[field.name] for field in dataclasses.fields(cls) if field.name in value}
        found["planes"] = tuple(value.get("planes", ()))
        found.setdefault("digest", "int64")
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all additions to a dataset have in common.

    Attributes:
      key: a digest that tells keys apart and reveals none.
      validation, test: shares of the patients.
    """

    key: str
    validation: float
    test: float
    conversion: Conversion
    format: int = FORMAT

    def to_json(self) -> Json:
        flat = dataclasses.asdict(self)
        return {name: value for name, value in flat.items() if name != "conversion"} | flat["conversion"]

    @classmethod
    def from_json(cls, value: Json) -> "Settings":
        conversion = Conversion.from_json(value)
        return cls(value["key"], value["validation"], value["test"], conversion, value["format"])


def settings(key: bytes, validation: float, test: float, conversion: Conversion) -> Settings:
    """The settings of a build under this key."""
    return Settings(pseudonyms.digest(key, "key", ""), validation, test, conversion)


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the plan.

    Attributes:
      key: for splits and order.
      validation, test: shares of the patients.
      shard_bytes: input bytes that one shard should hold.
      held_out: pseudonyms of patients that must not be in the dataset.
      first: by split, the number of its first shard; 0 unless the dataset has shards already.
      splits: of the patients that the dataset has already.
      continued: of series that the dataset has already, the number of the next slice.
    """

    key: bytes
    validation: float
    test: float
    shard_bytes: int
    held_out: frozenset[str]
    conversion: Conversion
    first: Mapping[str, int] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    continued: Mapping[str, int] = dataclasses.field(default_factory=dict)


# ---- the plan


class PlannedFile(NamedTuple):
    """What the conversion needs to know of an input file.

    Attributes:
      size, modified_ns: by which a file that changed during the build is noticed.
      first: number within the series of its first slice.
      frames: of a DICOM file, the wanted frames in spatial order: number and mm along the normal.
      lossy: it was compressed with loss.
      member: where it lies in an archive.
      spare: of a further file with the UID and the place of the instance before it, the number of its first slice in case
        both are kept; None of all other files. Only the pixels tell a copy from another image.
      tiles: slices of a mosaic, which are the frames; else 0.
    """

    path: str
    size: int
    modified_ns: int
    first: int
    frames: tuple[tuple[int, float], ...]
    lossy: bool
    labels: Labels
    member: Member | None = None
    spare: int | None = None
    tiles: int = 0

    def to_json(self) -> Json:
        left_out = self._field_defaults  # plans of earlier versions lack them
        return {
            name: value for name, value in self._asdict().items() if name not in left_out or value != left_out[name]
        }

    @classmethod
    def from_json(cls, value: Json) -> "PlannedFile":
        frames = tuple((number, along) for number, along in value["frames"])
        member = Member(*value["member"]) if "member" in value else None
        return cls(**(value | {"frames": frames, "member": member}))


@dataclasses.dataclass(frozen=True)
class PlannedSeries:
    """A series, or the part of one that has a single orientation.

    Attributes:
      series, patient: pseudonyms.
      kind: "dicom", "volume" or "image".
      plane, spacing: as the headers say, mm between slices; "unknown" and 0 where only the pixels file tells.
      directions: patient axis and sense of slices, rows and columns; None where reformatting cannot use them.
      problems: what makes it irregular; see sources.geometry.
      bytes: of its input files.
      modality, body_part, manufacturer: as the headers say.
      files: in spatial order.
      quantity: what a map measures; "" for HU and the signal of MR.
    """

    series: str
    patient: str
    split: str
    kind: str
    part: int
    plane: str
    spacing: float
    problems: tuple[str, ...]
    bytes: int
    modality: str
    body_part: str
    manufacturer: str
    directions: Directions | None
    files: tuple[PlannedFile, ...]
    quantity: str = ""

    def to_json(self) -> Json:
        """In the order of the fields that existing plans have, because their hash depends on it."""
        dicom = self.kind == "dicom"
        names = ("series", "patient", "split", "kind", "part", "plane", "spacing")
        value: Json = {name: getattr(self, name) for name in names}
        if dicom:
            value["along"] = self.directions
        facts = {"modality": self.modality}
        if dicom:
            facts |= {"body_part": self.body_part, "manufacturer": self.manufacturer}
        if self.quantity:
            facts["quantity"] = self.quantity
        return value | {
            "problems": self.problems, "bytes": self.bytes, "facts": facts, "files": [file.to_json() for file in self.files],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Json) -> "PlannedSeries":
        rest = {name: v for name, v in value.items() if name not in ("along", "problems", "facts", "files")}
        along = value.get("along")
        return cls(
            **rest, problems=tuple(value["problems"]), modality=value["facts"]["modality"],
            body_part=value["facts"].get("body_part", ""), manufacturer=value["facts"].get("manufacturer", ""),
            directions=(tuple(along[0]), tuple(along[1]), tuple(along[2])) if along else None,
            files=tuple(map(PlannedFile.from_json, value["files"])), quantity=value["facts"].get("quantity", ""),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard of a plan: its number within the split, and the series that go into it."""

    split: str
    number: int
    series: tuple[PlannedSeries, ...]

    def to_line(self) -> bytes:
        """A line of JSON. Keys are not sorted: labels stay in the order of the label table."""
        series = [one.to_json() for one in self.series]
        return json.dumps({"split": self.split, "number": self.number, "series": series}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "PlannedShard":
        value = json.loads(line)
        return cls(value["split"], value["number"], tuple(map(PlannedSeries.from_json, value["series"])))


class ShardPlace(NamedTuple):
    """Where the line of a shard is in the file of the plan.

    Attributes:
      files: how many input files the shard has.
      at: offset and length of the line, bytes.
    """

    split: str
    number: int
    files: int
    at: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan as it is made; `hash` covers the settings and every shard."""

    hash: str
    settings: Settings
    shards: tuple[PlannedShard, ...]


@dataclasses.dataclass(frozen=True)
class StoredPlan:
    """A plan on disk: everything but the shards themselves, whose lines are read one by one."""

    hash: str
    settings: Settings
    shards: tuple[ShardPlace, ...]


def make(entries: Sequence[Entry], options: Options) -> tuple[Plan, list[Entry]]:
    """The plan, and the entries in the same order with what it decided: held out, or the split.

    Raises:
      UserError: the label table moves a patient of the dataset to another split, or there are more shards than TFDS can name.
    """
    entries = [
        entry.with_fate("excluded", HELD_OUT) if not entry.fate and entry.patient in options.held_out else entry
        for entry in entries
    ]
    by_series: dict[str, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        if not entry.fate:
            by_series[entry.series].append(number)
    series_by_split: dict[str, list[PlannedSeries]] = defaultdict(list)
    for numbers in by_series.values():
        members = [entries[number] for number in numbers]
        layout = _lay_out(members) if members[0].kind == "dicom" else None
        start = options.continued.get(members[0].series, 0)
        # What comes later to a series of the dataset can be few slices without being a localizer.
        reason = layout.excluded() if layout is not None and not start else None
        if reason is not None:
            for number in numbers:
                entries[number] = entries[number].with_fate("excluded", reason)
            continue
        localizers = layout.localizers() if layout is not None and not start else frozenset()
        if localizers:
            for number in numbers:
                if entries[number].path in localizers:
                    entries[number] = entries[number].with_fate("excluded", exclusion.LOCALIZER_AMONG_AXIAL)
            numbers = [number for number in numbers if not entries[number].fate]
            members = [entries[number] for number in numbers]
            layout = _lay_out(members)
        split = _split_of(members[0], options)
        for number in numbers:
            entries[number] = dataclasses.replace(entries[number], split=split)
        series_by_split[split] += _plan_files(members, split) if layout is None else _plan_series(layout, split, start)
    shards = [shard for split in pseudonyms.SPLITS for shard in _fill_shards(split, series_by_split[split], options)]
    common = settings(options.key, options.validation, options.test, options.conversion)
    head: Json = {"format": FORMAT, "settings": common.to_json(), "conversion": dataclasses.asdict(options.conversion)}
    if not options.conversion.keep_maps:  # plans of earlier versions, which did not have it, keep their hash
        del head["settings"]["keep_maps"], head["conversion"]["keep_maps"]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.to_line())
    return Plan(digest.hexdigest(), common, tuple(shards)), entries


def split_kinds(entries: Sequence[Entry], key: bytes) -> list[Entry]:
    """The entries, with a pseudonym of its own for each kind of image that shares a series UID.

    Some anonymisers write one UID into all series of a patient. A CT and an MR, a map and an image, or a head and a knee are not one
    series. The first kind keeps the pseudonym of the UID; a body part that is not named joins the most frequent one.

    Args:
      key: for pseudonyms.
    """
    by_series: dict[str, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        if not entry.fate and entry.kind == "dicom":
            by_series[entry.series].append(number)
    found = list(entries)
    for series, numbers in by_series.items():
        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for number in numbers:
            facts = entries[number].facts
            counts[facts.modality, facts.quantity][facts.body_part] += 1
        common = {
            kind: min((part for part in parts if part), key=lambda part: (-parts[part], part), default="")
            for kind, parts in counts.items()
        }
        kinds = sorted((*kind, part or common[kind]) for kind, parts in counts.items() for part in parts)
        for number in numbers if kinds[0] != kinds[-1] else ():
            facts = entries[number].facts
            part = facts.body_part or common[facts.modality, facts.quantity]
            kind = facts.modality, facts.quantity, part
            if kind != kinds[0]:
                name = pseudonyms.digest(key, "series", "/".join((series, *kind)))
                found[number] = dataclasses.replace(entries[number], series=name)
    return found


def _split_of(entry: Entry, options: Options) -> str:
    before = options.splits.get(entry.patient, "")
    if before and entry.split not in ("", before):
        raise UserError(
            f"the label table puts a patient into {entry.split} who is in {before} in the dataset already; correct the table or build into a new --output"
        )
    return entry.split or before or pseudonyms.split_of(options.key, entry.patient, options.validation, options.test)


def _fill_shards(split: str, series: Sequence[PlannedSeries], options: Options) -> list[PlannedShard]:
    # The keyed hash is the global shuffle: neighbours in a shard have nothing in common.
    items = sorted(series, key=lambda one: (pseudonyms.digest(options.key, "order", one.series), one.part))
    total = sum(one.bytes for one in items)
    count = min(len(items), max(SMALL_SHARDS, -(-total // options.shard_bytes)))
    first = options.first.get(split, 0)
    if first + count > MOST_SHARDS:
        raise UserError(
            f"{split} would have {first + count:,} shards, but TFDS can name {MOST_SHARDS:,}; raise --shard-mb"
        )
    return [
        PlannedShard(split, first + n, tuple(items[len(items) * n // count : len(items) * (n + 1) // count]))
        for n in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the slices of a DICOM series lie.

    Attributes:
      copies: files by instance and place; the first of each is the one to take if its pixels can be read.
      frames: the slices: a file and the number of its frame.
      parts: geometry of each orientation; its `order` has indices of `frames`.
    """

    copies: Mapping[tuple[str, tuple[FrameGeometry, ...]], Sequence[Entry]]
    frames: Sequence[tuple[Entry, int]]
    parts: Sequence[geometry.SeriesGeometry]

    def orientation(self, part: geometry.SeriesGeometry) -> geometry.Orientation:
        entry, number = self.frames[part.order[0]]
        return entry.facts.geometry[number].orientation

    def excluded(self) -> str | None:
        """Name of the rule that excludes the series, or None."""
        return exclusion.exclude_layout(
            self.frames[0][0].facts.modality,
            [(self.orientation(part), len(part.order)) for part in self.parts],
            maybe_localizer=any(entry.facts.maybe_localizer for entry, _ in self.frames),
        )

    def localizers(self) -> frozenset[str]:
        """Paths of the files that are localizers though other files of the series are not.

        A file whose frames have several planes stays: its fate is one.
        """
        counts = [(part.plane, len(part.order)) for part in self.parts]
        planes = exclusion.localizer_planes(self.frames[0][0].facts.modality, counts)
        return frozenset(
            entry.path
            for group in (self.copies.values() if planes else ())
            for entry in group
            if all(geometry.plane_of(place.orientation) in planes for place in entry.facts.geometry)
        )


def _lay_out(members: Sequence[Entry]) -> _Layout:
    # File names and their order do not matter. Of several copies the largest file comes first: a transfer that was
    # interrupted left a smaller one.
    copies: dict[tuple[str, tuple[FrameGeometry, ...]], list[Entry]] = defaultdict(list)
    for entry in sorted(members, key=lambda entry: (entry.facts.instance, -entry.size, entry.path)):
        copies[entry.facts.instance, entry.facts.geometry].append(entry)
    frames = [(group[0], number) for group in copies.values() for number in range(group[0].facts.frames)]
    places = [entry.facts.geometry[number] for entry, number in frames]
    parts = geometry.check([place.orientation for place in places], [place.position for place in places])
    return _Layout(copies, frames, parts)


def _plan_files(members: Sequence[Entry], split: str) -> list[PlannedSeries]:
    """Volumes and pictures, each of which is a series or a part of one."""
    return [
        _planned(entry, split, part, "unknown", 0.0, (), None, [_planned_file(entry, 0)], entry.size)
        for part, entry in enumerate(members)
    ]


def _plan_series(layout: _Layout, split: str, start: int) -> list[PlannedSeries]:
    """A DICOM series, or its parts where it has several orientations; its slices are numbered from `start`."""
    result = []
    one = layout.frames[0][0]
    size = sum(entry.size for group in layout.copies.values() for entry in group) // len(layout.parts)
    body_parts = [entry.facts.body_part for entry, _ in layout.frames]
    first, spare = start, start + len(layout.frames)
    for number, part in enumerate(layout.parts):
        # In spatial order, but the frames of one file stay together, so that no file is decoded twice.
        by_file: dict[str, tuple[Entry, list[tuple[int, float]]]] = {}
        for index, along in zip(part.order, part.positions, strict=True):
            entry, frame = layout.frames[index]
            by_file.setdefault(entry.path, (entry, []))[1].append((frame, along))
        planned = []
        for entry, wanted in by_file.values():
            planned.append(_planned_file(entry, first, wanted))
            for copy in layout.copies[entry.facts.instance, entry.facts.geometry][1:]:
                planned.append(_planned_file(copy, first, wanted)._replace(spare=spare))
                spare += len(wanted)
            first += len(wanted)
        problems = (*part.problems, *((CONTINUED,) if start else ()))
        orientation = layout.orientation(part)
        directions = reformat.directions(orientation) if orientation is not None else None
        spacing = part.spacing or one.facts.thickness
        made = _planned(one, split, number, part.plane, spacing, problems, directions, planned, size)
        result.append(dataclasses.replace(made, body_part=next(filter(None, body_parts), "")))
    return result


def _planned(
    one: Entry, split: str, part: int, plane: str, spacing: float, problems: tuple[str, ...],
    directions: Directions | None, planned: Sequence[PlannedFile], size: int,
) -> PlannedSeries:  # fmt: skip
    facts = one.facts
    return PlannedSeries(
        one.series, one.patient, split, one.kind, part, plane, spacing, problems, size, facts.modality, facts.body_part,
        facts.manufacturer, directions, tuple(planned), facts.quantity,
    )  # fmt: skip


def _planned_file(entry: Entry, first: int, frames: Sequence[tuple[int, float]] = ()) -> PlannedFile:
    return PlannedFile(
        entry.path,
        entry.size,
        entry.modified_ns,
        first,
        tuple(frames),
        entry.facts.lossy,
        entry.labels,
        entry.member,
        tiles=entry.facts.tiles,
    )


# ---- on disk

PLAN = "plan.json"
REPLACED = "the plan of this build no longer exists: another build into the same output replaced it; rerun this one"


def lines_of(folder: Path, plan_hash: str) -> Path:
    """The file with one line per shard. Its name holds the hash, so that a worker notices that another plan replaced its own."""
    return folder / f"plan-{plan_hash[:16]}.jsonl"


def write(folder: Path, plan: Plan) -> StoredPlan:
    """Writes a plan into an existing folder.

    Raises:
      OSError: the disk is full.
    """
    places, end = [], 0
    with files.written(lines_of(folder, plan.hash), private=True) as file:
        for shard in plan.shards:
            line = shard.to_line()
            count = sum(len(series.files) for series in shard.series)
            places.append(ShardPlace(shard.split, shard.number, count, (end, len(line))))
            file.write(line)
            end += len(line)
    value = {
        "hash": plan.hash, "format": FORMAT, "settings": plan.settings.to_json(),
        "conversion": dataclasses.asdict(plan.settings.conversion), "shards": [place._asdict() for place in places],
    }  # fmt: skip
    files.write_text(folder / PLAN, json.dumps(value, sort_keys=True), private=True)
    return StoredPlan(plan.hash, plan.settings, tuple(places))


def read(folder: Path) -> StoredPlan | None:
    """The plan in a folder; None if there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        places = tuple(ShardPlace(**(place | {"at": tuple(place["at"])})) for place in value["shards"])
        return StoredPlan(value["hash"], Settings.from_json(value["settings"]), places)
    return None


def read_shard(lines: str | Path, at: tuple[int, int]) -> PlannedShard:
    """One shard of a plan; `at` is offset and length of its line, bytes.

    Raises:
      UserError: the plan was replaced.
    """
    try:
        with open(lines, "rb") as file:
            file.seek(at[0])
            return PlannedShard.from_line(file.read(at[1]))
    except FileNotFoundError as error:
        raise UserError(REPLACED) from error
