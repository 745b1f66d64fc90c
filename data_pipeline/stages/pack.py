"""Encoded slices of a series to records: the last step of the conversion."""

import collections
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt16

from curia_common.errors import StorageError
from data_pipeline.format import codec, records
from data_pipeline.sources.base import SCRATCH_FULL
from data_pipeline.sources.stored_values import LEVELS
from data_pipeline.stages import card
from data_pipeline.stages.inventory import Labels
from data_pipeline.stages.statistics import SliceStatistics, series_statistics
from data_pipeline.stages.units import Evidence, SliceValues

SPOOL_BYTES = 128_000_000
PATH = "_path"  # a column of the sidecars alone: paths stay out of index.parquet
EVIDENCE = "units_evidence"  # a column of index.parquet alone; what was built before it existed counts as "declared"

Scale = tuple[float, float]  # slope and intercept: real value = stored value * slope + intercept
IndexRow = dict[str, str | int | float | bytes | None]


class EncodedSlice(NamedTuple):
    """What is kept of a slice once it is encoded; its bytes wait in the spool.

    Attributes:
      place: offset and length in the spool.
      shape: px.
      index: number within the series.
      position: mm along the normal.
      flags: bits of format.records.
      source: first 16 hex digits of the SHA-256 of the stored source pixels.
      spacing: mm between rows and columns.
      path: of the file it comes from; "" for a reformat.
      values: what is known of its units; None for a reformat.
      plane, step: of a reformat, its plane and the mm between slices; else "" and 0, and the series says them.
    """

    place: tuple[int, int]
    shape: tuple[int, int]
    index: int
    position: float
    scale: Scale
    flags: int
    source: str
    spacing: tuple[float, float]
    statistics: SliceStatistics
    labels: Labels
    path: str
    values: SliceValues | None = None
    plane: str = ""
    step: float = 0.0


