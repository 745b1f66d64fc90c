"""Elements of plain DICOM files, read from memory in a tenth of the time that pydicom takes.

Plain is what almost every file is: it has its meta information, is little-endian, and its tags ascend. Of any other file nothing is
said here, and pydicom reads it (dicom_header.read_elements); of plain ones both say the same.
"""

import struct
import zlib
from collections.abc import Container
from typing import NamedTuple, cast

from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

from data_pipeline.sources.dicom_header import MAXIMUM_ELEMENTS, Element

_PREAMBLE, _META_GROUP, _TRANSFER_SYNTAX = 128, 2, 0x00020010
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# DICOM PS3.5 7.1.2 and 7.1.3: group, element, value representation and length; without a representation the length has four bytes.
_EXPLICIT, _IMPLICIT, _LONG = struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L")
_REPRESENTATIONS = {vr.encode(): str(vr) for vr in EXPLICIT_VR_LENGTH_16 | EXPLICIT_VR_LENGTH_32}
_WITH_LONG_LENGTH = frozenset(map(str, EXPLICIT_VR_LENGTH_32))
_SEQUENCES = ("SQ", None)


class PlainFile(NamedTuple):
    """Some elements of a file that precede its pixels.

    Attributes:
      content: of the file, inflated if it was deflated.
      fields: the wanted elements, in the order of their tags; equal in slices of a series, because they hold no offset.
      last, begin: the element at which reading ended, and the offset of its value in `content`.
    """

    content: bytes
    syntax: UID
    fields: tuple[RawDataElement, ...]
    last: Element
    begin: int


class _NotPlain(Exception):
    pass


def read_plain(content: bytes, tags: Container[int], stop: int, encapsulated: Container[str]) -> PlainFile | None:
    """The elements with these tags before the tag `stop`; None unless the file is plain and reaches it.

    Args:
      content: the whole file.
      encapsulated: transfer syntaxes of compressed pixels, whose headers are explicit and little-endian.
    """
    try:
        return _read_plain(content, tags, stop, encapsulated)
    except (_NotPlain, struct.error, zlib.error, UnicodeDecodeError):
        return None


def _read_plain(content: bytes, tags: Container[int], stop: int, encapsulated: Container[str]) -> PlainFile:
    if content[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        raise _NotPlain
    at, group, syntax = _PREAMBLE + 4, _META_GROUP, ""
    while content[at : at + 2] == b"\x02\0":
        tag, _, length, begin = _head(content, at, explicit=True)
        at = begin + length
        if tag == _TRANSFER_SYNTAX:
            syntax = content[begin:at].rstrip(b"\0 ").decode("ascii")
    if syntax == DeflatedExplicitVRLittleEndian:
        content, at = zlib.decompress(content[at:], -zlib.MAX_WBITS), 0
    elif syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian) and syntax not in encapsulated:
        raise _NotPlain
    explicit = syntax != ImplicitVRLittleEndian
    if not explicit and content[at + 4 : at + 6].isupper():
        raise _NotPlain  # explicit after all
    fields, before = [], group << 16 | 0xFFFF
    for _ in range(MAXIMUM_ELEMENTS):
        tag, representation, length, begin = _head(content, at, explicit=explicit)
        if tag <= before:
            raise _NotPlain
        if tag >= stop:
            return PlainFile(content, UID(syntax), tuple(fields), Element(tag, representation, length), begin)
        before = tag
        if length == _UNDEFINED:
            if tag in tags or representation not in _SEQUENCES:
                raise _NotPlain
            at = _end_of_sequence(content, begin, explicit=explicit)
            continue
        at = begin + length
        if tag in tags:
            value = content[begin:at] if length else cast(bytes | None, empty_value_for_VR(representation, raw=True))
            fields.append(RawDataElement(BaseTag(tag), representation, length, value, 0, not explicit, True))
    raise _NotPlain


def _head(content: bytes, at: int, *, explicit: bool) -> tuple[int, str | None, int, int]:
    """Tag, value representation and length of the element at an offset, and the offset of its value."""
    if not explicit:
        group, number, length = _IMPLICIT.unpack_from(content, at)
        return group << 16 | number, None, length, at + 8
    group, number, code, length = _EXPLICIT.unpack_from(content, at)
    representation = _REPRESENTATIONS.get(code)
    if representation is None:
        raise _NotPlain
    if representation not in _WITH_LONG_LENGTH:
        return group << 16 | number, representation, length, at + 8
    return group << 16 | number, representation, _LONG.unpack_from(content, at + 8)[0], at + 12


def _end_of_sequence(content: bytes, at: int, *, explicit: bool) -> int:
    """The offset after a sequence of undefined length, whose first item is at an offset."""
    in_sequence = [True]  # for whatever is open, from outside to inside: a sequence, or else an item
    while in_sequence:
        group, number, length = _IMPLICIT.unpack_from(content, at)
        tag = group << 16 | number
        if in_sequence[-1]:
            at += 8
            if tag == _SEQUENCE_END:
                in_sequence.pop()
            elif tag != _ITEM:
                raise _NotPlain
            elif length == _UNDEFINED:
                in_sequence.append(False)
            else:
                at += length
        elif tag == _ITEM_END:
            in_sequence.pop()
            at += 8
        else:
            _, representation, length, at = _head(content, at, explicit=explicit)
            if length != _UNDEFINED:
                at += length
            elif representation in _SEQUENCES:
                in_sequence.append(True)
            else:
                raise _NotPlain
    return at
