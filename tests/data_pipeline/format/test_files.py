"""Files appear whole or not at all."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.format import files

SCHEMA = pa.schema([("n", pa.int64())])
Write = Callable[..., object]


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": list(values)}, schema=SCHEMA)


def write_tables(path: Path, **options: bool) -> None:
    files.write_tables(path, SCHEMA, iter([numbers(1, 2)]), **options)


WRITES: dict[str, Write] = {
    "text": lambda path, **options: files.write_text(path, "ä\n", **options),
    "table": lambda path, **options: files.write_table(path, numbers(1, 2), **options),
    "tables": write_tables,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_private_file_is_readable_by_its_owner_alone(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "a", private=True)
    write(tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    (tmp_path / "c").touch()  # as the user's umask has it
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "c").stat().st_mode


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_failed_write_keeps_the_old_file(tmp_path: Path, write: Write, monkeypatch) -> None:
    (tmp_path / "a").write_text("old")

    def full(*unused: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_write_replaces_an_older_file(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "a long text that is not left over")
    files.write_text(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tables_are_read_back_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "ROWS_TOGETHER", 4)
    tables = [numbers(0, 1, 2), numbers(), numbers(3, 4, 5, 6, 7, 8), numbers(9)]
    assert files.write_tables(tmp_path / "a", SCHEMA, iter(tables)) == 10
    assert pq.read_table(tmp_path / "a")["n"].to_pylist() == list(range(10))
    groups = pq.ParquetFile(tmp_path / "a").metadata
    assert max(groups.row_group(n).num_rows for n in range(groups.num_row_groups)) <= 4


def test_no_tables_make_an_empty_file_of_the_schema(tmp_path: Path) -> None:
    assert files.write_tables(tmp_path / "a", SCHEMA, iter([])) == 0
    assert pq.read_table(tmp_path / "a").equals(numbers())


def test_error_while_tables_are_made_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_table(tmp_path / "a", numbers(7))

    def broken() -> Iterator[pa.Table]:
        yield numbers(1)
        raise ValueError("no more tables")

    with pytest.raises(ValueError, match="no more tables"):
        files.write_tables(tmp_path / "a", SCHEMA, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert pq.read_table(tmp_path / "a").equals(numbers(7))


def test_temporary_name_is_hidden_and_another_one_each_time(tmp_path: Path) -> None:
    names = {files.beside(tmp_path / "card.json") for _ in range(3)}
    assert len(names) == 3
    assert all(name.parent == tmp_path and name.name.startswith(".card.json.") for name in names)
