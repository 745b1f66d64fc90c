"""The example slices of a dataset card: which ones, and how they look.

No example of an exam shows a face: slices that are not axial are shown only of body parts that are known and do not include
the head or neck. Pictures say neither plane nor body part, so they are left out where faces have to be.
"""

import collections
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from PIL import Image

from data_pipeline.format import records, shards
from data_pipeline.sources.dicom_header import FACES
from data_pipeline.stages import contact_sheet

SIDE = 480  # px, enlarged
PICTURE = "image"  # the kind of a picture in the index
_KIND = ("modality", "plane", "body_part", "kind")  # of each there should be an example
_VENDORS = {"ge": "GE", "siemens": "Siemens", "unknown": "", "": ""}  # whose name is not the word with a capital


class Example(NamedTuple):
    """Where a slice to show is, and what its record does not say."""

    shard: str
    record: int
    slot: int
    kind: str
    manufacturer: str


class _Candidate(NamedTuple):
    """The middle slice of a series."""

    series: str
    patient: str
    example: Example


class Choice:
    """Chooses examples from the rows of an index, which come part by part; the parts do not matter.

    Args:
      count: how many to show.
      pictures: whether pictures may be among them.
    """

    def __init__(self, count: int, *, pictures: bool = True) -> None:
        self._count, self._pictures = count, pictures
        self._groups: dict[tuple[str, ...], dict[str, _Candidate]] = collections.defaultdict(dict)

    def add(self, rows: pa.Table) -> None:
        """Takes rows of index.parquet; those of a series come together."""
        if not self._count:
            return
        columns = (*_KIND, "series", "patient", "manufacturer")
        places: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for number, key in enumerate(zip(*(rows[name].to_pylist() for name in columns), strict=True)):
            places[key].append(number)
        for (modality, plane, part, kind, series, patient, manufacturer), numbers in places.items():
            if not self._pictures if kind == PICTURE else plane != "axial" and (not part or part in FACES):
                continue
            group = self._groups[modality, plane, part, kind]
            if series not in group:
                row = rows.select(["shard", "record", "slot"]).take([numbers[len(numbers) // 2]]).to_pylist()[0]
                group[series] = _Candidate(series, patient, Example(**row, kind=kind, manufacturer=manufacturer))
            self._forget(group)

    def _forget(self, group: dict[str, _Candidate]) -> None:
        """Keeps, of a kind, as many series as are shown at most, and as many patients and scanners."""
        if len(group) <= self._count:
            return
        # Pseudonyms are keyed hashes: their order is random and always the same.
        ordered = [group[series] for series in sorted(group)]
        kept = {one.series for one in ordered[: self._count]}
        for of in (lambda one: one.patient, lambda one: one.example.manufacturer):
            first = {of(one): one.series for one in reversed(ordered)}
            kept |= {first[name] for name in sorted(first)[: self._count]}
        for series in set(group) - kept:
            del group[series]

    def examples(self) -> list[Example]:
        """One kind after the other, of each the series whose patient and scanner were shown least."""
        chosen: list[Example] = []
        seen: collections.Counter[str] = collections.Counter()
        queues = {kind: [group[series] for series in sorted(group)] for kind, group in sorted(self._groups.items())}
        while queues and len(chosen) < self._count:
            for kind, queue in list(queues.items()):
                one = min(queue, key=lambda one: (seen[one.patient], seen[one.example.manufacturer], one.series))
                queue.remove(one)
                chosen.append(one.example)
                seen.update((one.patient, one.example.manufacturer))
                if not queue:
                    del queues[kind]
        return chosen[: self._count]


def pictures(folder: Path, chosen: Sequence[Example]) -> list[tuple[bytes, str]]:
    """JPEG files and captions of slices of the dataset in `folder`."""
    found = []
    for example in chosen:
        one = records.parse_slice(shards.read_record(folder / example.shard, example.record), example.slot)
        view = contact_sheet.view_of(one)
        file = io.BytesIO()
        Image.fromarray(contact_sheet.tile(one, view, SIDE)).save(file, "JPEG", quality=85)
        found.append((file.getvalue(), caption(one, view, example)))
    return found


def vendor(name: str) -> str:
    """The name of a class of manufacturers as the vendor writes it; "" where it is unknown."""
    return _VENDORS.get(name, name.title())


def caption(one: records.DecodedSlice, view: contact_sheet.View, example: Example) -> str:
    """What an example shows, in words."""
    what = {"OT": "modality not known"}.get(one.modality, one.modality)
    if example.kind == PICTURE:
        what = f"Picture, {what}"
    words = [what, one.body_part, f"{one.plane} plane" if one.plane not in ("", "unknown") else ""]
    words.append(vendor(example.manufacturer))
    low, high = (f"{value:.0f}".replace("-", "\u2212") for value in (view.low, view.high))
    shown = (
        f"{view.name}: black {low}, white {high} HU"
        if one.facts.hu
        else "black to white: all but the outermost 0.5 % of its values"
    )
    return f"{', '.join(word for word in words if word)}. {shown[0].upper()}{shown[1:]}."
