"""What a record holds: slices of one series in spatial order, with the technical facts a model may use and nothing else.

A record is a tf.Example, so that the folder is a valid TFDS dataset. It is written and read here without TensorFlow, and
serialized deterministically, so that the same slices always give the same bytes.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt16
from tensorflow_datasets.proto import tf_example_generated_pb2

from data_pipeline.format import codec

# Protobuf makes its classes at import.
Example = tf_example_generated_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] - see above

# Names of the features. One value per record:
TEXT = ("series", "patient", "modality", "units", "plane", "body_part", "manufacturer")
NUMBERS = ("slope", "intercept", "series_mean", "series_std")
VECTORS = {"spacing": 3, "series_percentiles": 3}
# One value per slice:
SLICE_NUMBERS = ("position", "low", "high", "mean", "std")
SLICE_INTEGERS = ("index", "flags")
SLICE_BOX = "body_box"
SLICE_TEXT = ("source",)

# Bits of `flags`.
IRREGULAR = 1  # the series has gaps, repeated positions or a tilt: no reformatting
LOSSY = 2  # the source was compressed with loss
CLIPPED = 4  # padding became air (in other units the lowest value), and what lay below -1024 HU too; or extreme voxels of a volume
RESIZED = 8  # smaller than the source's matrix
MODALITY_INFERRED = 16  # the source does not name its modality; the range of its values did
REFORMATTED = 32  # cut out of a regular series in another plane, at isotropic spacing


@dataclasses.dataclass(frozen=True)
class SeriesFacts:
    """What all slices of a series share.

    Attributes:
      series, patient: pseudonyms.
      modality: "CT", "MR" or "OT".
      units: "HU" or "arbitrary".
    """

    series: str
    patient: str
    modality: str
    units: str
    plane: str
    body_part: str
    manufacturer: str


@dataclasses.dataclass(frozen=True)
class RecordHeader(SeriesFacts):
    """What all slices of a record share; real value = stored value * slope + intercept.

    Attributes:
      series_mean, series_std: of the series, real values.
      spacing: mm between rows, columns and slices; 0 where unknown.
      series_percentiles: p0.5, p50 and p99.5 of the series, real values.
    """

    slope: float
    intercept: float
    series_mean: float
    series_std: float
    spacing: Sequence[float]
    series_percentiles: Sequence[float]


class SliceEntry(NamedTuple):
    """What a record says of one slice beside its pixels.

    Attributes:
      position: mm along the normal of the slices.
      low, high, mean, std: 0.5 and 99.5 percentile, mean and standard deviation, real values.
      index: number of the slice within its series.
      flags: bits named above.
      body_box: top, left, bottom, right in px, half-open.
      source: first 16 hex digits of the SHA-256 of the stored source pixels.
    """

    position: float
    low: float
    high: float
    mean: float
    std: float
    index: int
    flags: int
    body_box: tuple[int, int, int, int]
    source: str


class Record(NamedTuple):
    """A parsed record; `slices` are encoded by the codec, `entries` belong to them one by one."""

    header: RecordHeader
    slices: list[bytes]
    entries: list[SliceEntry]


def index_row(header: RecordHeader, entry: SliceEntry, shape: Sequence[int]) -> dict[str, str | int | float]:
    """The columns of index.parquet that follow from a record.

    Args:
      shape: height and width of the slice, px.
    """
    row: dict[str, str | int | float] = {name: getattr(header, name) for name in (*TEXT, *NUMBERS)}
    row["spacing_rows"], row["spacing_columns"], row["spacing_slices"] = header.spacing
    row |= {name: getattr(entry, name) for name in (*SLICE_NUMBERS, *SLICE_INTEGERS, *SLICE_TEXT)}
    return row | {"height": shape[0], "width": shape[1]}


def serialize(slices: Sequence[bytes], header: RecordHeader, entries: Sequence[SliceEntry]) -> bytes:
    """A record's bytes.

    Args:
      slices: encoded by codec.encode; all of one height and width.
      entries: one per slice.

    Raises:
      ValueError: a vector or the entries have another length than they should.
    """
    # Features in the order of their names, as protobuf's deterministic form has them. The slices are put between the others
    # as bytes, because protobuf copies them several times, into memory that is new each time.
    before, after = Example().features, Example().features

    def feature(name: str) -> Any:
        return (before if name < "slices" else after).feature[name]

    if len(entries) != len(slices):
        raise ValueError(f"{len(entries)} entries for {len(slices)} slices; each slice needs one")
    for name in TEXT:
        feature(name).bytes_list.value.append(getattr(header, name).encode())
    for name in NUMBERS:
        feature(name).float_list.value.append(float(getattr(header, name)))
    for name, length in VECTORS.items():
        values = [float(v) for v in getattr(header, name)]
        if len(values) != length:
            raise ValueError(f"{name} has {len(values)} values; it needs {length}")
        feature(name).float_list.value.extend(values)
    for name in SLICE_NUMBERS:
        feature(name).float_list.value.extend(float(getattr(entry, name)) for entry in entries)
    for name in SLICE_INTEGERS:
        feature(name).int64_list.value.extend(int(getattr(entry, name)) for entry in entries)
    for name in SLICE_TEXT:
        feature(name).bytes_list.value.extend(getattr(entry, name).encode() for entry in entries)
    feature(SLICE_BOX).int64_list.value.extend(int(side) for entry in entries for side in entry.body_box)
    # Example.features = {feature: {key = "slices", value: {bytes_list: {value = …, value = …, …}}}}
    value = _field(1, [part for one in slices for part in _field(1, [one])])
    entry = _field(1, [*_field(1, [b"slices"]), *_field(2, value)])
    features = [before.SerializeToString(deterministic=True), *entry, after.SerializeToString(deterministic=True)]
    return b"".join(_field(1, features))


def _field(number: int, parts: Sequence[bytes]) -> list[bytes]:
    """A protobuf field of bytes that come in parts: tag, length, bytes (https://protobuf.dev/programming-guides/encoding/)."""
    length, head = sum(map(len, parts)), bytearray([number << 3 | 2])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return [bytes(head), *parts]


class SliceFacts(NamedTuple):
    """What training needs to know of a slice; real value = stored * slope + intercept.

    Attributes:
      low, high: 0.5 and 99.5 percentile, real values.
      hu: real values are Hounsfield units.
    """

    slope: float
    intercept: float
    low: float
    high: float
    hu: bool


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedSlice(Mapping[str, Any]):
    """A slice with everything its record says of it; also a mapping of its fields and facts: one["pixels"], one.get("slope").

    Attributes:
      pixels: stored values.
      mean, std: real values.
      body_box: top, left, bottom, right in px, half-open.
      spacing: mm between rows, columns and slices; 0 where unknown.
      series, patient: pseudonyms.
    """

    pixels: UInt16[np.ndarray, "height width"]
    facts: SliceFacts
    mean: float
    std: float
    body_box: tuple[int, int, int, int]
    spacing: tuple[float, float, float]
    modality: str
    plane: str
    body_part: str
    series: str
    patient: str

    @property
    def real(self) -> Float32[np.ndarray, "height width"]:
        """HU, or the series' own units."""
        return self.pixels.astype(np.float32) * np.float32(self.facts.slope) + np.float32(self.facts.intercept)

    def _row(self) -> dict[str, Any]:
        return vars(self) | self.facts._asdict()

    def __getitem__(self, name: str) -> Any:
        return self._row()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row())

    def __len__(self) -> int:
        return len(self._row())


