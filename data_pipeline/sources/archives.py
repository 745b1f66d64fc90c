"""Zip and tar archives as inputs: their members are read where they lie, each as a file of its own.

A member has the path `archive.zip!/folder/name`. An archive is listed once; after that a member is (offset, bytes, method) in a
file or an object of a bucket, so that any worker reads it directly, in any order, without the archive's table of contents.

  .zip                              read in place; stored (method 0) or deflated (8)
  .tar                              read in place
  .tar.gz .tar.zst .tar.bz2 .tar.xz no random access: a plain tar of each is kept in the build folder until the commit

No file is written under a name that an archive gives. Sizes that an archive states are checked against the bytes it has.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from curia_common.errors import StorageError, UserError
from data_pipeline.format import files
from data_pipeline.sources import deflate, object_stores
from data_pipeline.sources.base import Heartbeat, ReadError
from data_pipeline.sources.retry import TRANSIENT, retry_transient

SUFFIXES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNREAD = (".7z", ".rar", ".lzh", ".arj", ".cab", ".iso")

MEMBERS = 2_000_000  # a public archive of 900,000 slices in one zip exists
MEMBER_BYTES = 8 << 30
RATIO, RATIO_BYTES = 200, 1 << 30  # what unpacks to more than both this many bytes and times its size is not an image
PIECE = 1 << 16  # bytes read at a time, because a header is shorter
NAME_BYTES = 1 << 20  # of an extended tar header; PATH_MAX is 4,096
LONGEST_NAME = 4096
STORED, DEFLATED = 0, 8
NO_CHECKSUM = -1


class Member(NamedTuple):
    """Where the bytes of a member are; plain values, so that JSON holds it as a list.

    Attributes:
      archive: the archive's path; archive_size (bytes) and modified_ns show whether it changed during the build.
      copy: name of the unpacked copy in the build folder that holds the bytes, or "" for the archive itself.
      offset: of the data in a tar, of the member's own header in a zip.
      packed, size: bytes before and after unpacking.
      method: of zip.
      checksum: CRC-32 of the unpacked bytes, or NO_CHECKSUM.
      problem: why it is not read, or "".
    """

    archive: str
    archive_size: int
    modified_ns: int
    copy: str
    name: str
    offset: int
    packed: int
    size: int
    method: int
    checksum: int
    problem: str

    @property
    def path(self) -> str:
        return f"{self.archive}!/{self.name}"


class Listing(NamedTuple):
    """The members of an archive, and what is wrong with it as a whole, or ""."""

    archive: object_stores.Object
    members: list[Member]
    problem: str


def folder(output: str | Path) -> str:
    """Folder of copies and single members of archives during a build: private, because they hold names."""
    return os.path.join(output, ".build", "unpacked")


def unpacked_name(path: str) -> str:
    """The path without the .gz of a single file that was compressed on its own (a.dcm.gz); NIfTI's own form (.nii.gz) keeps it."""
    low = path.lower()
    own = low.endswith((".nii.gz", ".img.gz", *COMPRESSED))
    return path[: -len(".gz")] if low.endswith(".gz") and not own else path


def is_archive(path: str) -> bool:
    """By its name: `dose.tar` is one, `dose.tar.dcm` is not."""
    return path.lower().endswith((*SUFFIXES, *COMPRESSED))


# ---- listing


def list_members(task: tuple[str, str, int], skip: Mapping[str, str], heartbeat: Heartbeat) -> Listing:
    """The members of one archive; the work of one task of workers.run. Never raises for what an archive holds.

    Args:
      task: the archive, the folder for unpacked copies, and the bytes that all copies together may take.
      skip: archives that must not be opened, with the reason.

    Raises:
      UserError: copies would take more than that.
      StorageError: the storage fails.
      OSError: the disk is full.
    """
    path, folder, limit = task
    try:
        archive, regular = retry_transient(lambda: _state(path), heartbeat, path)
    except OSError as error:
        return Listing(object_stores.Object(path, 0, 0), [], f"cannot be read: {error.strerror}")
    if path in skip:
        return Listing(archive, [], skip[path])
    heartbeat(path)
    try:
        if not regular:
            raise ReadError(UNLISTED if os.path.isdir(path) else NO_FILE)
        if archive.size == 0:
            raise ReadError("empty file")
        members, problem = retry_transient(lambda: _members(archive, folder, limit, heartbeat), heartbeat, path)
    except ReadError as error:
        members, problem = [], str(error)
    heartbeat(None)
    members = _sanitized(members)
    if not members and not problem:
        problem = "an archive without files"
    return Listing(archive, members, problem)


