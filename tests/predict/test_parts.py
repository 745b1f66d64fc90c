"""The folder beside the output: what survives a stop, and what is left of it in the end."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common.errors import UserError
from curia_jax.predict import parts
from data_pipeline.stages.exams import FileOutcome

SCHEMA = pa.schema([("series", pa.string()), ("probability", pa.float32())])
KEPT = FileOutcome("kept", "")


def rows(*series: str) -> pa.Table:
    return pa.table({"series": series, "probability": [0.5] * len(series)}, SCHEMA)


def test_parts_of_a_stopped_command_are_there_again(tmp_path) -> None:
    output = tmp_path / "found.parquet"
    with pytest.raises(KeyboardInterrupt), parts.Parts(output, "a") as made:
        made.add({"id1": "s1"}, rows("s1"), {"/in/1": KEPT})
        made.add(
            {"id2": "s2"}, rows("s2", "s2"), {"/in/\udce4": FileOutcome("excluded", "air")}
        )  # a name that is no UTF-8
        raise KeyboardInterrupt
    assert (tmp_path / ".found.parquet.unfinished").stat().st_mode & 0o777 == 0o700
    with parts.Parts(output, "a") as made:
        assert made.done == {"id1", "id2"} and not made.restarted
        assert made.outcomes == {"/in/1": KEPT, "/in/\udce4": FileOutcome("excluded", "air")}
        made.write({"id1", "id2"}, SCHEMA)
    assert pq.read_table(output)["series"].to_pylist() == ["s1", "s2", "s2"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.parquet"]


def test_only_wanted_exams_are_written(tmp_path) -> None:
    with parts.Parts(tmp_path / "found.parquet", "a") as made:
        made.add({"old1": "s1", "id3": "s3"}, rows("s1", "s3"), {})
        made.add({"id1": "s1"}, rows("s1", "s1"), {})  # the exam has more files by now
        assert made.count({"id1", "id3"}) == (3, 2)
        made.write({"id1", "id3"}, SCHEMA)
    assert pq.read_table(tmp_path / "found.parquet")["series"].to_pylist() == ["s3", "s1", "s1"]


def test_parts_of_another_request_are_removed(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), parts.Parts(tmp_path / "found.parquet", "a") as made:
        made.add({"id1": "s1"}, rows("s1"), {})
        raise KeyboardInterrupt
    with parts.Parts(tmp_path / "found.parquet", "b") as made:
        assert made.restarted and not made.done


def test_error_before_the_first_part_leaves_nothing(tmp_path) -> None:
    with pytest.raises(UserError), parts.Parts(tmp_path / "found.parquet", "a"):
        raise UserError("no such input")
    assert list(tmp_path.iterdir()) == []


def test_request_is_read_from_a_finished_table_alone(tmp_path) -> None:
    output = tmp_path / "found.parquet"
    assert parts.request_of(output) is None
    with parts.Parts(output, "a") as made:
        made.add({"id1": "s1"}, rows("s1"), {})
        made.write({"id1"}, SCHEMA.with_metadata({parts.METADATA: b"all of it"}))
    assert parts.request_of(output) == "all of it"
    for other in (lambda: pq.write_table(rows("s1"), output), lambda: output.write_text("notes")):
        other()
        with pytest.raises(UserError, match="holds something else; name another one, or remove it"):
            parts.request_of(output)


@pytest.mark.parametrize("paths", [False, True])
def test_left_out_files_have_their_number_among_all(paths: bool, tmp_path) -> None:
    outcomes = {
        "/in/a": KEPT,
        "/in/b": FileOutcome("excluded", "a localizer"),
        "/in/c": FileOutcome("quarantined", "cut off"),
    }
    assert parts.write_left_out(tmp_path / "found.parquet", outcomes, paths=paths) == 2
    with (tmp_path / "found.left_out.csv").open() as file:
        found = [list(row.values()) for row in csv.DictReader(file)]
    wanted = [["2", "excluded", "a localizer", "/in/b"], ["3", "quarantined", "cut off", "/in/c"]]
    assert found == (wanted if paths else [row[:3] for row in wanted])
    assert parts.write_left_out(tmp_path / "found.parquet", {"/in/a": KEPT}, paths=paths) == 0
    assert list(tmp_path.iterdir()) == []
