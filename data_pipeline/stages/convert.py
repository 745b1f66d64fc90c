"""Third stage: one shard of the plan to one ArrayRecord file. Idempotent, and free of any engine: whoever maps it over the
shards (local processes, Beam, a Slurm array) gets the same bytes."""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curia_common.errors import UserError, fault_location
from data_pipeline.format import codec, files, records, shards
from data_pipeline.sources import archives, geometry, readers, retry
from data_pipeline.sources import object_stores as objects
from data_pipeline.sources.base import NO_MEMORY, SCRATCH_FULL, Heartbeat, ReadError, ReadRequest, Slice
from data_pipeline.sources.stored_values import LEVELS, stored_sha256
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import card, reformat
from data_pipeline.stages import exclusion as rules
from data_pipeline.stages import near_duplicates as likeness

SAME_PIXELS = "the same pixels as another slice of the series"
SPOOL_BYTES = 128_000_000
PATH = "_path"  # column of the sidecars alone: paths stay out of index.parquet


@dataclasses.dataclass
class _Encoded:
    """What is kept of a slice once it is encoded; its bytes wait in the spool."""

    place: tuple[int, int]
    shape: tuple[int, int]
    index: int
    labels: dict[str, Any]
    origin: Slice
    statistics: dict[str, Any]
    path: str
    plane: str = ""  # of a reformat; else the series says it
    step: float = 0.0  # mm between slices of a reformat


class _Spool:
    """Encoded slices of the series in hand: in memory while they are few, then in a file without a name, because the
    statistics of a series stand in each of its records and are known only after its last slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=folder)  # noqa: SIM115 - closed by __exit__
        self.end = 0

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> tuple[int, int]:
        place = (self.end, len(data))
        try:
            self._file.seek(self.end)
            self._file.write(data)
        except OSError as error:  # no fault of the input, which would be quarantined for it
            raise UserError(SCRATCH_FULL.format(error=error.strerror)) from error
        self.end += len(data)
        return place

    def read(self, place: tuple[int, int]) -> bytes:
        try:
            self._file.seek(place[0])  # this writes what waits
            return self._file.read(place[1])
        except OSError as error:
            raise UserError(SCRATCH_FULL.format(error=error.strerror)) from error


def publish(task: Mapping[str, Any], skip: Mapping[str, str], touch: Heartbeat) -> str:
    """Converts one shard and keeps its report beside it; the work of one task, wherever it runs.

    Args:
      task: "output", "sidecars" (folders), "scratch" (folder or None), "plan" (its hash), "lines" (file of the plan's shards),
        "at" (place of the shard in it), and what convert_shard takes: "name", "conversion".

    Returns:
      The shard's file name. `sidecars` then holds <name>.parquet (its rows of the index, with the path of each slice's file)
      and, written last, <name>.json (the rest of the report).
    """
    shard = plan.read_shard(task["lines"], task["at"])

    def touch_while_planned(item: str | None) -> None:
        touch(item)
        if item is None and not os.path.exists(task["lines"]):  # on a far machine, after the build was started anew
            raise UserError(plan.REPLACED)

    arguments = (task["output"], task["name"], task["conversion"], shard)
    with _scratch(task) as scratch:
        report = convert_shard(arguments, skip, touch_while_planned, scratch=scratch)
    index = report.pop("index")
    path = Path(task["sidecars"], report["file"])
    names = {name: None for row in index for name in row}  # labels may be missing in some rows
    table = pa.table({name: [row.get(name) for row in index] for name in names})
    files.write_table(path.with_name(f"{path.name}.parquet"), table, private=True)
    report = {"plan": task["plan"], "rows": len(index), **report}
    files.write_text(path.with_name(f"{path.name}.json"), json.dumps(report), private=True)
    return report["file"]


@contextlib.contextmanager
def _scratch(task: Mapping[str, Any]) -> Iterator[str | None]:
    """A folder of its own for what is in hand, where the output is on no local disk."""
    if task["scratch"] is None:
        yield None
        return
    os.makedirs(scratch_folder(task["scratch"], task["output"]), mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch_folder(task["scratch"], task["output"])) as folder:
        yield folder


def scratch_folder(scratch: str, output: str) -> str:
    """Where the builds of one output have what is in hand."""
    return os.path.join(scratch, f"curia-{hashlib.sha256(os.fsencode(os.path.abspath(output))).hexdigest()[:16]}")


def convert_shard(
    task: tuple[str, str, dict[str, Any], dict[str, Any]], skip: Mapping[str, str], touch: Heartbeat, *, scratch: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Writes the shard and reports on it; the work of one task of workers.run.

    Args:
      task: output folder, dataset name, the plan's "conversion" settings (size, slices_per_record), the plan's shard.
      skip: files that must not be opened again, with the reason.
      touch: called with each path before it is read, and with None after the last.
      scratch: a folder on a local disk for what is in hand; None takes the output folder.

    Returns:
      {"file", "split", "records", "slices", "bytes", "sha256", "slice_counts", "largest", "index": rows of index.parquet, each
      with the path it comes from, "intensity": pixels per bin of the card's histograms, "series": what likeness.groups
      compares, "left_out": slices by rule, "files": {path: outcome}}. A shard of which nothing is left is a file with 0
      records.

    Raises:
      UserError: an input changed since the inventory.
      OSError: the disk is full.
    """
    folder, dataset, settings, shard = task
    report: dict[str, Any] = {
        "file": shards.file_name(dataset, shard["split"], shard["number"]), "split": shard["split"],
        "slice_counts": [], "largest": [0, 0], "index": [], "files": {}, "series": [], "left_out": collections.Counter(),
        "intensity": {"HU": [0] * (len(card.HU_EDGES) - 1), "relative": [0] * (len(card.RELATIVE_EDGES) - 1)},
    }  # fmt: skip

    def items() -> Iterator[bytes]:
        for series in shard["series"]:
            with _Spool(Path(scratch or folder)) as spool:
                yield from _series_records(
                    series, settings, skip, touch, report, archives.folder(folder), spool, scratch
                )
        touch(None)

    path = Path(folder, report["file"])
    report["records"], report["sha256"] = shards.write(path, items(), Path(scratch) if scratch else None)
    report["slices"] = sum(report["slice_counts"])
    report["bytes"] = path.stat().st_size
    return report


