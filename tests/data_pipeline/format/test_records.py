import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.format import codec, records

RANDOM = np.random.default_rng(0)


def record(count: int) -> tuple[list[np.ndarray], records.RecordHeader, list[records.SliceEntry]]:
    pixels = [RANDOM.integers(0, 3000, (33, 47)).astype(np.uint16) for _ in range(count)]
    header = records.RecordHeader(
        series=f"series {count}", patient=f"patient {count}", modality="CT", units="HU", plane="axial", body_part="chest",
        manufacturer="ge", slope=1.0, intercept=-1024.0, series_mean=1.5, series_std=2.5, spacing=(0.5, 0.75, 3.0),
        series_percentiles=(-1000.0, 0.0, 900.0),
    )  # fmt: skip
    entries = [
        records.SliceEntry(
            position=0.25 * n, low=1 + 0.25 * n, high=2 + 0.25 * n, mean=3 + 0.25 * n, std=4 + 0.25 * n, index=n, flags=1,
            body_box=(n, 1, 20 + n, 30), source=f"s{n}",
        )
        for n in range(count)
    ]  # fmt: skip
    return pixels, header, entries


@pytest.mark.parametrize("count", [1, 3])
def test_record_round_trip(count: int) -> None:
    pixels, header, entries = record(count)
    data = records.serialize([codec.encode(p) for p in pixels], header, entries)
    parsed = records.parse(data)
    vectors = {"spacing": list(header.spacing), "series_percentiles": [-1000.0, 0.0, 900.0]}
    assert parsed.header == dataclasses.replace(header, **vectors)
    assert parsed.entries == entries
    assert records.count(data) == count
    for slot in range(count):
        found = records.parse_slice(data, slot)
        np.testing.assert_array_equal(found.pixels, pixels[slot])
        entry = entries[slot]
        assert found.facts == records.SliceFacts(1.0, -1024.0, entry.low, entry.high, hu=True)
        assert (found.mean, found.std, found.body_box) == (entry.mean, entry.std, entry.body_box)
        assert (found.spacing, found.modality) == ((0.5, 0.75, 3.0), "CT")
        assert (found.series, found.patient) == (header.series, header.patient)
        np.testing.assert_array_equal(found.real, pixels[slot].astype(np.float32) - 1024)


def test_decoded_slice_is_a_mapping_of_its_fields_and_facts() -> None:
    pixels, header, entries = record(1)
    one = records.parse_slice(records.serialize([codec.encode(pixels[0])], header, entries), 0)
    assert one["pixels"] is one.pixels and one["facts"] is one.facts
    assert (one["slope"], one.get("intercept"), one["low"], one["high"], one["hu"]) == one.facts
    assert one.get("no such field", 7) == 7 and "spacing" in one and "real" not in one
    assert len(one) == len(dict(one.items())) == len(dataclasses.fields(one)) + len(records.SliceFacts._fields)
    with pytest.raises(KeyError, match="no such field"):
        one["no such field"]


@pytest.mark.parametrize("sizes", [[1], [0, 127, 128], [5] * 40, [16_383, 16_384, 2_100_000]])
def test_record_has_bytes_of_deterministic_protobuf(sizes: list[int]) -> None:
    _, header, entries = record(len(sizes))
    slices = [RANDOM.bytes(size) for size in sizes]
    data = records.serialize(slices, header, entries)
    example = records.Example.FromString(data)
    assert list(example.features.feature["slices"].bytes_list.value) == slices
    assert example.SerializeToString(deterministic=True) == data
    assert {*example.features.feature} == {
        "slices", *records.TEXT, *records.NUMBERS, *records.VECTORS, *records.SLICE_NUMBERS, *records.SLICE_INTEGERS,
        *records.SLICE_TEXT, records.SLICE_BOX,
    }  # fmt: skip


def test_every_process_serializes_the_same_bytes() -> None:
    # A protobuf map has another order in every process unless it is serialized deterministically.
    code = (
        "import hashlib, numpy as np\nfrom data_pipeline.format import codec, records\n"
        "header = records.RecordHeader(*['1'] * 7, *[1.0] * 4, [0.0] * 3, [0.0] * 3)\n"
        "entry = records.SliceEntry(*[1.0] * 5, 1, 1, (0, 0, 1, 1), '1')\n"
        "data = records.serialize([codec.encode(np.zeros((4, 4), np.uint16))], header, [entry])\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": str(n)}
        )
        for n in range(4)
    ]
    assert len({one.communicate()[0] for one in running}) == 1
    assert all(one.returncode == 0 for one in running)


def test_serialize_rejects_wrong_lengths() -> None:
    pixels, header, entries = record(2)
    data = [codec.encode(p) for p in pixels]
    with pytest.raises(ValueError, match="spacing has 2 values; it needs 3"):
        records.serialize(data, dataclasses.replace(header, spacing=(1.0, 2.0)), entries)
    with pytest.raises(ValueError, match="1 entries for 2 slices"):
        records.serialize(data, header, entries[:1])


def test_record_without_slices_keeps_the_others() -> None:
    pixels, header, entries = record(3)
    data = records.serialize([codec.encode(p) for p in pixels], header, entries)
    left = records.without(data, {1})
    assert left == records.serialize([codec.encode(pixels[n]) for n in (0, 2)], header, [entries[0], entries[2]])
    assert records.without(data, {0, 1, 2}) is None
