"""Ways to damage bytes, for the benchmarks that fuzz readers. Each takes the bytes of a file and a random generator."""

import io
import json
import math
import random
import re
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Mutation = Callable[[bytes, random.Random], bytes]

# ---- any file


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the first thousand."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        out[rng.randrange(min(len(out), 1000))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def shuffle(data: bytes, rng: random.Random) -> bytes:
    """Cuts a piece out, doubles it, or fills it with one value."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 4, 16, 256, 4096)))
    what = rng.randrange(3)
    middle = (b"", data[start:end] * 2, bytes([rng.randrange(256)]) * (end - start))[what]
    return data[:start] + middle + data[end:]


NUMBERS = (0, 1, 2, 3, 7, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def number(data: bytes, rng: random.Random) -> bytes:
    """A 16 or 32 bit number somewhere becomes an extreme one: sizes, lengths, offsets."""
    out = bytearray(data)
    form = rng.choice(("<H", ">H", "<I", ">I"))
    at = rng.randrange(max(1, min(len(out), rng.choice((64, 512, 2000, len(out)))) - 4))
    struct.pack_into(form, out, at, rng.choice(NUMBERS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    return bytes(out)


def number_text(data: bytes, rng: random.Random) -> bytes:
    """A number in text form becomes another one: positions, slopes; sizes and types of NRRD and MetaImage."""
    found = [match for match in re.finditer(rb"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", data[:3000])]
    if not found:
        return flip(data, rng)
    match = rng.choice(found)
    text = rng.choice((b"0", b"-1", b"1e9", b"1e308", b"nan", b"inf", b"99999999999", b"4096", b"x", b""))
    return data[: match.start()] + text + data[match.end() :]


ANYWHERE: tuple[Mutation, ...] = (flip, flip, flip_header, truncate, shuffle, number, number)


# ---- JSON, Parquet and safetensors, of which any bit that flips is noticed, but not a hostile value

_DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(10**400), 0.5, 1e308, math.nan, math.inf, -math.inf, "", "x", "\n", "\0", "9" * 5000,
    "../../../etc/passwd", "é" * 1000, [], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": {"c": []}}}, "\ud800",
)  # fmt: skip


def json_value(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file becomes a hostile one, disappears, moves elsewhere, or is nested 100,000 deep."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # of a line that is damaged already
        return flip(data or b"x", rng)
    places = [(None, None), *_places(content)]
    holder, key = rng.choice(places)
    what = rng.random()
    if what < 0.05:
        return data.replace(b"[", _DEEP.encode(), 1) if rng.random() < 0.5 else _DEEP.encode()
    if holder is None:
        return json.dumps(rng.choice(HOSTILE)).encode()
    if what < 0.2:
        del holder[key]
    elif what < 0.3:
        other, name = rng.choice(places[1:])
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = rng.choice(HOSTILE)
    return json.dumps(content).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below a value of JSON, with each of its keys."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *_places(value[key])]
    return found


def json_line(data: bytes, rng: random.Random) -> bytes:
    """One line, or a few, of a file of JSON lines."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 3, len(lines)))):
        at = rng.randrange(len(lines))
        lines[at] = json_value(lines[at], rng) + b"\n"
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines)), bytes(rng.randrange(5000)))
    return b"".join(lines)


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON header of a safetensors file, with its length put right."""
    size = struct.unpack_from("<Q", data)[0]
    header = json_value(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def table(data: bytes, rng: random.Random) -> bytes:
    """A Parquet file with a column too few, of another type, of nulls or of extreme values; without rows; with rows twice."""
    found = pq.read_table(io.BytesIO(data))
    at = rng.randrange(found.num_columns)
    name, column = found.column_names[at], found.column(at)
    what = rng.randrange(8)
    if what == 0:
        found = found.drop_columns([name])
    elif what == 1:
        found = found.slice(0, rng.choice((0, 1)))
    elif what == 2:
        found = pa.concat_tables([found, found.slice(rng.randrange(len(found)))])
    elif what == 3:
        found = found.set_column(at, name, pa.nulls(len(found), column.type))
    elif what == 4:
        found = found.rename_columns([f"{one}_" if one == name else one for one in found.column_names])
    elif what == 5:
        found = found.replace_schema_metadata({b"shards": rng.choice((b"", b"x", b"-1", b"99999999999999999999"))})
    else:
        values = column.to_pylist()
        values[rng.randrange(len(values))] = (
            rng.choice((None, "", "x" * 10_000, "../../etc/passwd", "\0"))
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            else rng.choice((None, 0, -1, 2**31, 2**62, -(2**62), math.nan, 1e308, True, [1, -1], [2**40]))
        )
        if what == 7:  # the whole column
            values = [values[0]] * len(values)
        try:
            changed = pa.array(values)
            changed = changed.cast(column.type, safe=False) if rng.random() < 0.5 else changed
        except (pa.ArrowException, OverflowError):
            changed = pa.array([str(value) for value in values])
        found = found.set_column(at, name, changed)
    file = io.BytesIO()
    pq.write_table(found, file)
    return file.getvalue()


# ---- records


def example(data: bytes, rng: random.Random) -> bytes:
    """A record with a feature too few, of another kind, with values too many, too few or extreme, or a hostile encoded slice."""
    from data_pipeline.format import records

    message = records.Example.FromString(data)
    features = message.features.feature
    name = rng.choice(sorted(features))
    kind = features[name].WhichOneof("kind")
    what = rng.randrange(6)
    if what == 0:
        del features[name]
    elif what == 1:
        features[name].Clear()
        if rng.random() < 0.5:
            features[name].int64_list.value.extend([rng.choice((0, -1, 2**62))])
    elif what == 2 and kind:
        values = getattr(features[name], kind).value
        del values[rng.randrange(len(values)) :]
    elif what == 3 and kind:
        values = getattr(features[name], kind).value
        values.extend(list(values) * rng.choice((1, 100)))
    elif what == 4:
        slices = features["slices"].bytes_list.value
        at = rng.randrange(len(slices))
        height, width = rng.choice((0, 1, 32, 65535)), rng.choice((0, 1, 33, 65535))
        claimed = struct.pack("<BHH", rng.choice((0, 1, 2, 255)), height, width)
        packed = bytearray(slices[at][5:])
        if rng.random() < 0.5:  # blosc2's own header says the same
            struct.pack_into(
                "<II",
                packed,
                4,
                2 * height * width & 0xFFFFFFFF,
                rng.choice((0, 1, 2**31, 2 * height * width & 0xFFFFFFFF)),
            )
        slices[at] = rng.choice(
            (claimed + bytes(packed), claimed, b"", bytes(packed), flip(slices[at], rng), truncate(slices[at], rng))
        )
    elif kind:
        values = getattr(features[name], kind).value
        at = rng.randrange(len(values))
        values[at] = {
            "float_list": lambda: rng.choice((math.nan, math.inf, -1e38, 1e38, 0.0)),
            "int64_list": lambda: rng.choice((-(2**63), 2**63 - 1, -1, 0)),
            "bytes_list": lambda: rng.choice((b"", b"\xff\xfe", b"x" * 10_000, b"\0")),
        }[kind]()
    return message.SerializeToString(deterministic=True)
