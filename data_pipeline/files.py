"""Small files, written beside and then given their names: a reader sees the old one or the new one, never half of it."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_TOGETHER = 1 << 18  # of a row group


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """UTF-8; readable by its owner alone where `private`.

    Raises:
      OSError: the disk is full or the file cannot be written; what was there before stays.
    """
    beside = _beside(path)
    with open(_create(beside, private), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_table(path: Path, table: pa.Table, *, private: bool = False) -> None:
    """Parquet; see write_text."""
    beside = _beside(path)
    with open(_create(beside, private), "wb") as file:
        pq.write_table(table, file)
    os.replace(beside, path)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, private: bool = False) -> int:
    """Parquet out of tables of one schema, a few of which are in memory at a time; returns the number of rows."""
    beside = _beside(path)
    rows = 0
    with open(_create(beside, private), "wb") as file, pq.ParquetWriter(file, schema) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            rows += len(table)
            if sum(len(one) for one in waiting) >= ROWS_TOGETHER:
                writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_TOGETHER)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_TOGETHER)
    os.replace(beside, path)
    return rows


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _create(path: Path, private: bool) -> int:
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
