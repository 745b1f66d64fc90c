"""The dataset card as a page."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_pipeline.format import shards
from data_pipeline.stages import card, card_page
from tests import browser
from tests.data_pipeline.cards import page_of, rows_of, rows_under, words


def test_page_shows_counts_of_the_dataset(dataset: Path) -> None:
    page, index = page_of(dataset), pq.read_table(dataset / shards.INDEX)
    kinds = [[words(cell) for cell in row] for row in rows_of(page, "What the values mean")]
    assert [row[:2] + row[3:] for row in kinds] == [
        ["CT", "Hounsfield units", "80", "16", "none"], ["MR", "units of its own", "80", "16", "none"],
    ]  # fmt: skip
    assert rows_under(page, "Body part") == {"head": "80", "abdomen": "40", "chest": "40"}
    # A property with one value is a sentence.
    (plane,), (vendor,) = (set(index[column].to_pylist()) for column in ("plane", "manufacturer"))
    assert f"Of all slices: plane: {plane}; vendor: {vendor};" in words(page)
    assert "longer side, px: 0 to 64" in words(page)
    (between,) = json.loads((dataset / shards.CARD).read_text())["spacing_mm"]["between slices"]
    assert f"spacing between slices, mm: {between}" in words(page)
    text = words(page)
    assert f"{len(index):,}" in text and "160 input files: 160 kept" in text
    assert "8 patients" not in text  # figures stand under their names
    assert "patients 8" in text and "series 32" in text


def test_page_is_self_contained_and_anonymous(dataset: Path) -> None:
    text = (dataset / shards.PAGE).read_text()
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org/1999/xhtml", "")
    index = pq.read_table(dataset / shards.INDEX)
    for column in ("series", "patient", "source"):
        assert not [value for value in index[column].unique().to_pylist() if value in text]
    assert "PHANTOM" not in text and str(dataset) not in text and ".dcm" not in text


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 420)])
def test_page_opens_without_problems(dataset: Path, scheme, width) -> None:
    assert browser.problems(dataset / "index.html", scheme, width) == []


def test_page_escapes_markup() -> None:
    made: dict[str, Any] = {
        "name": "<b>x</b>", "slices": 1, "series": 1, "patients": 1, "bytes": 5, "codec": "c & d",
        "slices_by": {name: {"": 1} for name in card.COUNTED} | {"split": {"train": 1}},
        "patients_by_split": {"train": 1, "validation": 0, "test": 0}, "spacing_mm": {}, "longer_side_px": {"0 to 64": 1},
        "intensity": {}, "files": dict.fromkeys(card.FATES, 0), "reasons": {fate: {} for fate in card.FATES},
        "built": "2026-01-01", "version": "1", "sources": ["<s>"], "patients_from": {"file": 1}, "labels": {"<u>": {"slices": {"train": 1}, "classes": {"<q>": {"train": 1}}}},
        "kinds": [{"modality": "", "units": "HU", "slices": 1, "series": 1, "modality_inferred": 0, "series_by_units_evidence": {}}],
        "units_refused": {"series": 0, "slices": 0},
        "slices_left_out": {"<i>": 1}, "near_duplicates": {"series": 0, "of another patient": 0, "in another split": 0},
        "settings": {"size": None}, "shards": [{"file": "x", "split": "train", "slices": 1, "bytes": 5, "sha256": "0" * 64}],
    }  # fmt: skip
    page = ElementTree.fromstring(card_page.page(made, []).removeprefix("<!DOCTYPE html>\n"))
    assert "<b>x</b>" in words(page) and "c & d" in words(page) and "as acquired" in words(page)
    assert all(text in words(page) for text in ("<s>", "<i>")) and rows_under(page, "<u>") == {
        "class": "train",
        "<q>": "1",
    }
    assert "no patient is named for 1 file; each counts as a patient of its own." in words(page)


def test_vendors_are_written_as_they_write_themselves() -> None:
    assert [card_page.vendor(name) for name in ("ge", "united imaging", "unknown")] == ["GE", "United Imaging", ""]


def test_reasons_are_listed_by_fate_and_number(tmp_path: Path, write_series, run_build) -> None:
    write_series(tmp_path / "in", 3)
    for n in range(2):
        (tmp_path / "in" / f"{n}.pdf").write_bytes(b"%PDF")
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out").code == 0
    text = words(page_of(tmp_path / "out"))
    assert re.search(r"kept fewer than 5 slices 3 excluded not a medical image .*? nothing to do.*? 2 ", text)
    assert "5 input files: 3 kept, 2 excluded." in text
