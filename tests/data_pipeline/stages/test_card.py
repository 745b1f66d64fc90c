import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curia_common import __version__
from data_pipeline.format import shards
from data_pipeline.stages import card
from tests import browser


def page_of(folder: Path) -> ElementTree.Element:
    text = (folder / shards.PAGE).read_text(encoding="utf-8")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(element: ElementTree.Element) -> str:
    return " ".join(text.strip() for text in element.itertext() if text.strip())


def rows_under(page: ElementTree.Element, caption: str) -> dict[str, str]:
    """First and last cells of the table with a caption."""
    for table in page.iter("{http://www.w3.org/1999/xhtml}table"):
        title = table.find("{http://www.w3.org/1999/xhtml}caption")
        if title is not None and title.text == caption:
            rows = [list(row) for row in table.iter("{http://www.w3.org/1999/xhtml}tr")]
            return {words(cells[0]): words(cells[-1]) for cells in rows}
    raise AssertionError(f"no table {caption}")


# ---- counts


def test_page_shows_counts_of_the_dataset(dataset: Path) -> None:
    page, index = page_of(dataset), pq.read_table(dataset / shards.INDEX)
    assert rows_under(page, "Modality") == {"CT": "80", "MR": "80"}
    assert rows_under(page, "Body part") == {"head": "80", "abdomen": "40", "chest": "40"}
    for caption, column in (("Plane", "plane"), ("Vendor", "manufacturer")):
        counts = {row["values"]: f"{row['counts']:,}" for row in index[column].value_counts().to_pylist()}
        assert rows_under(page, caption) == counts
    assert rows_under(page, "Longer side, px") == {"0 to 64": "160"}
    spacing = rows_under(page, "Spacing between slices, mm")
    assert sum(int(n) for n in spacing.values()) == 160
    text = words(page)
    assert f"{len(index):,}" in text and "160 input files: 160 kept" in text
    assert "8 patients" not in text  # figures stand under their names
    assert "patients 8" in text and "series 32" in text


def test_intensities_count_every_pixel_once(dataset: Path) -> None:
    intensity = json.loads((dataset / shards.CARD).read_text())["intensity"]
    hu, relative = np.zeros(len(card.EDGES["HU"]) - 1), 0
    for split in ("train", "validation", "test"):
        source = shards.SliceSource(dataset, split)
        for number in range(len(source)):
            one = source[number]
            if one.facts.hu:
                hu += np.histogram(np.clip(one.real, -1024, 3071), card.EDGES["HU"])[0]
            else:
                relative += one.pixels.size
    np.testing.assert_array_equal(intensity["HU"]["pixels"], hu)
    assert sum(intensity["relative"]["pixels"]) == relative
    assert intensity["HU"]["edges"] == card.EDGES["HU"].tolist()


def test_relative_intensities_have_the_series_percentiles_at_0_and_1() -> None:
    histogram = np.zeros(300, np.int64)
    histogram[[100, 150, 200]] = (3, 5, 7)
    bins = card.intensities(histogram, 2.0, -50.0, (150.0, 250.0, 350.0), hu=False)
    found = {round(float(card.EDGES["relative"][n]), 3): int(bins[n]) for n in np.flatnonzero(bins)}
    assert found == {0.0: 3, 0.5: 5, 1.0: 7}
    # A single value has no range to divide by.
    assert card.intensities(histogram[:101], 1.0, 0.0, (100.0, 100.0, 100.0), hu=False).sum() == 3


def test_intensities_outside_count_for_outermost_bins() -> None:
    histogram = np.zeros(9000, np.int64)
    histogram[[0, 8999]] = (2, 4)
    bins = card.intensities(histogram, 1.0, -2000.0, (0.0, 0.0, 0.0), hu=True)
    assert (bins[0], bins[-1], bins.sum()) == (2, 4, 6)


def rows(*given: tuple[str, str, str, str], **changes: Any) -> pa.Table:
    """Rows of an index: modality, plane, body part, series."""
    columns = {name: [row[n] for row in given] for n, name in enumerate(("modality", "plane", "body_part", "series"))}
    constant = {
        "split": "train", "units": "HU", "manufacturer": "ge", "patient": "p", "near_duplicate_of": "", "spacing_rows": 0.7,
        "spacing_columns": 0.7, "spacing_slices": 1.0, "height": 40, "width": 50, "shard": "x", "slot": 0,
    }  # fmt: skip
    columns |= {name: [value] * len(given) for name, value in constant.items()} | {"record": list(range(len(given)))}
    return pa.table(columns | changes)


def test_unknown_spacing_is_named_unknown() -> None:
    counts = card.Counts(0)
    counts.add(rows(*[("CT", "axial", "", "a")] * 5, spacing_slices=[0.0, 0.7, 0.75, 0.76, 40.0]))
    assert card._in_order(counts.spacing["between slices"], card.SPACING_EDGES) == {
        "0.5 to 0.75": 2, "0.75 to 1": 1, "over 10": 1, "unknown": 1,
    }  # fmt: skip