def _series_records(
    series: dict[str, Any], settings: Mapping[str, Any], skip: Mapping[str, str], touch: Heartbeat, report: dict[str, Any],
    unpacked: str, spool: _Spool, scratch: str | None,
) -> Iterator[bytes]:  # fmt: skip
    facts = dict(series["facts"])  # readers add what only the pixels tell: units, and plane or modality of a volume
    kept: list[_Encoded] = []
    outcomes: dict[str, dict[str, Any]] = {}
    read = _Read()

    def whole(file: dict[str, Any], outcome: dict[str, Any]) -> tuple[list[_Encoded], _Read]:
        source = objects.Object(file["path"], file["size"], file["modified_ns"])
        with archives.materialize(source, _member(file), unpacked, scratch or unpacked, touch) as path:
            return _encode(file, path, series, facts, settings, outcome, read.sources, spool)

    for file in series["files"]:
        outcome = {
            "fate": "excluded", "reason": "", "problems": "; ".join(series["problems"]), "stored_sha256": "", "decoder": "",
            "series": series["series"], "split": series["split"], "shard": report["file"],
        }  # fmt: skip
        if file["path"] in skip:
            outcome |= {"fate": "quarantined", "reason": skip[file["path"]]}
        else:
            touch(file["path"])
            _check_unchanged(file)
            try:
                # A file is taken whole or not at all.
                items, found = retry.retry_transient(functools.partial(whole, file, outcome), touch, file["path"])
            except UserError:
                raise
            except ReadError as error:
                outcome |= {"fate": "quarantined", "reason": str(error)}
            except MemoryError:
                outcome |= {"fate": "quarantined", "reason": NO_MEMORY}
            except OSError as error:
                if objects.is_address(file["path"]) and error.errno in (errno.ENOENT, errno.EACCES):
                    raise UserError(GONE) from error  # by the inventory it could be read
                outcome |= {"fate": "quarantined", "reason": f"cannot be read ({error.strerror})"}
            except Exception as error:  # noqa: BLE001 - no file may end the build, whatever it holds
                outcome |= {"fate": "quarantined", "reason": f"the reader failed on it ({fault_location(error)})"}
            else:
                kept += items
                read.add(found)
                if items:
                    outcome |= {"fate": "kept", "reason": outcome["problems"]}  # kept and flagged
            _check_unchanged(file)
        outcomes[file["path"]] = outcome
    reason = _exclude_series(series, facts, read)
    if reason is not None:
        read.left_out[reason] += len(kept)
        for outcome in outcomes.values():
            if outcome["fate"] == "kept":
                outcome |= {"fate": "excluded", "reason": reason}
        kept = []
    elif kept:
        shown = [codec.decode(spool.read(kept[n].place)) for n in likeness.places(len(kept))]
        facts["signature"] = likeness.signature(shown)
        if settings.get("planes"):
            kept += _reformats(series, facts, kept, settings, spool, read)
    for path, outcome in outcomes.items():
        merge_outcome(report["files"], path, outcome)
    report["left_out"].update(read.left_out)
    if kept:
        one = {name: series[name] for name in ("series", "part", "patient", "split")}
        one |= {
            "modality": facts["modality"],
            "plane": series["plane"],
            "signature": facts["signature"].ravel().tolist(),
        }
        report["series"].append(one)
        yield from _pack(series, facts, kept, read.histograms, settings["slices_per_record"], report, spool)


