"""Shard files: written and verified one by one, read at random by training.

A dataset folder holds

  <name>-<split>.array_record-00000   records, see records.py
  shards.parquet                      per shard: split, records, slices, bytes, sha256, largest height and width, addition
  index.parquet                       per slice: where it is, its facts and its labels
  dataset_info.json, features.json    what TFDS needs
  card.json, index.html               counts, and why files were left out; examples
  manifest.parquet                    every input file and its fate; holds paths, so it stays with the site

Shards are numbered per split and their names hold no total: exams that are added later become further shards, and existing
shards keep their names and bytes. dataset_info.json says the same with the file name template
{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}. A file belongs to the dataset once shards.parquet lists it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] - an extension module
from jaxtyping import UInt16

from curia_common.errors import DataError, StorageError, UserError
from data_pipeline.format import codec, files, records

# The codec compresses each slice, so the container neither groups nor compresses.
WRITER_OPTIONS = "group_size:1,uncompressed"
SHARDS, INDEX, MANIFEST = "shards.parquet", "index.parquet", "manifest.parquet"
CARD, PAGE = "card.json", "index.html"
COUNT = b"shards"  # in the metadata of shards.parquet: how many it lists
FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_CHECKED_TOGETHER = 4 << 20  # bytes
MOST_SHARDS = 99_999  # per split; with more TFDS writes all numbers with six digits


# Of a pixel, whatever its unit: activities of PET, the largest there are, stay below 1e10 Bq/ml.
LARGEST_VALUE = 1e15
REMEDY = "copy it again or build it again"


class ShardRow(NamedTuple):
    """A row of shards.parquet.

    Attributes:
      records, slices, bytes: how many the file has.
      largest_height, largest_width: of its slices, px.
      slice_counts: slices in each record; None where each record has one.
      addition: which addition it came with; 0 for the first build.
    """

    file: str
    split: str
    records: int
    slices: int
    bytes: int
    sha256: str
    largest_height: int
    largest_width: int
    slice_counts: list[int] | None
    addition: int


# Of the columns that a reader needs.
_SHARD_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("file", "split", "sha256"), pa.string()),
    **dict.fromkeys(("records", "slices", "bytes", "largest_height", "largest_width", "addition"), pa.int64()),
    "slice_counts": pa.list_(pa.int32()),
}
_AXES = ("rows", "columns", "slices")
_INDEX_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("split", "shard", *records.TEXT, *records.SLICE_TEXT), pa.string()),
    **dict.fromkeys(("record", "slot", "height", "width", *records.SLICE_INTEGERS), pa.int64()),
    **dict.fromkeys((*records.NUMBERS, *records.SLICE_NUMBERS, *(f"spacing_{axis}" for axis in _AXES)), pa.float64()),
}


def read_shards(folder: Path) -> pa.Table:
    """shards.parquet, one row for each ShardRow, with numbers that can be those of the shards.

    Raises:
      UserError: there is none.
      DataError: it is damaged.
    """
    path = folder / SHARDS
    if not path.is_file():
        raise UserError(
            f"no shards in {folder}: it has no {SHARDS}; data_pipeline.build writes one when it has finished"
        )
    table = files.read_table(path, _SHARD_TYPES, nullable=("slice_counts",))
    for row in table.to_pylist():
        counts, name = row["slice_counts"], row["file"]
        sizes = (row["records"], row["slices"], row["largest_height"], row["largest_width"])
        largest = max(row["largest_height"], row["largest_width"])
        if counts is None:
            agree = row["slices"] == row["records"]
        else:
            agree = (
                len(counts) == row["records"]
                and all(count is not None and count > 0 for count in counts)
                and sum(counts) == row["slices"]
            )
        # A record has bytes, so that this also bounds how much memory the table of records takes.
        # A shard of whose slices none is left is a file without records.
        if (
            row["bytes"] < 1
            or (min(sizes) < 1 and any(sizes))
            or largest > codec.LONGEST_SIDE
            or row["records"] > row["bytes"]
            or row["addition"] < 0
            or not agree
        ):
            raise DataError(f"{path} is damaged: the numbers of {name[:60]!a} cannot be right; {REMEDY}")
        if not 0 < len(name) < 200 or Path(name).name != name or not name.isprintable():
            raise DataError(f"{path} is damaged: {name[:60]!a} is not a file of this folder; {REMEDY}")
    return table


def file_name(dataset: str, split: str, number: int) -> str:
    """TFDS's name of a shard under FILE_TEMPLATE."""
    return f"{dataset}-{split}.array_record-{number:05d}"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, items: Iterable[bytes], scratch: Path | None = None) -> tuple[int, str]:
    """Writes records under a temporary name, reads the file back, verifies it and only then renames it to `path`.

    Args:
      scratch: a folder on a local disk to write and verify in, where the folder of `path` is not on one. The verified shard
        is then copied to the folder of `path`, read again and compared.

    Returns:
      Number of records and the file's SHA-256.

    Raises:
      StorageError: what is read back is not what was written.
      OSError: the disk is full or the file cannot be written. In both cases nothing is left behind.
    """
    beside = written = files.beside(path)
    if scratch is not None:
        written = scratch / beside.name
    checksums = []
    try:
        writer = array_record_module.ArrayRecordWriter(str(written), WRITER_OPTIONS)
        for item in items:
            writer.write(item)
            checksums.append(zlib.crc32(item))
        writer.close()
        reader = array_record_module.ArrayRecordReader(str(written), "")
        if not reader.ok() or reader.num_records() != len(checksums):
            raise StorageError(
                f"{path.name}: wrote {len(checksums)} records but {reader.num_records()} can be read; is the disk full?"
            )
        for number, checksum in enumerate(checksums):
            if zlib.crc32(reader.read([number])[0]) != checksum:
                raise StorageError(f"{path.name}: record {number} reads back changed; is the disk failing?")
        reader.close()
        digest = sha256(written)
        if written != beside:
            shutil.copyfile(written, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        if written != beside and sha256(beside) != digest:
            raise StorageError(f"{path.name}: its copy reads back changed; is the disk failing?")
        os.replace(beside, path)
    finally:
        for leftover in {written, beside}:
            leftover.unlink(missing_ok=True)
    return len(checksums), digest


def thin(path: Path, drop: Collection[tuple[int, int]]) -> tuple[int, str, list[int]]:
    """Writes a shard anew without some of its slices; the others are copied unchanged.

    Args:
      drop: record and slot of each slice to leave out.

    Returns:
      Number of records, the file's SHA-256, slices per record.
    """
    counts: list[int] = []

    def items(reader: Any) -> Iterator[bytes]:
        gone: dict[int, set[int]] = {}
        for record, slot in drop:
            gone.setdefault(record, set()).add(slot)
        for number in range(reader.num_records()):
            data = reader.read([number])[0]
            kept = records.without(data, gone[number]) if number in gone else data
            if kept is not None:
                counts.append(records.count(kept))
                yield kept

    with contextlib.closing(array_record_module.ArrayRecordReader(str(path), "")) as reader:
        written, digest = write(path, items(reader))
    return written, digest, counts


def read_record(path: Path, number: int) -> bytes:
    """One record of a shard; opens and closes the file each time, where SliceSource keeps it open."""
    with contextlib.closing(array_record_module.ArrayRecordReader(str(path), "")) as reader:
        return reader.read([number])[0]


@runtime_checkable
class EncodedSlices(Protocol):
    """What decode_into needs of a source of slices; `largest` is the greatest height and width of a slice, px."""

    largest: tuple[int, int]

    def encoded(self, number: int) -> tuple[bytes, records.SliceFacts]: ...

    def place(self, number: int) -> str: ...


def decode_into(
    source: EncodedSlices, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
) -> tuple[list[tuple[int, int]], list[records.SliceFacts]]:
    """Decodes slices to the top left of images, one each, with zeros right of them and below.

    Returns:
      Height and width of every slice, and its facts for training.

    Raises:
      ValueError: the images are smaller than the largest slice.
      IndexError, DataError: as SliceSource raises them.
    """
    if images.shape[1] < source.largest[0] or images.shape[2] < source.largest[1]:
        raise ValueError(f"slices of up to {source.largest} px do not fit into images of {images.shape[1:]}")
    facts: list[records.SliceFacts] = []

    def encoded() -> Iterator[bytes]:
        for number in numbers:
            data, known = source.encoded(number)
            facts.append(known)
            yield data

    try:
        return codec.decode_into(encoded(), images), facts
    except (DataError, IndexError):
        raise
    except Exception as error:  # the codec raises several kinds, at the slice that it took last
        raise DataError(f"{source.place(numbers[len(facts) - 1])} is damaged; {REMEDY}") from error


class SliceSource:
    """Random access to the decoded slices of a split.

    Slice n is row n of `index`: shards in the order of their names, records in the order of the file, slices in the order
    of the record. Opening checks that every shard exists with its published size, because an ArrayRecord reader takes a
    missing or truncated file for an empty one. Shards are opened at their first read. Reads are thread-safe, and the source
    can be pickled.

    Args:
      folder: dataset folder.
      split: "train", "validation" or "test"; several with a plus, as in TFDS: "train+validation".
      additions: take the shards of the first build and of this many additions; None takes all.

    Attributes:
      largest: greatest height and width of a slice, px.
      additions: the newest addition it has; 0 for the first build alone.
      fingerprint: hex digest of the names, digests and counts of its shards: equal for two copies of the same slices in the
        same order.

    Raises:
      UserError: no dataset in the folder, or no such split.
      DataError: a table or shard is missing, truncated or not as published.
    """

    def __init__(self, folder: str | Path, split: str, *, additions: int | None = None) -> None:
        self.folder, self.split = Path(folder), split
        table = read_shards(self.folder)
        splits = sorted(set(table["split"].to_pylist()))
        for name in split.split("+"):
            if name not in splits:
                raise UserError(f"no split '{name}' in {folder}; there are: {', '.join(splits)}")
        self._splits = split.split("+")
        self._check_published(table)
        table = table.filter(pc.field("split").isin(self._splits)).sort_by("file")
        if additions is not None:
            table = table.filter(pc.field("addition") <= additions)
            if not len(table):
                raise UserError(f"{folder} has no shards of split '{split}' among its first {additions} additions")
        self.additions = max(table["addition"].to_pylist())
        identity = table.select(["file", "sha256", "records", "slices"]).to_pylist()
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._files = table["file"].to_pylist()
        self._sha256 = table["sha256"].to_pylist()
        for name, size in zip(self._files, table["bytes"].to_pylist(), strict=True):
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise DataError(f"shard {path} {state}, published with {size:,} bytes; {REMEDY}")
        self._records = table["records"].to_numpy()
        counts = [
            np.ones(n, np.int64) if slices is None else np.asarray(slices, np.int64)
            for n, slices in zip(self._records, table["slice_counts"].to_pylist(), strict=True)
        ]
        # First slice of every record, over all shards; and first record of every shard.
        self._first_slice = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        self._first_record = np.concatenate([[0], np.cumsum(self._records)])
        self._single = bool(self._first_slice[-1] == self._first_record[-1])
        self.largest = (max(table["largest_height"].to_pylist()), max(table["largest_width"].to_pylist()))
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._index: pa.Table | None = None

    def _check_published(self, table: pa.Table) -> None:
        """Raises DataError where shards.parquet lists another number of shards than it was written with.

        Not compared with dataset_info.json, which an interrupted addition leaves ahead. Tables of versions before 0.3 do not say.
        """
        published = (table.schema.metadata or {}).get(COUNT)
        if published is not None and published != str(len(table)).encode():
            raise DataError(
                f"{self.folder / SHARDS} lists {len(table):,} shards, but was written with {published[:20].decode('ascii', 'replace')}; "
                f"{REMEDY}"
            )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}, "_lock": None, "_index": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first_slice[-1])

    @property
    def index(self) -> pa.Table:
        """One row per slice of this split: the columns of index.parquet. Read at the first use."""
        if self._index is None:
            # While exams are being added the index may already name shards that are not part of this dataset.
            table = files.read_table(self.folder / INDEX, _INDEX_TYPES, filters=[("split", "in", self._splits)])
            table = table.filter(pc.field("shard").isin(self._files))
            self._index = table.sort_by([("shard", "ascending"), ("record", "ascending"), ("slot", "ascending")])
        return self._index

    def __getitem__(self, number: int) -> records.DecodedSlice:
        """Slice `number`, decoded.

        Raises:
          IndexError: beyond the end.
          DataError: the shard cannot be opened, has a wrong number of records, or the record is damaged.
        """
        data, slot, where = self._read(number)
        try:
            return records.parse_slice(data, slot)
        except Exception as error:  # protobuf and the codec each raise their own kinds
            raise DataError(f"{where} is damaged; {REMEDY}") from error

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[records.SliceFacts]]:
        """Decodes slices to the top left of images; see `decode_into`."""
        return decode_into(self, numbers, images)

    def encoded(self, number: int) -> tuple[bytes, records.SliceFacts]:
        """Slice `number` as it is stored, and its facts for training; raises as `__getitem__`."""
        data, slot, where = self._read(number)
        try:
            one, known = records.training_slice(data, slot)
        except Exception as error:  # protobuf raises its own kinds
            raise DataError(f"{where} is damaged; {REMEDY}") from error
        largest = abs(known.slope) * 0xFFFF + abs(known.intercept)
        if not (largest <= LARGEST_VALUE and math.isfinite(known.low) and math.isfinite(known.high)):
            raise DataError(
                f"{where} has a slope of {known.slope:g}, an intercept of {known.intercept:g} and percentiles of "
                f"{known.low:g} and {known.high:g}, which are no measurements; {REMEDY}"
            )
        return one, known

    def read(self, number: int) -> tuple[bytes, int]:
        """The record that holds slice `number`, and the slice's slot in it; raises as `__getitem__`."""
        return self._read(number)[:2]

    def place(self, number: int) -> str:
        """Shard and record of slice `number`, for messages."""
        _, shard, within = self._find(number)
        return f"shard {self.folder / self._files[shard]}, record {within},"

    def _find(self, number: int) -> tuple[int, int, int]:
        """Record number of a slice, its shard, and the record's number in that."""
        if not 0 <= number < len(self):
            raise IndexError(f"slice {number} of {len(self)}")
        record = number if self._single else int(np.searchsorted(self._first_slice, number, side="right")) - 1
        shard = int(np.searchsorted(self._first_record, record, side="right")) - 1
        return record, shard, int(record - self._first_record[shard])

    def _read(self, number: int) -> tuple[bytes, int, str]:
        record, shard, within = self._find(number)
        reader, where = self._reader(shard), f"shard {self.folder / self._files[shard]}, record {within},"
        try:
            data = reader.read([within])[0]
        except Exception as error:  # array_record raises several kinds
            raise DataError(f"{where} is damaged; {REMEDY}") from error
        return data, 0 if self._single else int(number - self._first_slice[record]), where

    def check_access(self) -> None:
        """Reads a record of the first and of the last shard. Damage is left to whoever trains on it.

        Raises:
          OSError: a shard cannot be opened or read.
        """
        for number in {0, len(self) - 1}:
            _, shard, _ = self._find(number)
            with (self.folder / self._files[shard]).open("rb") as file:  # ArrayRecord hides why it cannot
                file.read(1)
            with contextlib.suppress(DataError):
                self._read(number)

    def check_shards(self, first: int = 0, *, rest: int | float = 3) -> Iterator[str | None]:
        """Compares every shard with its published digest, from number `first` on, while others read.

        Args:
          rest: pauses so many times as long as it reads, to leave disk and processor to training.

        Yields:
          For each shard, what is wrong with it, or None.
        """
        for offset in range(len(self._files)):
            number = (first + offset) % len(self._files)
            digest, path = hashlib.sha256(), self.folder / self._files[number]
            try:
                with path.open("rb", buffering=0) as file:
                    while True:
                        began = time.monotonic()
                        block = file.read(_CHECKED_TOGETHER)
                        if not block:
                            break
                        digest.update(block)
                        time.sleep(rest * (time.monotonic() - began))
            except OSError as error:
                yield f"shard {path} cannot be read ({error.strerror}); {REMEDY}"
                continue
            same = digest.hexdigest() == self._sha256[number]
            yield None if same else f"shard {path} has other bytes than were published; {REMEDY}"

    def _reader(self, shard: int) -> Any:
        reader = self._open.get(shard)
        if reader is None:
            with self._lock:
                path = self.folder / self._files[shard]
                try:
                    reader = array_record_module.ArrayRecordReader(str(path), "")
                    found = reader.num_records() if reader.ok() else 0
                except Exception as error:  # array_record raises a RuntimeError for some kinds of damage
                    raise DataError(f"shard {path} is damaged; {REMEDY}") from error
                if found != self._records[shard]:
                    raise DataError(
                        f"shard {path} holds {found} readable records, published with {self._records[shard]}; {REMEDY}"
                    )
                self._open[shard] = reader
        return reader
