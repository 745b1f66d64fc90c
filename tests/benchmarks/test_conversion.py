"""The tables of docs/convert.md, for a model of a few patches."""

import math

import pytest

from benchmarks import conversion
from tests.convert.cases import ENCODERS
from tests.convert.mistakes import MISTAKES

MODEL = {
    "size": "custom", "width": 16, "depth": 2, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
    "image_size": [16, 16], "patch_size": [8, 8], "channels": 1, "dtype": "float32",
}  # fmt: skip


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


@pytest.mark.long
def test_every_layout_is_within_a_hundred_thousandth_of_the_model(tmp_path, capsys) -> None:
    conversion.layout_table(MODEL, tmp_path)
    found = rows(capsys)
    assert {row[0].strip("`") for row in found} == set(ENCODERS)
    assert all(float(row[2]) < 1e-5 for row in found)
    assert {row[0] for row in found if row[3]} == {"`vit_mae`"}  # the layout with a decoder


@pytest.mark.long
def test_every_mistake_is_detected_and_nothing_else(tmp_path, capsys) -> None:
    conversion.mistake_table({**MODEL, "channels": 3}, tmp_path)
    found = rows(capsys)
    sound = [row for row in found if row[0] == "none"]
    assert sound and all(row[-1] == "no" and float(row[2]) < 1e-5 for row in sound)
    mistakes = [row for row in found if row[0] != "none"]
    assert {row[0] for row in mistakes} == set(MISTAKES)
    assert all(row[-1].startswith("by ") for row in mistakes)
    assert all(math.isfinite(float(cell)) for row in mistakes for cell in row[2:5] if cell)