@dataclasses.dataclass
class _Read:
    """What is known of the slices read so far, of a file or a series.

    Attributes:
      histograms: of the pixels, by slope and intercept; as long as their highest value needs.
      sources: hashes of the slices that are kept.
      left_out: slices by rule.
    """

    histograms: dict[tuple[float, float], np.ndarray] = dataclasses.field(default_factory=dict)
    sources: set[str] = dataclasses.field(default_factory=set)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def count(self, key: tuple[float, float], histogram: np.ndarray) -> None:
        """Adds a histogram, which is then this one's to change."""
        before = self.histograms.get(key)
        if before is None:
            self.histograms[key] = histogram
            return
        long, short = (before, histogram) if len(before) >= len(histogram) else (histogram, before)
        long[: len(short)] += short
        self.histograms[key] = long

    def discount(self, key: tuple[float, float], histogram: np.ndarray) -> None:
        self.histograms[key][: len(histogram)] -= histogram
        self.histograms[key] = np.trim_zeros(self.histograms[key], "b")
        if not len(self.histograms[key]):
            del self.histograms[key]

    def add(self, other: "_Read") -> None:
        for key, histogram in other.histograms.items():
            self.count(key, histogram)
        self.sources |= other.sources
        self.left_out.update(other.left_out)


def _exclude_series(series: Mapping[str, Any], facts: Mapping[str, Any], read: _Read) -> str | None:
    """The rule that leaves a whole series out, or None."""
    told = facts["modality"] in ("CT", "MR") and series["facts"]["modality"] != "auto"
    if not told or series["kind"] == "image" or not read.histograms:
        return None
    stored = [np.flatnonzero(histogram) for histogram in read.histograms.values()]
    values = [places * slope + intercept for places, (slope, intercept) in zip(stored, read.histograms, strict=True)]
    counts = [histogram[places] for places, histogram in zip(stored, read.histograms.values(), strict=True)]
    return rules.exclude_series(np.concatenate(values), np.concatenate(counts), facts["modality"])


def _encode(
    file: dict[str, Any], path: str, series: dict[str, Any], facts: dict[str, Any], settings: Mapping[str, Any],
    outcome: dict[str, Any], seen: set[str], spool: _Spool,
) -> tuple[list[_Encoded], _Read]:  # fmt: skip
    """The slices of a file that are kept, and what was seen of them; says in `outcome` why others are not."""
    read = _Read()
    found: list[tuple[int, str | None, _Encoded | None]] = []
    for item in _read(file | {"path": path}, series, facts, outcome, spool):
        item = _shrink(item, settings["size"])
        # The only look at all pixels: rules, statistics and the card's intensities follow from how many have which value.
        counts = np.bincount(item.pixels.ravel())
        reason = _exclude(item, counts, facts) or (SAME_PIXELS if item.source in seen else None)
        if reason is None:
            index = file["first"] + item.rank
            found.append((item.rank, None, _keep(item, counts, index, file["labels"], file["path"], spool)))
            read.count((item.slope, item.intercept), counts)
        else:
            found.append((item.rank, reason, None))
    kept: list[_Encoded] = []
    for _, reason, one in sorted(found, key=lambda entry: entry[0]):
        if one is not None and one.origin.source in read.sources:
            # In a file of several frames which of two comes first is known at the end.
            reason = SAME_PIXELS
            pixels = codec.decode(spool.read(one.place))
            read.discount((one.origin.slope, one.origin.intercept), np.bincount(pixels.ravel()))
        if reason is not None:
            outcome |= {"fate": "duplicate" if reason == SAME_PIXELS else "excluded", "reason": reason}
            read.left_out[reason] += 1
            continue
        read.sources.add(one.origin.source)
        kept.append(one)
    return kept, read


def _keep(
    item: Slice, counts: np.ndarray, index: int, labels: dict[str, Any], path: str, spool: _Spool
) -> _Encoded:  # fmt: skip
    statistics = records.slice_statistics(item.pixels, item.slope, item.intercept, counts)
    place, shape = spool.add(codec.encode(item.pixels)), item.pixels.shape
    item = dataclasses.replace(item, pixels=np.empty((0, 0), np.uint16))  # a view would keep the whole slice in memory
    return _Encoded(place, shape, index, labels, item, statistics, path)


