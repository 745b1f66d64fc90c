"""The dataset card: what is in a dataset and what was left out, for programs (card.json) and people (index.html).

Of paths it holds only the names given to --input, of people nothing.
"""

import collections
import datetime
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from curia_common import __version__
from data_pipeline.format import records
from data_pipeline.format.files import Json
from data_pipeline.format.shards import ShardRow
from data_pipeline.stages import pseudonyms
from data_pipeline.stages.card_examples import Choice, Example
from data_pipeline.stages.label_values import LabelValue

LABEL = "label_"  # begins the names of label columns
COUNTED = ("split", "modality", "units", "plane", "body_part", "manufacturer")
FATES = ("kept", "excluded", "duplicate", "quarantined")
# Of the histograms of intensities. Values that are not HU: 0 is the series' 0.5 percentile, 1 its 99.5 percentile.
EDGES = {"HU": np.arange(-1024, 3073, 32, dtype=np.float64), "relative": np.round(np.linspace(-0.25, 1.5, 71), 6)}
SPACING_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0)  # mm
SIDE_EDGES = (0.0, 64.0, 128.0, 192.0, 256.0, 320.0, 384.0, 512.0, 768.0, 1024.0)  # px
MOST_CLASSES = 1000  # of a label; one with more values is a measurement, of which the range is kept
EVIDENCE = ("proved", "declared", "guessed")  # that values are in the unit that the dataset says
DECLARED = EVIDENCE[1]  # in parts of a dataset that do not say
SIBLINGS = 4  # inputs in one folder, from which on the folder is named in their place
Card = Json  # the content of card.json


class Holdout(NamedTuple):
    """Outcome of --holdout.

    Attributes:
      lines: lines of the file.
      matched: of them, how many name a patient of these inputs.
      unmatched_lines: numbers of the others.
      files: input files that were left out.
    """

    lines: int
    matched: int
    unmatched_lines: Sequence[int]
    files: int


