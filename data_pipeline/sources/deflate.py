"""Gzip, zlib and bzip2 streams, read to their end, where their checksum is."""

import bz2
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from typing import BinaryIO

from data_pipeline.sources.base import ReadError

GZIP = b"\x1f\x8b"  # the first bytes of a gzip stream
PIECE_BYTES = 1 << 24
WRONG_STREAM = "damaged {what}: its compressed data does not unpack to what its checksum says"


def inflated(source: BinaryIO | BufferedIOBase, what: str, most: int = PIECE_BYTES) -> Iterator[bytes]:
    """What a gzip or zlib stream holds, in pieces; at its end zlib compares the checksum, CRC-32 or Adler-32.

    Args:
      source: at the first byte of the stream; what follows its last one is not read.
      what: name of the stream, for the error message.
      most: bytes to read or to unpack at a time.

    Raises:
      ReadError: the stream is damaged or cut off.
    """
    inflate, gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32), None
    packed = b""
    while True:
        packed = packed or source.read(most)
        ended = not packed
        gzip = packed.startswith(GZIP) if gzip is None else gzip
        try:
            piece = inflate.decompress(packed, most)
        except zlib.error as error:
            raise ReadError(WRONG_STREAM.format(what=what)) from error
        if piece:
            yield piece
        elif ended and not inflate.eof:
            raise ReadError(f"damaged {what}: it is cut off")
        packed = inflate.unconsumed_tail
        if inflate.eof:
            packed = inflate.unused_data
            packed += source.read(len(GZIP) - len(packed)) if len(packed) < len(GZIP) else b""
            if not (gzip and packed.startswith(GZIP)):
                return
            inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # gzip streams may follow each other


def bunzipped(source: BinaryIO | BufferedIOBase, what: str) -> Iterator[bytes]:
    """What a bzip2 stream holds, in pieces; arguments and errors as for `inflated`."""
    with bz2.open(source) as file:
        while True:
            try:
                piece = file.read(PIECE_BYTES)
            except EOFError as error:
                raise ReadError(f"damaged {what}: it is cut off") from error
            except OSError as error:
                if error.errno:  # of the disk
                    raise
                raise ReadError(WRONG_STREAM.format(what=what)) from error
            if not piece:
                return
            yield piece