class Spool:
    """Encoded slices of one series: in memory while they are few, then in an unnamed file. A context manager.

    The statistics of a series are in each of its records and are known only after its last slice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder))  # noqa: SIM115 - closed by __exit__
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> tuple[int, int]:
        """Appends bytes; returns their offset and length.

        Raises:
          StorageError: the scratch disk is full, which must not quarantine the file that is being read.
        """
        place = (self._end, len(data))
        try:
            self._file.seek(self._end)
            self._file.write(data)
        except OSError as error:
            raise StorageError(SCRATCH_FULL.format(error=error.strerror)) from error
        self._end += len(data)
        return place

    def read(self, place: tuple[int, int]) -> bytes:
        """The bytes at an offset and length; raises as `add`, because buffered bytes are written first."""
        try:
            self._file.seek(place[0])
            return self._file.read(place[1])
        except OSError as error:
            raise StorageError(SCRATCH_FULL.format(error=error.strerror)) from error

    def pixels(self, one: EncodedSlice) -> UInt16[np.ndarray, "rows columns"]:
        """A slice, decoded."""
        return codec.decode(self.read(one.place))


class Tally:
    """What the slices of a file or series add up to.

    Attributes:
      histograms: of the stored values, by scale; as long as the highest value needs.
      sources: hashes of the slices that are kept.
      left_out: slices by the rule that left them out.
    """

    def __init__(self) -> None:
        self.histograms: dict[Scale, Int[np.ndarray, " levels"]] = {}
        self.sources: set[str] = set()
        self.left_out: collections.Counter[str] = collections.Counter()

    def count(self, scale: Scale, histogram: Int[np.ndarray, " levels"]) -> None:
        """Adds the pixels of a slice."""
        before = self.histograms.get(scale)
        if before is None:
            self.histograms[scale] = histogram.copy()
            return
        if len(before) < len(histogram):
            self.histograms[scale] = before = np.pad(before, (0, len(histogram) - len(before)))
        before[: len(histogram)] += histogram

    def discount(self, scale: Scale, histogram: Int[np.ndarray, " levels"]) -> None:
        """Takes the pixels of a counted slice out again."""
        left = self.histograms[scale].copy()
        left[: len(histogram)] -= histogram
        left = np.trim_zeros(left, "b")
        if len(left):
            self.histograms[scale] = left
        else:
            del self.histograms[scale]

    def add(self, other: "Tally") -> None:
        for scale, histogram in other.histograms.items():
            self.count(scale, histogram)
        self.sources |= other.sources
        self.left_out.update(other.left_out)


class PackedRecord(NamedTuple):
    """A serialized record, the size of its slices in px, and a row of the index for each, without shard and record number."""

    data: bytes
    shape: tuple[int, int]
    rows: list[IndexRow]


@dataclasses.dataclass(frozen=True)
class SeriesIdentity(records.SeriesFacts):
    """What every record of a series says of it.

    Attributes:
      spacing: mm between slices.
      units_evidence: how the units are known, in index.parquet alone.
    """

    spacing: float
    units_evidence: Evidence


def pack(
    series: SeriesIdentity, slices: Sequence[EncodedSlice], histograms: Mapping[Scale, Int[np.ndarray, " levels"]],
    per_record: int, spool: Spool,
) -> Iterator[PackedRecord]:  # fmt: skip
    """Records of up to `per_record` neighbours that share plane, size, scale and spacing."""
    whole = series_statistics(histograms)

    def alike(one: EncodedSlice) -> tuple[str, tuple[int, int], Scale, tuple[float, float]]:
        return one.plane, one.shape, one.scale, one.spacing

    for (plane, shape, scale, spacing), group in itertools.groupby(slices, key=alike):
        members = list(group)
        for start in range(0, len(members), per_record):
            part = members[start : start + per_record]
            header = records.RecordHeader(
                series.series, series.patient, series.modality, series.units, plane or series.plane, series.body_part,
                series.manufacturer, *scale, whole.mean, whole.std, (*spacing, part[0].step or series.spacing),
                whole.percentiles,
            )  # fmt: skip
            entries = [_entry(one) for one in part]
            rows = [
                _index_row(slot, header, entry, one) | {EVIDENCE: series.units_evidence}
                for slot, (entry, one) in enumerate(zip(entries, part, strict=True))
            ]
            data = records.serialize([spool.read(one.place) for one in part], header, entries)
            yield PackedRecord(data, shape, rows)


def _entry(one: EncodedSlice) -> records.SliceEntry:
    s = one.statistics
    return records.SliceEntry(one.position, s.low, s.high, s.mean, s.std, one.index, one.flags, s.body_box, one.source)


def _index_row(slot: int, header: records.RecordHeader, entry: records.SliceEntry, one: EncodedSlice) -> IndexRow:
    row: IndexRow = {"slot": slot, **records.index_row(header, entry, one.shape)}
    row |= {f"label_{name}": value for name, value in one.labels.items()}
    return row | {PATH: os.fsencode(one.path)}


def align(
    slices: Sequence[EncodedSlice], histograms: Mapping[Scale, Int[np.ndarray, "_"]], spool: Spool
) -> tuple[list[EncodedSlice], dict[Scale, Int[np.ndarray, "_"]]]:
    """Gives slices that differ by whole steps one scale.

    Each slice of signed values starts at its own lowest one, which is known before that of the series. Nothing changes where
    slopes differ, or where steps do not match or do not fit into 16 bits: real values stay exact.
    """
    scales = sorted(histograms, key=lambda scale: scale[1])
    slope, lowest = scales[0]
    steps = {scale: round((scale[1] - lowest) / slope) for scale in scales}
    fits = all(
        scale[0] == slope
        and abs(lowest + steps[scale] * slope - scale[1]) < 1e-6 * slope
        and steps[scale] + len(histograms[scale]) <= LEVELS
        for scale in scales
    )
    if len(scales) == 1 or not fits:
        return list(slices), dict(histograms)
    joined = np.zeros(max(steps[scale] + len(histograms[scale]) for scale in scales), np.int64)
    for scale in scales:
        joined[steps[scale] : steps[scale] + len(histograms[scale])] += histograms[scale]
    moved = []
    for one in slices:
        place = one.place
        if steps[one.scale]:
            place = spool.add(codec.encode(spool.pixels(one) + np.uint16(steps[one.scale])))
        moved.append(one._replace(place=place, scale=(slope, lowest)))
    return moved, {(slope, lowest): joined}


def intensities(
    units: str, histograms: Mapping[Scale, Int[np.ndarray, " levels"]]
) -> tuple[str, Int[np.ndarray, " bins"]]:
    """The kind of the card's histogram ("HU" or "relative") and the pixels per bin; reformats are not counted."""
    hu, percentiles = units == "HU", series_statistics(histograms).percentiles
    bins = [card.intensities(histogram, *scale, percentiles, hu=hu) for scale, histogram in histograms.items()]
    return "HU" if hu else "relative", np.sum(bins, axis=0)