def test_counts_do_not_depend_on_parts_of_the_index() -> None:
    given = [("CT", "axial", part, series) for part in ("chest", "") for series in "abc" for _ in range(4)]
    table = rows(
        *given, patient=[row[3] for row in given], near_duplicate_of=["a" if row[3] == "b" else "" for row in given]
    )
    whole, parts = card.Counts(5, frozenset("c")), card.Counts(5, frozenset("c"))
    whole.add(table)
    for start in range(0, len(table), 4):  # a series of a body part at a time, as shards hold them
        parts.add(table.slice(start, 4))
    assert whole.examples() == parts.examples() and len(whole.examples()) == 5
    for counts in (whole, parts):
        assert (counts.slices, counts.held_out, counts.by["body_part"]) == (24, 8, {"chest": 12, "": 12})
        assert counts.near_duplicates() == {"series": 1, "of another patient": 1, "in another split": 0}


# ---- examples


def chosen(count: int, *given: tuple[str, str, str, str]) -> list[int]:
    counts = card.Counts(count)
    counts.add(rows(*given))
    return [example.record for example in counts.examples()]


def test_examples_are_mid_series_and_show_every_kind_first() -> None:
    given = [("CT", "axial", "chest", series) for series in "aabbb"] + [("MR", "sagittal", "knee", "c")] * 5
    assert chosen(24, *given) == [1, 7, 3]
    assert chosen(2, *given) == [1, 7]
    assert chosen(0, *given) == []


@pytest.mark.parametrize("part", ["head", "brain", "orbit", "neck", "cspine", "pituitary", "wholebody", ""])
@pytest.mark.parametrize("plane", ["sagittal", "coronal", "oblique", "unknown"])
def test_no_example_can_show_a_face(part: str, plane: str) -> None:
    assert chosen(24, ("MR", plane, part, "a"), ("MR", "axial", part, "b")) == [1]


def test_examples_are_pictures_in_reading_windows(dataset: Path) -> None:
    figures = list(page_of(dataset).iter("{http://www.w3.org/1999/xhtml}figure"))
    captions = [words(figure) for figure in figures if figure.find("{http://www.w3.org/1999/xhtml}img") is not None]
    assert 4 <= len(captions) <= 24
    assert any("CT axial abdomen, soft tissue 40/400 HU" in caption for caption in captions)
    assert any("p0.5 to p99.5" in caption for caption in captions)
    counts = card.Counts(3)
    counts.add(pq.read_table(dataset / shards.INDEX))
    for data, _ in card.examples(dataset, counts.examples()):
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (card.TILE, card.TILE) and np.asarray(picture).std() > 10


def test_card_names_the_version_of_the_software(dataset: Path) -> None:
    assert json.loads((dataset / shards.CARD).read_text())["version"] == __version__


def test_examples_can_be_left_out(tmp_path: Path, write_series, run_build) -> None:
    write_series(tmp_path / "in", 5)
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out", "--examples", 0).code == 0
    assert "<img" not in (tmp_path / "out" / shards.PAGE).read_text()


# ---- the page


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
        "slices_left_out": {"<i>": 1}, "near_duplicates": {"series": 0, "of another patient": 0, "in another split": 0},
        "settings": {"size": None}, "shards": [{"file": "x", "split": "train", "slices": 1, "bytes": 5, "sha256": "0" * 64}],
    }  # fmt: skip
    page = ElementTree.fromstring(card.page(made, []).removeprefix("<!DOCTYPE html>\n"))
    assert "<b>x</b>" in words(page) and "c & d" in words(page) and "as acquired" in words(page)
    assert rows_under(page, "Modality") == {"unknown": "1"}


def test_reasons_are_listed_by_fate_and_number(tmp_path: Path, write_series, run_build) -> None:
    write_series(tmp_path / "in", 3)
    for n in range(2):
        (tmp_path / "in" / f"{n}.pdf").write_bytes(b"%PDF")
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out").code == 0
    text = words(page_of(tmp_path / "out"))
    assert re.search(r"kept fewer than 5 slices 3 excluded not a medical image .*? 2 ", text)
    assert "5 input files: 3 kept, 2 excluded." in text


@pytest.mark.parametrize("slope", [0.1, 0.3, 1 / 3])
def test_intensities_use_precision_of_the_record(slope: float) -> None:
    """Records have single precision; in double, a value on an edge would be counted in another bin than it is taken from."""
    histogram = np.ones(200, np.int64)
    exact = (slope, -3 * slope, [0.0, 50 * slope, 100 * slope])
    kept = (float(np.float32(slope)), float(np.float32(-3 * slope)), [float(np.float32(p)) for p in exact[2]])
    np.testing.assert_array_equal(
        card.intensities(histogram, *exact, hu=False), card.intensities(histogram, *kept, hu=False)
    )