def _state(path: str) -> tuple[object_stores.Object, bool]:
    """An archive, and whether it is a regular file or an object."""
    if object_stores.is_address(path):
        return object_stores.head(path), True
    status = os.stat(path)
    return object_stores.Object(path, status.st_size, status.st_mtime_ns), stat.S_ISREG(status.st_mode)


def _members(archive: object_stores.Object, folder: str, limit: int, heartbeat: Heartbeat) -> tuple[list[Member], str]:
    """The members that an archive lists, and what is wrong with the rest, or ""."""
    if archive.path.lower().endswith(".zip"):
        return list(_zip_members(archive, heartbeat)), ""
    if archive.path.lower().endswith(".tar"):
        with _open(archive, heartbeat, archive.path) as file:
            return _tar_members(archive, file, archive.size, "")
    copy, problem = _unpack(archive, folder, limit, heartbeat)
    path = os.path.join(folder, copy)
    with open(path, "rb") as file:
        members, of_tar = _tar_members(archive, file, os.path.getsize(path), copy)
    return members, problem or of_tar


def _open(
    source: object_stores.Object, heartbeat: Heartbeat, item: str, first: int = object_stores.HEADER_BYTES
) -> io.BufferedIOBase:
    """A file or an object. The first request to a bucket is for `first` bytes."""
    if object_stores.is_address(source.path):
        return io.BufferedReader(object_stores.Reader(source, heartbeat, item, first), PIECE)
    return open(source.path, "rb")


