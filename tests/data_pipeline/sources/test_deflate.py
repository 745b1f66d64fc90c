"""Compressed streams are read to their checksum."""

import bz2
import gzip
import io
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from data_pipeline.sources import deflate
from data_pipeline.sources.base import ReadError

DATA = np.random.default_rng(0).integers(0, 9, 5000).astype(np.uint8).tobytes()
KINDS: dict[str, tuple[Callable[[bytes], bytes], Callable[..., Iterator[bytes]]]] = {
    "gzip": (gzip.compress, deflate.inflated),
    "zlib": (zlib.compress, deflate.inflated),
    "bzip2": (bz2.compress, deflate.bunzipped),
}
each_kind = pytest.mark.parametrize(("pack", "unpack"), KINDS.values(), ids=KINDS)


def read(unpack: Callable[..., Iterator[bytes]], packed: bytes, **options: int) -> bytes:
    return b"".join(unpack(io.BytesIO(packed), "volume", **options))


@each_kind
def test_stream_is_unpacked_whole(pack, unpack) -> None:
    for data in (DATA, b""):
        assert read(unpack, pack(data)) == data


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_pieces_are_no_larger_than_asked_for(pack) -> None:
    zeros = bytes(100_000)
    pieces = list(deflate.inflated(io.BytesIO(pack(zeros)), "volume", most=64))
    assert b"".join(pieces) == zeros and max(map(len, pieces)) <= 64


@each_kind
def test_stream_that_is_cut_off_is_refused_wherever_it_is_cut(pack, unpack) -> None:
    packed = pack(DATA)
    for end in (len(packed) - 1, len(packed) - 5, len(packed) // 2, 3):
        with pytest.raises(ReadError, match="damaged volume: it is cut off"):
            read(unpack, packed[:end])


@each_kind
def test_wrong_checksum_is_refused(pack, unpack) -> None:
    packed = bytearray(pack(DATA))
    # The last byte of zlib is its checksum's; gzip has the length after it, bzip2 bits that fill the last byte.
    packed[{"gzip": -6, "zlib": -1, "bzip2": -4}[next(name for name, kind in KINDS.items() if kind[0] is pack)]] ^= 1
    with pytest.raises(
        ReadError, match="damaged volume: its compressed data does not unpack to what its checksum says"
    ):
        read(unpack, bytes(packed))


def test_gzip_streams_may_follow_each_other() -> None:
    packed = gzip.compress(b"first ") + gzip.compress(b"second")
    for most in (2, 7, 1000):
        assert read(deflate.inflated, packed, most=most) == b"first second"


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
@pytest.mark.parametrize("tail", [b"\0", b"\0" * 512, b"text"])
def test_bytes_after_a_stream_are_not_its_data(pack, tail: bytes) -> None:
    assert read(deflate.inflated, pack(DATA) + tail) == DATA


def test_zlib_stream_is_not_continued_by_gzip() -> None:
    assert read(deflate.inflated, zlib.compress(DATA) + gzip.compress(b"other")) == DATA


@each_kind
def test_errors_of_the_disk_are_no_damage(pack, unpack) -> None:
    class Failing(io.BytesIO):
        def read(self, *unused: object) -> bytes:
            raise OSError(5, "Input/output error")

        readinto = read

    with pytest.raises(OSError, match="Input/output error") as error:
        b"".join(unpack(Failing(pack(DATA)), "volume"))
    assert error.value.errno == 5
