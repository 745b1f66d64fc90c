"""The table of docs/units.md on the real data: no sound slice is left out, and faults are found."""

from pathlib import Path

import pytest

from benchmarks import units


@pytest.fixture(scope="module")
def series(real_data: Path) -> list[units.Series]:
    return units.read(real_data)


@pytest.fixture(scope="module")
def rows(series) -> dict[str, units.Row]:
    return {row.kind: row for row in units.measured(series)}


def test_no_slice_of_sound_exams_is_left_out(rows) -> None:
    kept = [row for row in rows.values() if row.wanted == "kept"]
    assert len(kept) == 4 and all(row.slices > 600 for row in kept)
    assert {row.kind: row.slices_left_out for row in kept} == {row.kind: 0 for row in kept}
    assert rows["CT"].proved >= 41


def test_exams_with_a_wrong_header_are_left_out(rows) -> None:
    wrong = rows["CT header over 8-bit values or an MR"]
    assert (wrong.series, wrong.left_out, wrong.slices_left_out) == (4, 4, 29)


def test_lost_and_repeated_rescales_are_found(rows) -> None:
    assert rows["CT without its rescale (values + 1024)"].left_out == rows["CT"].series
    assert rows["CT with the intercept applied twice (values - 1024)"].left_out >= rows["CT"].series - 1


def test_volumes_without_modality_are_told_apart(series) -> None:
    assert units.inferred(series) == {("CT", True): 6, ("MR", False): 98}