def _zip_members(archive: object_stores.Object, heartbeat: Heartbeat) -> Iterator[Member]:
    try:
        with _open(archive, heartbeat, archive.path) as raw, zipfile.ZipFile(raw) as file:
            infos = file.infolist()
    except UserError:
        raise
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        raise ReadError(f"cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile raises many kinds on damaged tables of contents
        raise ReadError(
            f"damaged zip archive: its table of contents cannot be read ({type(error).__name__})"
        ) from error
    if len(infos) > MEMBERS:
        raise ReadError(f"{len(infos):,} members; an archive may have {MEMBERS:,}: unpack it")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ReadError("damaged zip archive: members share their bytes")
        end = info.header_offset + info.compress_size
    if problem := _too_large(archive.size, sum(info.file_size for info in infos)):
        raise ReadError(problem)
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or info.filename.endswith("\\"):
            continue
        problem = ""
        if kind == stat.S_IFLNK:
            problem = _LINK
        elif kind not in (0, stat.S_IFREG):
            problem = NO_FILE
        elif info.flag_bits & 0x1:
            problem = "encrypted in its archive: unpack it with the password"
        elif info.compress_type not in (STORED, DEFLATED):
            problem = f"packed by method {info.compress_type}, which is not read: unpack it, or pack it deflated"
        elif info.compress_type == STORED and info.compress_size != info.file_size:
            problem = "damaged zip archive: two sizes for one member"
        yield Member(
            *archive, "", info.filename, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC, problem
        )  # fmt: skip


_LINK = "a link in an archive, which is not followed"
NO_FILE = "neither a file nor a folder"
UNLISTED = "the folder cannot be listed"
_CUT = "cut off with its archive"


def _tar_members(
    archive: object_stores.Object, file: io.BufferedIOBase, end: int, copy: str
) -> tuple[list[Member], str]:
    """The readable members of a plain tar file of `end` bytes, and what is wrong with the rest, or ""."""
    members: list[Member] = []
    own: dict[str, str] = {}  # from extended headers, for the next member
    offset = 0
    while offset < end:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return members, ""  # a block of zeros ends the archive
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(own.get("size", info.size))
            if size < 0:
                raise ValueError
        except (tarfile.HeaderError, ValueError) as error:
            if not members and offset == 0:
                raise ReadError("damaged tar archive: it does not begin with a member") from error
            return members, f"damaged tar archive: after {len(members):,} members nothing can be read"
        offset += tarfile.BLOCKSIZE
        if info.type in _EXTENDED:
            if size > NAME_BYTES:
                return members, f"damaged tar archive: an extended header of {size:,} bytes"
            text = file.read(size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                own |= _pax(text)
            offset += _padded(size)
            continue
        regular = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        data = offset
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more and offset < end:
                more = (file.read(tarfile.BLOCKSIZE) + b"\0" * tarfile.BLOCKSIZE)[504]
                offset += tarfile.BLOCKSIZE
        name, own = own.get("path", info.name), {key: "" for key in own if key.startswith("GNU.sparse.")}
        if not info.isdir():
            problem = ""
            if info.issym() or info.islnk():
                problem = _LINK
            elif not regular:
                problem = NO_FILE
            elif own or info.type == tarfile.GNUTYPE_SPARSE:
                problem = "a sparse file in an archive: unpack it"
            elif data + size > end:
                problem = _CUT
            members.append(Member(*archive, copy, name, data, size, size, STORED, NO_CHECKSUM, problem))
            if len(members) > MEMBERS:
                raise ReadError(f"more than {MEMBERS:,} members; an archive may have {MEMBERS:,}: unpack it")
        own = {}
        offset += _padded(size) if regular else 0
    return members, "cut off: the end of the archive is missing" if offset > end else ""


_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE,
)  # fmt: skip


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _pax(text: bytes) -> dict[str, str]:
    """Records "length key=value" of a pax header (POSIX.1-2001, pax, extended header)."""
    found = {}
    while match := re.match(rb"(\d{1,8}) ([^=\n]+)=", text):
        record, text = text[: int(match[1])], text[max(int(match[1]), 1) :]
        found[match[2].decode("utf-8", "replace")] = record[match.end() : -1].decode("utf-8", "surrogateescape")
    return found


def _too_large(packed: int, size: int) -> str:
    """The reason not to unpack `packed` bytes to `size`, or ""."""
    if size <= max(RATIO_BYTES, RATIO * packed):
        return ""
    return f"unpacks to too much: {packed:,} bytes become {size:,}; an image becomes at most {RATIO} times as large"


def _sanitized(members: Sequence[Member]) -> list[Member]:
    """Members sorted by name, without hidden ones; those that must not be read get a plain name and the reason."""
    result: dict[str, Member] = {}
    for number, member in enumerate(members):
        # Some programs write backslashes for folders, and ./ before every name.
        parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".")]
        if any(part.startswith(".") and part != ".." for part in parts) or parts[:1] == ["__MACOSX"]:
            continue
        problem = member.problem
        name = "/".join(parts)
        if ".." in parts or member.name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name:
            name = f"{number:07d}"  # the manifest does not quote it either
            problem = "its name leads out of the archive"
        elif len(os.fsencode(name)) > LONGEST_NAME or not name:
            name, problem = f"{number:07d}", "no name, or one that is too long"
        elif is_archive(name) or name.lower().endswith(UNREAD):
            problem = problem or "an archive within an archive: unpack the outer one"
        if not problem and member.size > MEMBER_BYTES:
            problem = f"{member.size:,} bytes; a member of an archive may have {MEMBER_BYTES:,}"
        # Of two members with one name the later replaces the earlier, as in tar itself.
        result[name] = member._replace(name=name, problem=problem or _too_large(member.packed, member.size))
    return [result[name] for name in sorted(result)]


# ---- compressed tars


def _unpack(archive: object_stores.Object, folder: str, limit: int, heartbeat: Heartbeat) -> tuple[str, str]:
    """Unpacks a compressed tar: the name of the plain copy, and what is wrong with the archive, or "".

    A copy that an earlier build finished is reused.
    """
    copy = hashlib.sha256(os.fsencode(object_stores.absolute(archive.path))).hexdigest()[:16] + ".tar"
    target = os.path.join(folder, copy)
    note, state = Path(f"{target}.json"), {"size": archive.size, "modified_ns": archive.modified_ns}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(note.read_text(encoding="utf-8"))
        if os.path.exists(target) and {key: found[key] for key in state} == state:
            return copy, found["problem"]
    os.makedirs(folder, mode=0o700, exist_ok=True)
    note.unlink(missing_ok=True)
    problem = ""
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        pieces = _decompressed(archive, heartbeat)
        while True:
            try:
                piece = next(pieces, b"")
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - each decompressor raises its own kinds
                if isinstance(error, OSError) and error.errno in TRANSIENT:
                    raise
                problem = f"damaged archive: it cannot be decompressed to its end ({type(error).__name__})"
                break
            if not piece:
                break
            if not file.tell() and not _starts_a_tar(piece):
                problem = "damaged archive: it holds no tar archive"
                break
            file.write(piece)
            if problem := _too_large(archive.size, file.tell()):
                file.truncate(0)
                break
            if file.tell() // _CHECK_BYTES != (file.tell() - len(piece)) // _CHECK_BYTES:
                heartbeat(archive.path)  # the time limit is for a hang, not for a large archive
                _check_used(folder, limit)
    _check_used(folder, limit)
    if not os.path.getsize(target):
        os.unlink(target)
        raise ReadError(problem or "an archive without files")
    files.write_text(note, json.dumps(state | {"problem": problem}), private=True)
    return copy, problem