def _reformats(
    series: Mapping[str, Any], facts: Mapping[str, Any], kept: list[_Encoded], settings: Mapping[str, Any], spool: _Spool,
    read: _Read,
) -> list[_Encoded]:  # fmt: skip
    """Slices of the other planes that were asked for; none where the kept slices form no regular volume."""
    one = kept[0]
    along = series.get("along") or facts.get("along")
    positions = np.diff([e.origin.position for e in kept])
    spacing = (float(np.median(positions)) if len(positions) else 0.0, *one.origin.spacing)
    alike = {(e.shape, e.origin.slope, e.origin.intercept, e.origin.spacing) for e in kept}
    regular = (
        not series["problems"] and along is not None and len(alike) == 1 and len(kept) >= geometry.MINIMUM_SLICES
        and series["plane"] in reformat.PLANES and min(spacing) > 0
        and float(np.abs(positions - spacing[0]).max()) <= geometry.SPACING_TOLERANCE * spacing[0]
    )  # fmt: skip
    if not regular:
        return []
    labels = one.labels if all(e.labels == one.labels for e in kept) else {}
    flags = records.REFORMATTED | (one.origin.flags & (records.LOSSY | records.MODALITY_INFERRED))
    found = []
    with reformat.Stack(Path(spool.folder), spacing, tuple(tuple(a) for a in along)) as stack:
        for e in kept:
            stack.add(codec.decode(spool.read(e.place)))
        for cut in stack.planes(tuple(p for p in settings["planes"] if p != series["plane"])):
            item = Slice(
                cut.number, cut.pixels, one.origin.slope, one.origin.intercept, cut.position, flags, stored_sha256(cut.pixels),
                (stack.spacing, stack.spacing),
            )  # fmt: skip
            item = _shrink(item, settings["size"])
            counts = np.bincount(item.pixels.ravel())
            reason = _exclude(item, counts, facts)
            if reason is not None:
                read.left_out[f"{reason} (reformatted)"] += 1
                continue
            encoded = _keep(item, counts, cut.number, labels, "", spool)
            found.append(dataclasses.replace(encoded, plane=cut.plane, step=stack.spacing))
    return found


# Of several outcomes for one file, whose frames went to several parts of a series, the best stands in the manifest.
_RANK = ("quarantined", "excluded", "duplicate", "kept")


def merge_outcome(outcomes: dict[str, dict[str, Any]], path: str, outcome: dict[str, Any]) -> None:
    """Adds the outcome of a file, or what is better about it than the one that is there."""
    before = outcomes.get(path)
    if before is None or _RANK.index(outcome["fate"]) > _RANK.index(before["fate"]):
        outcomes[path] = outcome


def _member(file: Mapping[str, Any]) -> archives.Member | None:
    return archives.Member(*file["member"]) if "member" in file else None


def _check_unchanged(file: Mapping[str, Any]) -> None:
    # Paths can hold names, so the texts have none; whoever runs the task knows the file in hand.
    try:
        source = objects.Object(file["path"], file["size"], file["modified_ns"])
        unchanged = archives.is_unchanged(source, _member(file))
    except OSError as error:
        raise UserError(GONE) from error
    if not unchanged:
        raise UserError(objects.CHANGED)


GONE = "an input can no longer be read; start the build again"


def _exclude(item: Slice, counts: np.ndarray, facts: Mapping[str, Any]) -> str | None:
    stored = np.flatnonzero(counts)
    hu = facts["units"] == "HU"
    values = stored.astype(np.float32) * item.slope + item.intercept if hu else stored
    return rules.exclude_pixels(item.pixels.shape, values, counts[stored], hu=hu)


def _read(
    file: dict[str, Any], series: dict[str, Any], facts: dict[str, Any], outcome: dict[str, Any], spool: _Spool
) -> Iterator[Slice]:
    irregular = bool(set(series["problems"]) - {geometry.FEW})
    request = ReadRequest(
        path=file["path"],
        modality=facts["modality"],
        scratch=str(spool.folder),
        frames=tuple((int(frame), float(along)) for frame, along in file["frames"]),
        flags=(records.IRREGULAR if irregular else 0) | (records.LOSSY if file["lossy"] else 0),
    )
    with readers.open_source(series["kind"], request) as source:
        told = source.facts
        facts |= {"modality": told.modality, "units": told.units}
        if told.body_part is not None:
            facts |= {"body_part": told.body_part, "manufacturer": told.manufacturer}
        if told.plane is not None:
            series |= {"plane": told.plane, "spacing": told.spacing}
            facts["along"] = told.directions
        yield from source.slices()
        outcome |= {"stored_sha256": source.stored_sha256, "decoder": source.decoder}
        if source.excluded:
            outcome["reason"] = source.excluded


