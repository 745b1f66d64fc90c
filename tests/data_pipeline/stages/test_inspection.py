"""What an index says, and how two indices differ."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError, UserError
from data_pipeline.format import records, shards
from data_pipeline.stages import inspection
from data_pipeline.stages.inspection import Difference

ROW = {
    "series": "5e1", "patient": "9a", "split": "train", "modality": "CT", "units": "HU", "plane": "axial", "body_part": "",
    "manufacturer": "ge", "flags": 0, "height": 40, "width": 50, "index": 0, "mean": 1.5, "source": "0a", "shard": "x-0",
    "record": 0, "slot": 0, "spacing_rows": 0.5, "spacing_columns": 0.75, "spacing_slices": 2.0,
}  # fmt: skip


def index(*changes: dict[str, Any]) -> pa.Table:
    """An index with a row for each of the changes; slices are numbered unless they say otherwise."""
    return pa.Table.from_pylist([ROW | {"index": n} | change for n, change in enumerate(changes)])


# ---- splits and series


def test_splits_are_those_of_the_shard_table(tmp_path: Path) -> None:
    rows = [
        shards.ShardRow(str(n), split, 1, 1, 9, "0" * 64, 8, 8, None, 0)
        for n, split in enumerate(("train", "test", "train"))
    ]
    columns = {name: [getattr(row, name) for row in rows] for name in shards.ShardRow._fields}
    pq.write_table(pa.table(columns), tmp_path / shards.SHARDS)
    assert inspection.splits_of(tmp_path) == ["test", "train"]
    (tmp_path / shards.SHARDS).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="shards.parquet is damaged; copy the dataset again or build it again"):
        inspection.splits_of(tmp_path)
    (tmp_path / shards.SHARDS).unlink()
    with pytest.raises(UserError, match="no shards in .*: it has no shards.parquet; data_pipeline.build writes one"):
        inspection.splits_of(tmp_path)


def test_series_are_selected_by_a_unique_beginning() -> None:
    table = index({"series": "5e1a"}, {"series": "5e1b"}, {"series": "7f"}, {"series": "5e1a"})
    assert inspection.select_series(table, ["5e1a", "7"])["series"].to_pylist() == ["5e1a", "7f", "5e1a"]
    with pytest.raises(UserError, match="--series 5e: 2 series begin with it$"):
        inspection.select_series(table, ["7f", "5e"])
    with pytest.raises(UserError, match="--series 9: no series begins with it; an existing one is 5e1a$"):
        inspection.select_series(table, ["9"])


# ---- printed counts


def test_every_flag_has_a_name() -> None:
    every = ("IRREGULAR", "LOSSY", "CLIPPED", "RESIZED", "MODALITY_INFERRED", "REFORMATTED")
    assert inspection.flag_names(0) == []
    for name in every:
        assert inspection.flag_names(getattr(records, name)) == [name.lower().replace("_", " ")]
    assert inspection.flag_names(records.LOSSY | records.RESIZED) == ["lossy", "resized"]


def test_counts_name_unknown_values_flags_and_rare_sizes(capsys) -> None:
    sizes = [{"width": 50 + n // 2, "flags": 6 if n < 3 else 2 if n < 5 else 0, "label_lesion": 1} for n in range(16)]
    inspection.print_counts(Path("shards"), index(*sizes))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shards: 16 slices of 1 series of 1 patients in 1 shards"
    assert "  body_part    unknown 16" in lines
    assert "  flags        lossy 5, clipped 3" in lines
    (px,) = [line for line in lines if line.startswith("  px ")]
    assert px.endswith(" and 2 more sizes") and px.count("40x") == 6
    assert "  labels       lesion" in lines


def test_series_are_listed_by_plane_up_to_a_limit(capsys, monkeypatch) -> None:
    monkeypatch.setattr(inspection, "SERIES_SHOWN", 2)
    inspection.print_series(
        index({}, {"flags": records.LOSSY}, {"plane": "coronal", "spacing_slices": 0.5}, {"series": "7f"})
    )
    _, axial, coronal, more = (line.split() for line in capsys.readouterr().out.splitlines())
    assert axial == ["5e1", "9a", "train", "CT", "axial", "2", "40x50", "0.5,", "0.75,", "2", "lossy"]
    assert coronal[4:6] == ["coronal", "1"] and coronal[-1] == "0.5"
    assert more == ["and", "1", "more", "series"]


# ---- differences


def test_difference_counts_slices_series_and_columns() -> None:
    ours = index({}, {}, {}, {"series": "7f"}, {"series": "7f"}, {"series": "8"})
    theirs = index({"mean": 2.0}, {"mean": 2.0, "flags": 2}, {}, {"series": "6"})
    assert inspection.difference(ours, theirs) == Difference(
        same=1, differ=2, only_ours=3, only_ours_series=2, only_theirs=1, only_theirs_series=1,
        columns={"mean": 2, "flags": 1}, new_columns=[],
    )  # fmt: skip


def test_place_of_a_slice_is_no_difference() -> None:
    moved = index({"shard": "x-7", "record": 3, "slot": 1}, {"shard": "x-8"})
    found = inspection.difference(index({}, {}), moved.take([1, 0]))
    assert (found.same, found.differ, found.columns) == (2, 0, {})


def test_missing_value_differs_from_a_value_alone() -> None:
    ours = index({"label_a": 1}, {"label_a": None}, {"label_a": None})
    theirs = index({"label_a": 1}, {"label_a": None}, {"label_a": 2})
    found = inspection.difference(ours, theirs)
    assert (found.same, found.columns) == (2, {"label_a": 1})


def test_columns_of_another_type_are_compared_as_text() -> None:
    found = inspection.difference(index({"label_a": 1}, {"label_a": 2}), index({"label_a": "1"}, {"label_a": "x"}))
    assert (found.same, found.columns) == (1, {"label_a": 1})


def test_column_of_one_index_alone_is_named() -> None:
    found = inspection.difference(index({"label_a": 1}), index({"label_b": 1}))
    assert (found.same, found.new_columns) == (1, ["label_a", "label_b"])