def parse_slice(data: bytes, slot: int) -> DecodedSlice:
    """Slice number `slot` of a record, decoded."""
    feature = Example.FromString(data).features.feature

    def text(name: str) -> str:
        return feature[name].bytes_list.value[0].decode()

    box = feature[SLICE_BOX].int64_list.value[4 * slot : 4 * slot + 4]
    spacing = feature["spacing"].float_list.value
    return DecodedSlice(
        pixels=codec.decode(feature["slices"].bytes_list.value[slot]),
        facts=_slice_facts(feature, slot),
        mean=feature["mean"].float_list.value[slot],
        std=feature["std"].float_list.value[slot],
        body_box=(box[0], box[1], box[2], box[3]),
        spacing=(spacing[0], spacing[1], spacing[2]),
        modality=text("modality"),
        plane=text("plane"),
        body_part=text("body_part"),
        series=text("series"),
        patient=text("patient"),
    )


def training_slice(data: bytes, slot: int) -> tuple[bytes, SliceFacts]:
    """Slice number `slot` of a record, still encoded, and what training needs to know of it."""
    feature = Example.FromString(data).features.feature
    return feature["slices"].bytes_list.value[slot], _slice_facts(feature, slot)


def _slice_facts(feature: Mapping[str, Any], slot: int) -> SliceFacts:
    return SliceFacts(
        feature["slope"].float_list.value[0],
        feature["intercept"].float_list.value[0],
        feature["low"].float_list.value[slot],
        feature["high"].float_list.value[slot],
        feature["units"].bytes_list.value[0] == b"HU",
    )


def parse(data: bytes) -> Record:
    """Everything that a record holds.

    Raises:
      ValueError: a field is missing or does not have one value per slice.
    """
    feature = Example.FromString(data).features.feature

    def values(name: str, kind: str, count: int) -> list[Any]:
        found = list(getattr(feature[name], f"{kind}_list").value) if name in feature else []
        if len(found) != count:
            raise ValueError(f"{name} has {len(found)} values; it needs {count}")
        return found

    slices = list(feature["slices"].bytes_list.value)
    count = len(slices)
    header = RecordHeader(
        *(values(name, "bytes", 1)[0].decode() for name in TEXT),
        *(values(name, "float", 1)[0] for name in NUMBERS),
        *(values(name, "float", length) for name, length in VECTORS.items()),
    )
    columns = [values(name, "float", count) for name in SLICE_NUMBERS]
    columns += [values(name, "int64", count) for name in SLICE_INTEGERS]
    boxes = values(SLICE_BOX, "int64", 4 * count)
    columns.append([tuple(boxes[4 * slot : 4 * slot + 4]) for slot in range(count)])
    columns += [[value.decode() for value in values(name, "bytes", count)] for name in SLICE_TEXT]
    return Record(header, slices, [SliceEntry(*row) for row in zip(*columns, strict=True)])


def count(data: bytes) -> int:
    """Number of slices in a record."""
    return len(Example.FromString(data).features.feature["slices"].bytes_list.value)


def without(data: bytes, slots: Collection[int]) -> bytes | None:
    """A record without the slices at `slots`; None if none is left."""
    record = parse(data)
    kept = [slot for slot in range(len(record.slices)) if slot not in slots]
    if not kept:
        return None
    return serialize([record.slices[n] for n in kept], record.header, [record.entries[n] for n in kept])
