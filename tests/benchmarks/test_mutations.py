"""Damaged bytes follow from the seed, and the files whose form is kept can still be parsed."""

import io
import json
import random
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import mutations
from benchmarks.mutations import Mutation
from data_pipeline.format import records

JSON = json.dumps({"a": [1, 2, {"b": "x"}], "c": None}).encode()
LINES = b"".join(json.dumps({"step": n, "loss": 0.5}).encode() + b"\n" for n in range(5))


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": ["a", "b", "c"], "n": [1, 2, 3]}), file)
    return file.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def example() -> bytes:
    message = records.Example()
    message.features.feature["slices"].bytes_list.value.append(struct.pack("<BHH", 1, 8, 8) + bytes(40))
    message.features.feature["slope"].float_list.value.extend([1.0, 2.0])
    message.features.feature["rows"].int64_list.value.append(8)
    return message.SerializeToString()


def text() -> bytes:
    return b"NRRD0005\ntype: short\nsizes: 4 4 2\nspacings: 0.5 0.5 2\n\n" + bytes(64)


SOUND: dict[Mutation, Callable[[], bytes]] = {
    **dict.fromkeys(mutations.ANYWHERE, text), mutations.number_text: text,
    mutations.json_value: lambda: JSON, mutations.json_line: lambda: LINES,
    mutations.safetensors_header: safetensors, mutations.table: parquet, mutations.example: example,
}  # fmt: skip


def damaged(mutate: Mutation, count: int = 40) -> list[bytes]:
    return [mutate(SOUND[mutate](), random.Random(seed)) for seed in range(count)]


@pytest.mark.parametrize("mutate", SOUND, ids=lambda one: one.__name__)
def test_mutation_follows_from_the_seed_and_changes_the_bytes(mutate: Mutation) -> None:
    found = damaged(mutate)
    assert found == damaged(mutate)
    sound = SOUND[mutate]()
    # Some choices happen to write what was there.
    assert sum(one != sound for one in found) > 0.7 * len(found)
    assert len(set(found)) > 5


def test_truncate_leaves_a_beginning() -> None:
    for one in damaged(mutations.truncate):
        assert text().startswith(one) and 0 < len(one) < len(text())


def test_flip_keeps_the_length_and_changes_at_most_64_bits() -> None:
    for one in damaged(mutations.flip):
        changed = np.frombuffer(one, np.uint8) ^ np.frombuffer(text(), np.uint8)
        assert np.unpackbits(changed).sum() <= 64


def test_safetensors_header_has_its_length_put_right() -> None:
    for one in damaged(mutations.safetensors_header):
        (size,) = struct.unpack_from("<Q", one)
        assert len(one) == 8 + size + 8  # the header's length, header, tensors


def test_mutated_tables_are_parquet_of_another_content() -> None:
    tables = [pq.read_table(io.BytesIO(one)) for one in damaged(mutations.table)]
    assert len({(tuple(one.column_names), one.num_rows) for one in tables}) > 3


def test_mutated_examples_parse_as_examples() -> None:
    found = [records.Example.FromString(one) for one in damaged(mutations.example)]
    assert len({tuple(sorted(one.features.feature)) for one in found}) > 1


def test_mutated_json_lines_keep_the_other_lines() -> None:
    sound = set(LINES.splitlines())
    assert any(0 < len(sound & set(one.splitlines())) < len(sound) for one in damaged(mutations.json_line))
