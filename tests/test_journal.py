"""Files of JSON lines after whatever happens to them."""

from pathlib import Path

import pytest

from curia_jax import journal


def test_reading_leaves_out_damaged_lines_and_keeps_those_after_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"step": 1}\n{"step": 2, "lo\n\xff\xfe\n\0\0\0\n[3]\n{"loss": 1}\n{"step": "4"}\n{"step": true}\n\n{"step": 5}\n'
    )
    found = journal.read(file, ("step",))
    assert [line["step"] for line in found.lines] == [1, 5]
    assert found.unreadable == 6
    assert journal.read(tmp_path / "missing.jsonl") == ([], 0)


def test_first_line_after_a_torn_one_is_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"step": 1}\n{"st')
    writer = journal.Writer(file)
    writer.write({"step": 2})
    writer.close()
    assert [line["step"] for line in journal.read(file).lines] == [1, 2]


def test_file_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    writer = journal.Writer(tmp_path / "folder/a.jsonl")
    writer.write({"step": 1})
    (tmp_path / "folder/a.jsonl").unlink()
    (tmp_path / "folder").rmdir()
    writer.write({"step": 2})
    writer.close()
    assert journal.read(tmp_path / "folder/a.jsonl").lines == [{"step": 2}]


def test_file_that_cannot_be_written_is_a_warning_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from curia_common import logs

    logs.configure()
    (tmp_path / "a.jsonl").mkdir()
    writer = journal.Writer(tmp_path / "a.jsonl")
    for step in (1, 2):
        writer.write({"step": step})
    assert capsys.readouterr().err == (
        f"cannot write {tmp_path}/a.jsonl: Is a directory; the run continues without it and will try again\n"
    )
    (tmp_path / "a.jsonl").rmdir()
    writer.write({"step": 3})
    writer.close()
    assert journal.read(tmp_path / "a.jsonl").lines == [{"step": 3}]
