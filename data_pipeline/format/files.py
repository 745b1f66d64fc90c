"""Atomic file writes: a file is written under a temporary name and renamed, so that readers see the old or the new file."""

import contextlib
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from curia_common.errors import DataError

Json = dict[str, Any]  # an object of a JSON file, right before it is written or right after it is read
ROWS_TOGETHER = 1 << 18  # of a row group


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """UTF-8; readable by its owner alone where `private`.

    Raises:
      OSError: the disk is full or the file cannot be written; what was there before stays.
    """
    with written(path, private) as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def write_table(path: Path, table: pa.Table, *, private: bool = False) -> None:
    """Parquet; see write_text."""
    with written(path, private) as file:
        pq.write_table(table, file)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, private: bool = False) -> int:
    """Parquet from tables of one schema, a few of which are in memory at a time; returns the number of rows."""
    rows = 0
    with written(path, private) as file, pq.ParquetWriter(file, schema) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            rows += len(table)
            if sum(len(one) for one in waiting) >= ROWS_TOGETHER:
                writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_TOGETHER)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_TOGETHER)
    return rows


def beside(path: Path) -> Path:
    """A temporary name in the same folder that no other process uses, on any machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def read_table(
    path: Path, wanted: Mapping[str, pa.DataType], nullable: Collection[str] = (), **options: Any
) -> pa.Table:
    """A Parquet file that this project writes.

    Args:
      wanted: columns that it has to have, each with a value in every row, and their types, to which they are cast.
      nullable: those of them that may lack values.
      options: of pyarrow.parquet.read_table.

    Raises:
      DataError: it cannot be read, or is another table.
    """
    try:
        table = pq.read_table(path, **options)
        if missing := [name for name in wanted if table.column_names.count(name) != 1]:
            raise ValueError(f"it has no column {missing[0]}")
        table.validate(full=True)  # that texts are UTF-8, above all
        for name, kind in wanted.items():
            column = table[name].cast(kind)
            if column.null_count and name not in nullable:
                raise ValueError(f"its column {name} lacks values")
            table = table.set_column(table.column_names.index(name), name, column)
    except (pa.ArrowException, OSError, ValueError) as error:
        why = f" ({error})" if type(error) is ValueError else ""
        raise DataError(f"{path} is damaged{why}; copy the dataset again or build it again") from error
    return table


@contextlib.contextmanager
def written(path: Path, private: bool) -> Iterator[BinaryIO]:
    """A binary file that is renamed to `path` at the end, or removed if writing fails."""
    name = beside(path)
    try:
        with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as file:
            yield file
        os.replace(name, path)
    finally:
        name.unlink(missing_ok=True)