def intensities(
    histogram: Int[np.ndarray, "levels"], slope: float, intercept: float, percentiles: Sequence[float], *, hu: bool
) -> Int[np.ndarray, "bins"]:
    """Pixels per bin of EDGES; values outside count for the outermost bins.

    Args:
      histogram: counts of the stored values 0, 1, 2, …
      percentiles: p0.5, p50, p99.5 of the series, real values.
    """
    # In single precision, as records have them, so that a slice that is taken out later is in the same bins.
    slope, intercept, *percentiles = (
        np.asarray([slope, intercept, *percentiles], np.float32).astype(np.float64).tolist()
    )
    stored = np.flatnonzero(histogram)
    real = stored * slope + intercept
    edges = EDGES["HU" if hu else "relative"]
    if not hu:
        low, high = percentiles[0], percentiles[2]
        real = (real - low) / (high - low if high > low else 1.0)
    bins = np.clip(np.searchsorted(edges, real, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(bins, weights=histogram[stored], minlength=len(edges) - 1).astype(np.int64)


class UnitsRefused(NamedTuple):
    """Series of which no slice is in the dataset because the pixels contradict the unit, and all slices left out for that."""

    series: int = 0
    slices: int = 0


class SeriesCount(NamedTuple):
    """What is counted by series. `evidence`: one of EVIDENCE."""

    patient: str
    split: str
    modality: str
    units: str
    evidence: str


class LabelCount:
    """Slices by split and value of one label."""

    def __init__(self) -> None:
        self._classes: collections.Counter[tuple[str, LabelValue]] | None = collections.Counter()
        self._slices: collections.Counter[str] = collections.Counter()
        self._low = self._high = np.nan

    def add(self, splits: Sequence[str], values: pa.ChunkedArray) -> None:
        """Counts the values of some slices; None is not a label."""
        rows = [(split, value) for split, value in zip(splits, values.to_pylist(), strict=True) if value is not None]
        self._slices.update(split for split, _ in rows)
        numbers = [value for _, value in rows if not isinstance(value, str)]
        if numbers:
            self._low, self._high = np.fmin(self._low, min(numbers)), np.fmax(self._high, max(numbers))
        if self._classes is not None:
            self._classes.update(rows)
            if len({value for _, value in self._classes}) > MOST_CLASSES:
                self._classes = None

    def to_json(self) -> Json:
        """Slices by split; the range of numbers; and unless there are too many values, slices by class and split."""
        found: Json = {"slices": {split: self._slices[split] for split in pseudonyms.SPLITS if self._slices[split]}}
        if not np.isnan(self._low):
            found["range"] = [float(self._low), float(self._high)]
        if self._classes is None:
            return found
        classes: dict[str, dict[str, int]] = collections.defaultdict(dict)
        # Numbers by size, text by the alphabet; a column has one type.
        for (split, value), slices in sorted(self._classes.items(), key=lambda item: (item[0][1], item[0][0])):
            classes[str(value)][split] = slices
        return found | {"classes": dict(classes)}


class Counts:
    """What the rows of an index add up to, and which slices to show; takes the index part by part.

    Args:
      examples: how many slices to show.
      held_out: pseudonyms of patients of whom there must be none.
      pictures: whether pictures may be among the examples.

    Attributes:
      slices, held_out: all rows, and those of held-out patients.
      by: rows by value, for each column of COUNTED.
      by_kind: rows by modality and unit; inferred: of them, those whose modality was inferred.
      reformatted: rows that were cut out of a series in another plane.
      patients: pseudonyms by split; patients_from: by what tells them apart.
      series: by pseudonym.
      near: series that look like another one, with that one.
      spacing, sides: rows by bin.
      labels: by column.
    """

    def __init__(self, examples: int, held_out: frozenset[str] = frozenset(), *, pictures: bool = True) -> None:
        self.slices = self.held_out = self.reformatted = 0
        self.by: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in COUNTED}
        self.by_kind: collections.Counter[tuple[str, str]] = collections.Counter()
        self.inferred: collections.Counter[tuple[str, str]] = collections.Counter()
        self.patients: dict[str, set[str]] = {split: set() for split in pseudonyms.SPLITS}
        self.patients_from: dict[str, set[str]] = collections.defaultdict(set)
        self.series: dict[str, SeriesCount] = {}
        self.near: dict[str, str] = {}
        self.spacing: dict[str, collections.Counter[str]] = {
            "within a slice": collections.Counter(), "between slices": collections.Counter(),
        }  # fmt: skip
        self.sides: collections.Counter[str] = collections.Counter()
        self.labels: dict[str, LabelCount] = collections.defaultdict(LabelCount)
        self.choice = Choice(examples, pictures=pictures)
        self._held_out = held_out

    def add(self, rows: pa.Table) -> None:
        """Counts rows of index.parquet."""
        if not len(rows):
            return
        rows = _completed(rows)
        self.slices += len(rows)
        for name, counts in self.by.items():
            counts.update({str(v["values"]): v["counts"] for v in rows[name].value_counts().to_pylist()})
        flags = rows["flags"].to_numpy()
        self.reformatted += int(np.count_nonzero(flags & records.REFORMATTED))
        inferred = rows.append_column("inferred", pa.array((flags & records.MODALITY_INFERRED) > 0))
        for row in inferred.group_by(["modality", "units", "inferred"]).aggregate([([], "count_all")]).to_pylist():
            kind = row["modality"], row["units"]
            self.by_kind[kind] += row["count_all"]
            self.inferred[kind] += row["count_all"] * row["inferred"]
        columns = [
            "patient",
            "split",
            "series",
            "modality",
            "units",
            "units_evidence",
            "patient_from",
            "near_duplicate_of",
        ]
        for row in rows.group_by(columns).aggregate([([], "count_all")]).to_pylist():
            self.patients[row["split"]].add(row["patient"])
            self.patients_from[row["patient_from"]].add(row["patient"])
            self.series[row["series"]] = SeriesCount(
                *(row[name] for name in ("patient", "split", "modality", "units", "units_evidence"))
            )
            if row["near_duplicate_of"]:
                self.near[row["series"]] = row["near_duplicate_of"]
            if row["patient"] in self._held_out:
                self.held_out += row["count_all"]
        within = np.maximum(rows["spacing_rows"].to_numpy(), rows["spacing_columns"].to_numpy())
        self.spacing["within a slice"].update(_binned(within, SPACING_EDGES))
        self.spacing["between slices"].update(_binned(rows["spacing_slices"].to_numpy(), SPACING_EDGES))
        self.sides.update(_binned(np.maximum(rows["height"].to_numpy(), rows["width"].to_numpy()), SIDE_EDGES))
        splits = rows["split"].to_pylist()
        for name in rows.column_names:
            if name.startswith(LABEL):
                self.labels[name.removeprefix(LABEL)].add(splits, rows[name])
        self.choice.add(rows)

    def examples(self) -> list[Example]:
        """The slices to show."""
        return self.choice.examples()

    def near_duplicates(self) -> dict[str, int]:
        """How many series look like another one, and how many of those are of another patient or in another split."""
        pairs = [(self.series[a], self.series[b]) for a, b in self.near.items() if b in self.series]
        return {
            "series": len(self.near), "of another patient": sum(a.patient != b.patient for a, b in pairs),
            "in another split": sum(a.split != b.split for a, b in pairs),
        }  # fmt: skip

    def kinds(self) -> list[Json]:
        """Slices and series by modality and unit, the most frequent first."""
        series = collections.Counter((one.modality, one.units) for one in self.series.values())
        evidence = collections.Counter((one.modality, one.units, one.evidence) for one in self.series.values())
        return [
            {
                "modality": kind[0], "units": kind[1], "slices": slices, "series": series[kind],
                "modality_inferred": self.inferred[kind],
                "series_by_units_evidence": {name: evidence[*kind, name] for name in EVIDENCE if evidence[*kind, name]},
            }
            for kind, slices in sorted(self.by_kind.items(), key=lambda item: (-item[1], item[0]))
        ]  # fmt: skip


def _completed(rows: pa.Table) -> pa.Table:
    """Rows with the columns that older versions did not write."""
    for name, value in (("units_evidence", DECLARED), ("patient_from", ""), ("kind", "")):
        if name not in rows.column_names:
            rows = rows.append_column(name, pa.array([value] * len(rows), pa.string()))
        elif rows[name].null_count:
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].fill_null(value))
    return rows


