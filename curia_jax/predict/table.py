"""Rows of the table: what a model says of each series, and which of its slices spoke most."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from curia_jax import data
from curia_jax.models.head import HeadConfig
from curia_jax.predict.classifier import Classifier, canvas_of
from data_pipeline.format import records
from data_pipeline.format.shards import SliceSource


class Series(NamedTuple):
    """Slices of a series in their order.

    Attributes:
      patient: pseudonym.
      numbers: of the slices in the source.
      places: their numbers within the series.
    """

    patient: str
    numbers: list[int]
    places: list[int]


class Said(NamedTuple):
    """What a model says of a series or a slice: by output its value and the slice that spoke most, None where none stands out."""

    values: Float[np.ndarray, " outputs"]
    slices: list[int | None]


def series_of(source: SliceSource) -> dict[str, Series]:
    """The series of a source by pseudonym, without reformats, which show the same slices in another plane."""
    columns = source.index.select(["series", "patient", "index", "flags"]).to_pydict()
    found: dict[str, Series] = {}
    for number in sorted(range(len(source)), key=lambda number: (columns["series"][number], columns["index"][number])):
        if columns["flags"][number] & records.REFORMATTED:
            continue
        one = found.setdefault(columns["series"][number], Series(columns["patient"][number], [], []))
        one.numbers.append(number)
        one.places.append(columns["index"][number])
    return found


def schema(head: HeadConfig) -> pa.Schema:
    """Columns of the table; a value or a log hazard is not called a probability."""
    what = "probability" if head.target in ("classes", "labels") else "value"
    return pa.schema([
        ("id", pa.string()), ("series", pa.string()), ("class", pa.string()), (what, pa.float32()), ("slice", pa.int32()),
    ])  # fmt: skip


def rows(
    model: Classifier, source: SliceSource | None, volumes: str, *, batch_size: int, names: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
) -> pa.Table:  # fmt: skip
    """Rows of the series of a source.

    Args:
      source: None where no slice is left.
      volumes: of a model of single slices, "mean" or "max" over the slices of a series, or "each" slice.
      batch_size: slices at a time.
      names: what stands for the patient's pseudonym, by series.
      only: these series; all unless given.

    Raises:
      DataError: a slice cannot be read.
    """
    series = {} if source is None else series_of(source)
    if only is not None:
        series = {name: series[name] for name in only if name in series}
    if source is None or not series:
        return schema(model.head).empty_table()
    bags = [range(len(one.numbers)) for one in series.values()]
    if model.slices == 1:
        cases = [np.array([number]) for one in series.values() for number in one.numbers]
    else:
        bags = [data.spread(np.array(bag), model.slices) for bag in bags]
        cases = [np.array(one.numbers)[bag] for one, bag in zip(series.values(), bags, strict=True)]
    together = max(1, batch_size // model.slices)
    scores = model.scores(source, cases, together=together, canvas=canvas_of(source))
    columns: tuple[list, ...] = ([], [], [], [], [])
    start = 0
    for (name, one), bag in zip(series.items(), bags, strict=True):
        places = np.array(one.places)[np.array(bag)]
        count = len(places) if model.slices == 1 else 1
        outputs, by_slice = (values[start : start + count] for values in scores)
        start += count
        said = (
            _of_slices(model.head, outputs, places, volumes)
            if model.slices == 1
            else [_of_bag(model.head, outputs[0], by_slice[0], places)]
        )
        for values, slices in said:
            identity = (names or {}).get(name, one.patient)
            for column, found in zip(
                columns,
                ([identity] * len(values), [name] * len(values), model.head.names, values.tolist(), slices),
                strict=True,
            ):
                column += found
    return pa.Table.from_arrays(
        [pa.array(values, kind) for values, kind in zip(columns, schema(model.head).types, strict=True)],
        schema=schema(model.head),
    )


def _of_slices(
    head: HeadConfig, outputs: Float[np.ndarray, "slices outputs"], places: Int[np.ndarray, " slices"], volumes: str
) -> Iterator[Said]:
    if volumes == "each":
        for values, place in zip(outputs, places, strict=True):
            yield Said(values, [int(place)] * len(values))
        return
    highest: list[int | None] = [int(place) for place in places[outputs.argmax(axis=0)]]
    if volumes == "max":
        yield Said(outputs.max(axis=0), highest)
    else:
        yield Said(outputs.mean(axis=0), [None] if head.target == "value" else highest)


def _of_bag(
    head: HeadConfig,
    outputs: Float[np.ndarray, " outputs"],
    by_slice: Float[np.ndarray, "slices outputs"],
    places: Int[np.ndarray, " n"],
) -> Said:
    if head.kind == "linear" and head.target == "value":
        return Said(outputs, [None])
    return Said(outputs, [int(place) for place in places[by_slice[: len(places)].argmax(axis=0)]])
