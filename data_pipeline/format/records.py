"""What a record holds: slices of one series in spatial order, with the technical facts a model may use and nothing else.

A record is a tf.Example, so that the folder is a valid TFDS dataset; it is written and read here without TensorFlow, and
serialised deterministically, so that the same slices always give the same bytes.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt16
from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

from data_pipeline.format import codec

# One value per record.
TEXT = ("series", "patient", "modality", "units", "plane", "body_part", "manufacturer")
NUMBERS = ("slope", "intercept", "series_mean", "series_std")
VECTORS = {"spacing": 3, "series_percentiles": 3}  # mm: between rows, columns, slices (0 = unknown); p0.5, p50, p99.5
# One value per slice.
SLICE_NUMBERS = (
    "position",
    "low",
    "high",
    "mean",
    "std",
)  # mm along the normal; p0.5, p99.5, mean, deviation: real values
SLICE_INTEGERS = ("index", "flags")
SLICE_BOX = "body_box"  # top, left, bottom, right in px, half-open
SLICE_TEXT = ("source",)  # first 16 hex digits of the SHA-256 of the stored source pixels

# Bits of `flags`.
IRREGULAR = 1  # the series has gaps, repeated positions or a tilt: no reformatting
LOSSY = 2  # the source was compressed with loss
CLIPPED = 4  # values below -1024 HU (padding) were raised to it
RESIZED = 8  # smaller than the source's matrix
MODALITY_INFERRED = 16  # the source does not name its modality; the range of its values did
REFORMATTED = 32  # cut out of a regular series in another plane, at isotropic spacing


def serialize(slices: Sequence[bytes], record: Mapping[str, Any], per_slice: Mapping[str, Sequence[Any]]) -> bytes:
    """A record's bytes.

    Args:
      slices: encoded by codec.encode; all of one height and width.
      record: TEXT, NUMBERS and VECTORS by name.
      per_slice: SLICE_NUMBERS, SLICE_INTEGERS, SLICE_BOX and SLICE_TEXT by name, one entry a slice.
    """
    # Features in the order of their names, as protobuf's deterministic form has them. The slices are put between the others
    # as bytes, because protobuf copies them several times, into memory that is new each time.
    before, after = proto.Example().features, proto.Example().features

    def feature(name: str) -> Any:
        return (before if name < "slices" else after).feature[name]

    for name in TEXT:
        feature(name).bytes_list.value.append(str(record[name]).encode())
    for name in NUMBERS:
        feature(name).float_list.value.append(float(record[name]))
    for name, length in VECTORS.items():
        values = [float(v) for v in record[name]]
        if len(values) != length:
            raise ValueError(f"{name} has {len(values)} values, wanted {length}")
        feature(name).float_list.value.extend(values)
    for name in (*SLICE_NUMBERS, *SLICE_INTEGERS, *SLICE_TEXT, SLICE_BOX):
        if len(per_slice[name]) != len(slices):
            raise ValueError(f"{name} has {len(per_slice[name])} entries for {len(slices)} slices")
    for name in SLICE_NUMBERS:
        feature(name).float_list.value.extend(float(v) for v in per_slice[name])
    for name in SLICE_INTEGERS:
        feature(name).int64_list.value.extend(int(v) for v in per_slice[name])
    for name in SLICE_TEXT:
        feature(name).bytes_list.value.extend(str(v).encode() for v in per_slice[name])
    feature(SLICE_BOX).int64_list.value.extend(int(v) for box in per_slice[SLICE_BOX] for v in box)
    # Example.features = {feature: {key = "slices", value: {bytes_list: {value = …, value = …, …}}}}
    value = _field(1, [part for one in slices for part in _field(1, [one])])
    entry = _field(1, [*_field(1, [b"slices"]), *_field(2, value)])
    features = [before.SerializeToString(deterministic=True), *entry, after.SerializeToString(deterministic=True)]
    return b"".join(_field(1, features))


def _field(number: int, parts: Sequence[bytes]) -> list[bytes]:
    """A field of protobuf whose value is some bytes, given in parts: tag, length and the bytes
    (https://protobuf.dev/programming-guides/encoding/)."""
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


@dataclasses.dataclass(frozen=True)
class DecodedSlice:
    """A slice with everything its record says of it.

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


def parse_slice(data: bytes, slot: int) -> DecodedSlice:
    """Slice number `slot` of a record, decoded."""
    feature = proto.Example.FromString(data).features.feature

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
    feature = proto.Example.FromString(data).features.feature
    return feature["slices"].bytes_list.value[slot], _slice_facts(feature, slot)


def _slice_facts(feature: Mapping[str, Any], slot: int) -> SliceFacts:
    return SliceFacts(
        feature["slope"].float_list.value[0],
        feature["intercept"].float_list.value[0],
        feature["low"].float_list.value[slot],
        feature["high"].float_list.value[slot],
        feature["units"].bytes_list.value[0] == b"HU",
    )


def parse(data: bytes) -> dict[str, Any]:
    """Everything that a record holds, by the names above: one value per TEXT and NUMBERS, lists for the others.

    Returns:
      "slices": the encoded slices; "body_box": four numbers per slice; VECTORS; one entry per slice for the rest.

    Raises:
      ValueError: a field is missing or has not as many entries as there are slices.
    """
    feature = proto.Example.FromString(data).features.feature

    def values(name: str, kind: str, count: int) -> list[Any]:
        found = list(getattr(feature[name], f"{kind}_list").value) if name in feature else []
        if len(found) != count:
            raise ValueError(f"{name} has {len(found)} values, wanted {count}")
        return found

    slices = list(feature["slices"].bytes_list.value)
    count = len(slices)
    boxes = values(SLICE_BOX, "int64", 4 * count)
    record: dict[str, Any] = {"slices": slices}
    record |= {name: values(name, "bytes", 1)[0].decode() for name in TEXT}
    record |= {name: values(name, "float", 1)[0] for name in NUMBERS}
    record |= {name: values(name, "float", length) for name, length in VECTORS.items()}
    record |= {name: values(name, "float", count) for name in SLICE_NUMBERS}
    record |= {name: values(name, "int64", count) for name in SLICE_INTEGERS}
    record |= {name: [value.decode() for value in values(name, "bytes", count)] for name in SLICE_TEXT}
    return record | {SLICE_BOX: [tuple(boxes[n : n + 4]) for n in range(0, 4 * count, 4)]}


def count(data: bytes) -> int:
    """Number of slices in a record."""
    return len(proto.Example.FromString(data).features.feature["slices"].bytes_list.value)


def without(data: bytes, slots: Collection[int]) -> bytes | None:
    """A record without some of its slices; None where none is left."""
    record = parse(data)
    kept = [slot for slot in range(len(record["slices"])) if slot not in slots]
    if not kept:
        return None
    names = (*SLICE_NUMBERS, *SLICE_INTEGERS, *SLICE_TEXT, SLICE_BOX)
    per_slice = {name: [record[name][slot] for slot in kept] for name in names}
    return serialize([record["slices"][slot] for slot in kept], record, per_slice)


def slice_statistics(
    stored: UInt16[np.ndarray, "height width"], slope: float, intercept: float,
    counts: Int[np.ndarray, " levels"] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """low, high (p0.5, p99.5), mean and std in real values, and the body box of a slice.

    Percentiles come from the histogram of the stored values: exact for integers and several times faster than sorting.
    The body box is the bounding box of what lies above -500 HU-like air, taken as the middle between p0.5 and the mean.

    Args:
      counts: how many pixels have the stored value 0, 1, 2, …, up to the highest; counted unless given.
    """
    if counts is None:
        counts = np.bincount(stored.ravel())
    low, high = _percentiles(counts, (0.005, 0.995))
    values, total = np.arange(len(counts)), stored.size
    mean = int(counts @ values) / total  # whole numbers: exact, and a few thousand of them instead of all pixels
    std = (float(counts @ np.square(values - mean)) / total) ** 0.5 * slope
    # A whole number is above a threshold if it is above the whole number below: 16 bits are compared four times faster.
    inside = stored > np.uint16((low + mean) // 2)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else (0, 0, *stored.shape)
    return {
        "low": low * slope + intercept, "high": high * slope + intercept, "mean": mean * slope + intercept, "std": std,
        "body_box": tuple(int(v) for v in box),
    }  # fmt: skip


def series_statistics(histogram: np.ndarray, slope: float, intercept: float) -> dict[str, Any]:
    """series_percentiles (p0.5, p50, p99.5), series_mean and series_std in real values.

    Args:
      histogram: counts of the stored values 0, 1, 2, … over all slices of the series.
    """
    values = np.arange(len(histogram), dtype=np.float64)
    total = histogram.sum()
    mean = float((values * histogram).sum() / total)
    variance = float((np.square(values - mean) * histogram).sum() / total)
    percentiles = [v * slope + intercept for v in _percentiles(histogram, (0.005, 0.5, 0.995))]
    return {
        "series_percentiles": percentiles, "series_mean": mean * slope + intercept, "series_std": variance**0.5 * slope,
    }  # fmt: skip


def _percentiles(counts: np.ndarray, shares: Sequence[float]) -> list[float]:
    below = np.cumsum(counts)
    return [float(np.searchsorted(below, share * below[-1])) for share in shares]