def sources(inputs: Sequence[str]) -> list[str]:
    """The inputs as they were named. Many of one folder may be called after patients: that folder stands for them."""
    siblings: dict[str, list[str]] = collections.defaultdict(list)
    for text in dict.fromkeys(inputs):
        siblings[os.path.dirname(text.rstrip("/"))].append(text)
    found = []
    for folder, texts in siblings.items():
        found += [f"{len(texts):,} inputs in {folder or '.'}"] if len(texts) >= SIBLINGS else texts
    return found


def today() -> str:
    """The date in UTC, or that of SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = (
        datetime.datetime.now(datetime.UTC)
        if epoch is None
        else datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
    )
    return now.date().isoformat()


def make(
    *, name: str, settings: Mapping[str, str | int | float | bool | None], codec: str, counts: Counts,
    shard_rows: Sequence[ShardRow], files: Mapping[str, Mapping[str, int]], intensity: Mapping[str, Sequence[int]],
    left_out: Mapping[str, int], refused: UnitsRefused, holdout: Holdout | None, additions: int, inputs: Sequence[str],
) -> Card:  # fmt: skip
    """The card as plain JSON values.

    Args:
      files: number of files by fate and reason.
      intensity: pixels per bin, of "HU" and "relative".
      left_out: slices of readable files by the rule that left them out.
      inputs: as they were named, of all additions.
    """
    card: Card = {
        "version": __version__, "name": name, "built": today(), "sources": sources(inputs), "slices": counts.slices, "series": len(counts.series),
        "patients": len(set().union(*counts.patients.values())), "bytes": sum(shard.bytes for shard in shard_rows),
        "codec": codec, "additions": additions,
        "kinds": counts.kinds(), "units_refused": refused._asdict(), "reformatted": counts.reformatted,
        "slices_by": {column: dict(sorted(found.items())) for column, found in counts.by.items()},
        "patients_by_split": {split: len(found) for split, found in counts.patients.items()},
        "patients_from": {name: len(found) for name, found in sorted(counts.patients_from.items()) if name},
        "labels": {name: count.to_json() for name, count in counts.labels.items()},
        "spacing_mm": {where: _in_order(found, SPACING_EDGES) for where, found in counts.spacing.items()},
        "longer_side_px": _in_order(counts.sides, SIDE_EDGES),
        "intensity": {
            kind: {"edges": EDGES[kind].tolist(), "pixels": list(bins)} for kind, bins in intensity.items() if any(bins)
        },
        "files": {fate: sum(files.get(fate, {}).values()) for fate in FATES},
        "reasons": {
            fate: {reason: n for reason, n in most_first(files.get(fate, {})).items() if reason} for fate in FATES
        },
        "slices_left_out": most_first(left_out),
        "near_duplicates": counts.near_duplicates(),
        "settings": dict(settings),
        "shards": [
            {key: getattr(shard, key) for key in ("file", "split", "records", "slices", "bytes", "sha256")} for shard in shard_rows
        ],
    }  # fmt: skip
    if holdout is not None:
        card["held_out"] = holdout._asdict() | {"slices_found": counts.held_out}
    return card


def is_current(made: Card) -> bool:
    """Whether a card has what this version says of a dataset; those of older versions are made anew."""
    return {"built", "sources", "kinds", "units_refused", "patients_from", "labels", "reformatted"} <= set(made)


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest count first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _binned(values: np.ndarray, edges: Sequence[float]) -> dict[str, int]:
    """Counts by bin, named by its edges; 0 stands for unknown."""
    known = values[values > 0]
    counts = np.bincount(np.searchsorted(edges, known, side="left"), minlength=len(edges) + 1)
    found = {name: int(n) for name, n in zip(_names(edges), counts[1:], strict=True) if n}
    return found | ({"unknown": len(values) - len(known)} if len(known) < len(values) else {})


def _names(edges: Sequence[float]) -> list[str]:
    return [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)] + [f"over {edges[-1]:g}"]


def _in_order(counts: Mapping[str, int], edges: Sequence[float]) -> dict[str, int]:
    return {name: counts[name] for name in (*_names(edges), "unknown") if counts.get(name)}