_CHECK_BYTES = 64 << 20


def _starts_a_tar(piece: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(piece[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return piece[: tarfile.BLOCKSIZE] == bytes(tarfile.BLOCKSIZE)  # an empty one
    return True


def _check_used(folder: str, limit: int) -> None:
    used = 0
    for copy in Path(folder).glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # another worker deletes what is not a tar
            used += copy.stat().st_size
    if used > limit:
        raise UserError(
            f"unpacked copies of compressed tar archives take more than the {limit / 1e9:g} GB of --unpack-gb; raise it, or unpack the archives (plain .tar and .zip need no room)"
        )


def _decompressed(archive: object_stores.Object, heartbeat: Heartbeat) -> Iterator[bytes]:
    openers = {"gz": gzip.open, "tgz": gzip.open, "bz2": bz2.open, "tbz2": bz2.open, "xz": lzma.open, "txz": lzma.open}
    opener = openers.get(archive.path.lower().rsplit(".", 1)[1], _open_zstd)
    with _open(archive, heartbeat, archive.path, object_stores.LARGEST) as packed, opener(packed) as file:
        while piece := file.read(1 << 20):
            yield piece


def _open_zstd(file: io.BufferedIOBase) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


# ---- reading


class _Stream(object_stores.Seekable):
    """Bytes that come in pieces, which are kept up to the position that is read."""

    def __init__(self, pieces: Iterator[bytes], size: int) -> None:
        super().__init__(size)
        self._pieces = pieces
        self._data = bytearray()

    def readinto(self, buffer: Any, /) -> int:
        while len(self._data) < self._at + len(buffer) and (piece := next(self._pieces, b"")):
            self._data += piece
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


@contextlib.contextmanager
def stream(
    source: object_stores.Object, member: Member | None, folder: str, heartbeat: Heartbeat
) -> Iterator[io.BufferedIOBase]:
    """An input as a binary file, unpacked if it is a single compressed one.

    Args:
      member: where it is in an archive; None for a file of a folder or an object of a bucket.
      folder: of unpacked copies.

    Reading raises:
      ReadError: the member or the compressed file is damaged.
      DataError: what is in a bucket changed since it was listed.
    """
    if member is None:
        opened = _open(source, heartbeat, source.path)
    else:
        pieces = member_bytes(member, folder, heartbeat, object_stores.HEADER_BYTES)
        opened = io.BufferedReader(_Stream(pieces, member.size), PIECE)
    with opened as file:
        if unpacked_name(source.path) == source.path or not _is_gzipped(file):
            yield file
        else:
            inflated = deflate.inflated(file, "gzip file", PIECE)
            yield io.BufferedReader(_Stream(inflated, MEMBER_BYTES), PIECE)


def _is_gzipped(file: io.BufferedIOBase) -> bool:
    start = file.read(len(deflate.GZIP))
    file.seek(0)
    return start == deflate.GZIP


@contextlib.contextmanager
def materialize(
    source: object_stores.Object, member: Member | None, folder: str, scratch: str, heartbeat: Heartbeat
) -> Iterator[str]:
    """A path of an input on a local disk, as readers written in C demand.

    A member, an object or a single compressed file is copied or unpacked there for as long as the context lasts, to a private
    folder within `scratch`, under a plain form of its name.

    Args:
      member, folder: as in stream.

    Raises:
      ReadError: the member or the compressed file is damaged.
      StorageError: the scratch disk is full.
      DataError: what is in a bucket changed since it was listed.
    """
    with contextlib.ExitStack() as stack:
        path = source.path
        if member is not None:
            path = stack.enter_context(_written(member_bytes(member, folder, heartbeat), scratch, path))
        elif object_stores.is_address(path):
            path = stack.enter_context(_written(_whole(source, heartbeat), scratch, path))
        if (name := unpacked_name(path)) != path:
            file = stack.enter_context(open(path, "rb"))
            pieces = deflate.inflated(file, "gzip file") if _is_gzipped(file) else iter(lambda: file.read(PIECE), b"")
            path = stack.enter_context(_written(_bounded(pieces, os.path.getsize(path)), scratch, name))
        yield path


@contextlib.contextmanager
def _written(pieces: Iterator[bytes], scratch: str, name: str) -> Iterator[str]:
    """A file with these bytes; readers go by the ending of its name, and label maps are recognized by name and folder."""
    failed = f"cannot write to the scratch folder {scratch} ({{}}); free some space there and rerun the same command"
    *_, inner, name = ("", *(re.sub(r"[^A-Za-z0-9._-]", "_", part)[-80:] for part in name.split("/")))
    try:
        os.makedirs(scratch, mode=0o700, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix="m", dir=scratch, ignore_cleanup_errors=True)
        parent = os.path.join(place.name, inner.lstrip(".") or "file")
        os.mkdir(parent, 0o700)
    except OSError as error:
        raise StorageError(failed.format(error.strerror)) from error
    with place:
        target = os.path.join(parent, name)
        with open(target, "wb", buffering=0) as file:
            for piece in pieces:
                try:
                    file.write(piece)
                except OSError as error:
                    raise StorageError(failed.format(error.strerror)) from error
        yield target


def _bounded(pieces: Iterator[bytes], packed: int) -> Iterator[bytes]:
    """The pieces of a file of `packed` bytes, as long as it may unpack to as many."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if problem := _too_large(packed, size):
            raise ReadError(problem)
        if size > MEMBER_BYTES:
            raise ReadError(f"more than {MEMBER_BYTES:,} bytes; a compressed file may unpack to as many")
        yield piece


def is_unchanged(source: object_stores.Object, member: Member | None) -> bool:
    """Whether an input is still as the inventory saw it, by size and time of the file that holds it. An object of a bucket is
    checked whenever it is read.

    Raises:
      OSError: it is gone.
    """
    if object_stores.is_address(source.path):
        return True
    found = os.stat(source.path if member is None else member.archive)
    wanted = source[1:] if member is None else (member.archive_size, member.modified_ns)
    return (found.st_size, found.st_mtime_ns) == wanted


def _whole(source: object_stores.Object, heartbeat: Heartbeat) -> Iterator[bytes]:
    with _open(source, heartbeat, source.path, object_stores.LARGEST) as file:
        while piece := file.read(object_stores.LARGEST):
            yield piece


def member_bytes(member: Member, folder: str, heartbeat: Heartbeat, first: int | None = None) -> Iterator[bytes]:
    """A member's bytes in pieces; size and checksum are verified at the end.

    Args:
      first: bytes of the first request to a bucket; the whole member unless given.
    """
    if member.copy:
        opened: io.BufferedIOBase = open(os.path.join(folder, member.copy), "rb")  # noqa: SIM115 - closed below
    else:
        archive = object_stores.Object(*member[:3])
        opened = _open(archive, heartbeat, member.path, member.packed + PIECE if first is None else first)
    with opened as file:
        file.seek(member.offset)
        if member.checksum != NO_CHECKSUM:
            _skip_zip_header(file)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == DEFLATED else None
        raw, left, size, checksum = b"", member.packed, 0, 0
        while size < member.size:
            if not raw:
                raw = file.read(min(PIECE, left))
                left -= len(raw)
            ended = not raw
            if inflate is None:
                piece, raw = raw, b""
            else:
                try:
                    piece = inflate.decompress(raw, min(PIECE, member.size - size))
                except zlib.error as error:
                    raise ReadError("damaged in its archive: it cannot be inflated") from error
                raw = inflate.unconsumed_tail
            if ended and not piece:
                raise ReadError("damaged in its archive: it is cut off")
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
            yield piece
    if member.checksum not in (NO_CHECKSUM, checksum):
        raise ReadError("damaged in its archive: its checksum is wrong")


def _skip_zip_header(file: io.BufferedIOBase) -> None:
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ReadError("damaged in its archive: no member begins where the table of contents says")
    name, extra = struct.unpack_from("<HH", header, 26)
    file.seek(name + extra, os.SEEK_CUR)