# ---- pixels


def _shrink(item: Slice, size: int | None) -> Slice:
    """Antialiased reduction so that the longer side has `size` px; smaller slices stay as they are."""
    rows, columns = item.pixels.shape
    if size is None or max(rows, columns) <= size:
        return item
    target = tuple(max(1, round(n * size / max(rows, columns))) for n in (rows, columns))
    # PIL resizes float32 with an antialiased bicubic kernel; 16-bit values are exact in it.
    small = Image.fromarray(item.pixels.astype(np.float32)).resize(target[::-1], Image.Resampling.BICUBIC)
    pixels = np.clip(np.rint(np.asarray(small)), 0, LEVELS - 1).astype(np.uint16)
    spacing = (item.spacing[0] * rows / target[0], item.spacing[1] * columns / target[1])
    return dataclasses.replace(item, pixels=pixels, spacing=spacing, flags=item.flags | records.RESIZED)


# ---- records


def _pack(
    series: Mapping[str, Any], facts: Mapping[str, Any], kept: list[_Encoded],
    histograms: Mapping[tuple[float, float], np.ndarray], per_record: int, report: dict[str, Any], spool: _Spool,
) -> Iterator[bytes]:  # fmt: skip
    """Records of up to `per_record` neighbours that share size, slope, intercept and spacing."""
    # Slices of one series rarely differ in slope; where they do, each slope has its own series statistics.
    statistics = {key: records.series_statistics(counts, *key) for key, counts in histograms.items()}
    kind = "HU" if facts["units"] == "HU" else "relative"
    for key, counts in histograms.items():
        pixels = card.intensities(counts, *key, statistics[key]["series_percentiles"], hu=kind == "HU")
        report["intensity"][kind] = [a + int(b) for a, b in zip(report["intensity"][kind], pixels, strict=True)]

    def alike(e: _Encoded) -> tuple[Any, ...]:
        return e.plane, e.shape, e.origin.slope, e.origin.intercept, e.origin.spacing

    for _, group in itertools.groupby(kept, key=alike):
        members = list(group)
        for start in range(0, len(members), per_record):
            part = members[start : start + per_record]
            origin = part[0].origin
            record = {
                "series": series["series"], "patient": series["patient"], "modality": facts["modality"], "units": facts["units"],
                "plane": part[0].plane or series["plane"], "body_part": facts["body_part"], "manufacturer": facts["manufacturer"],
                "slope": origin.slope, "intercept": origin.intercept,
                "spacing": (*origin.spacing, part[0].step or series["spacing"]),
                **statistics[origin.slope, origin.intercept],
            }  # fmt: skip
            per_slice = {
                name: [e.statistics[name] for e in part] for name in ("low", "high", "mean", "std", records.SLICE_BOX)
            }
            per_slice |= {
                "index": [e.index for e in part], "position": [e.origin.position for e in part],
                "flags": [e.origin.flags for e in part], "source": [e.origin.source for e in part],
            }  # fmt: skip
            for slot, e in enumerate(part):
                report["index"].append(_index_row(report, record, per_slice, slot, e))
            report["slice_counts"].append(len(part))
            report["largest"] = [max(a, b) for a, b in zip(report["largest"], part[0].shape, strict=True)]
            yield records.serialize([spool.read(e.place) for e in part], record, per_slice)


def _index_row(
    report: Mapping[str, Any], record: Mapping[str, Any], per_slice: Mapping[str, Any], slot: int, e: _Encoded
) -> dict[str, Any]:
    row = {"split": report["split"], "shard": report["file"], "record": len(report["slice_counts"]), "slot": slot}
    row |= {name: record[name] for name in (*records.TEXT, *records.NUMBERS)}
    row |= {
        f"spacing_{axis}": value for axis, value in zip(("rows", "columns", "slices"), record["spacing"], strict=True)
    }
    row |= {
        name: per_slice[name][slot] for name in (*records.SLICE_NUMBERS, *records.SLICE_INTEGERS, *records.SLICE_TEXT)
    }
    row |= {"height": e.shape[0], "width": e.shape[1]}
    row |= {f"label_{name}": value for name, value in e.labels.items()}
    return row | {PATH: os.fsencode(e.path)}
