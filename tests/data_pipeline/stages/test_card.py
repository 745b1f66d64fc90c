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
from data_pipeline.stages import card, card_examples, card_page
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


def rows_of(page: ElementTree.Element, heading: str) -> list[list[ElementTree.Element]]:
    """The rows of the first table under a heading, without its head."""
    body = list(page)[1]
    parts = list(body)
    start = next(n for n, part in enumerate(parts) if part.tag.endswith("h2") and words(part) == heading)
    rows = [list(row) for row in parts[start + 1].iter("{http://www.w3.org/1999/xhtml}tr")]
    return rows[1:]


# ---- counts


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
        "spacing_columns": 0.7, "spacing_slices": 1.0, "height": 40, "width": 50, "shard": "x", "slot": 0, "flags": 0,
    }  # fmt: skip
    columns |= {name: [value] * len(given) for name, value in constant.items()} | {"record": list(range(len(given)))}
    return pa.table(columns | changes)


def test_spacings_are_counted_in_order_and_unknown_ones_last() -> None:
    counts = card.Counts(0)
    counts.add(rows(*[("CT", "axial", "", "a")] * 5, spacing_slices=[0.0, 40.0, 0.7, 0.76, 0.75]))
    made = card.make(
        name="x", settings={}, codec="", counts=counts, shard_rows=[], files={}, intensity={}, left_out={}, holdout=None,
        additions=1, inputs=[],
    )  # fmt: skip
    assert list(made["spacing_mm"]["between slices"].items()) == [
        ("0.5 to 0.75", 2), ("0.75 to 1", 1), ("over 10", 1), ("unknown", 1),
    ]  # fmt: skip


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


def test_examples_are_of_different_patients_and_scanners_first() -> None:
    given = [("CT", "axial", "chest", series) for series in "abcde"]
    counts = card.Counts(3)
    counts.add(rows(*given, patient=list("ppqqr"), manufacturer=["ge", "ge", "ge", "siemens", "ge"]))
    shown = [(given[one.record][3], one.manufacturer) for one in counts.examples()]
    # One series of each patient; of patient q the one of another scanner.
    assert shown == [("a", "ge"), ("d", "siemens"), ("e", "ge")]


def test_pictures_are_shown_unless_faces_are_dropped() -> None:
    table = rows(("OT", "unknown", "", "a"), ("MR", "sagittal", "", "b"), kind=["image", "volume"])
    for pictures, wanted in ((True, [0]), (False, [])):
        counts = card.Counts(24, pictures=pictures)
        counts.add(table)
        assert [one.record for one in counts.examples()] == wanted


def test_choice_of_examples_is_bounded_and_independent_of_parts() -> None:
    given = [("CT", "axial", "chest", f"{n:03d}") for n in range(300)]
    table = rows(
        *given, patient=[f"{n % 7}" for n in range(300)], manufacturer=[["ge", "philips"][n == 299] for n in range(300)]
    )
    whole, parts = card.Counts(4), card.Counts(4)
    whole.add(table)
    for start in range(0, 300, 7):
        parts.add(table.slice(start, 7))
    assert whole.examples() == parts.examples()
    assert {one.manufacturer for one in whole.examples()} == {"ge", "philips"}
    assert max(len(group) for group in parts.choice._groups.values()) <= 3 * 4


def test_examples_are_large_and_described_in_words(dataset: Path) -> None:
    figures = list(page_of(dataset).iter("{http://www.w3.org/1999/xhtml}figure"))
    captions = [words(figure) for figure in figures if list(figure.iter("{http://www.w3.org/1999/xhtml}img"))]
    assert 4 <= len(captions) <= 24
    assert any(
        caption == "CT, abdomen, axial plane. Soft tissue window: black \u2212160, white 240 HU."
        for caption in captions
    )
    assert any(caption.startswith("MR, head, axial plane. Black to white: all but") for caption in captions)
    counts = card.Counts(3)
    counts.add(pq.read_table(dataset / shards.INDEX))
    for data, _ in card_examples.pictures(dataset, counts.examples()):
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (card_examples.SIDE, card_examples.SIDE) and np.asarray(picture).std() > 10


# ---- labels, patients, units


def test_labels_are_counted_by_class_and_split() -> None:
    counts = card.Counts(0)
    given = [("CT", "axial", "chest", f"{n}") for n in range(6)]
    splits = ["train", "train", "test", "train", "test", "validation"]
    counts.add(
        rows(
            *given,
            split=splits,
            label_grade=[2, 10, 2, None, 10, 10],
            label_side=["left", None, None, None, "right", None],
        )
    )
    counts.add(rows(*given[:1], split=["train"], label_grade=[2], label_side=[None]))
    found = {name: label.to_json() for name, label in counts.labels.items()}
    assert found == {
        "grade": {
            "slices": {"train": 3, "validation": 1, "test": 2},
            "range": [2.0, 10.0],
            "classes": {"2": {"test": 1, "train": 2}, "10": {"test": 1, "train": 1, "validation": 1}},
        },
        "side": {"slices": {"train": 1, "test": 1}, "classes": {"left": {"train": 1}, "right": {"test": 1}}},
    }
    assert list(found["grade"]["classes"]) == ["2", "10"]  # by size, not by the alphabet


def test_label_with_many_values_is_a_range() -> None:
    label = card.LabelCount()
    for start in (0, 700):
        label.add(["train"] * 700, pa.chunked_array([[n / 2 for n in range(start, start + 700)]]))
    assert label.to_json() == {"slices": {"train": 1400}, "range": [0.0, 699.5]}


def test_units_evidence_is_counted_by_series() -> None:
    counts = card.Counts(0)
    given = [("CT", "axial", "", series) for series in "aabbcd"]
    evidence = ["proved"] * 2 + ["guessed"] * 2 + [None] + ["proved"]
    counts.add(rows(*given, units_evidence=evidence, flags=[0, 0, 16, 16, 0, 0]))
    (kind,) = counts.kinds()
    assert kind == {
        "modality": "CT", "units": "HU", "slices": 6, "series": 4, "modality_inferred": 2,
        "series_by_units_evidence": {"proved": 2, "declared": 1, "guessed": 1},
    }  # fmt: skip


def test_unknown_patients_are_counted_apart() -> None:
    counts = card.Counts(0)
    counts.add(
        rows(
            *[("OT", "unknown", "", series) for series in "abc"],
            patient=list("pqr"),
            patient_from=["file", "file", "id"],
        )
    )
    assert {name: len(found) for name, found in counts.patients_from.items()} == {"file": 2, "id": 1}


def test_many_inputs_of_a_folder_are_named_by_the_folder() -> None:
    assert card.sources(["exams/", "b.zip", "s3://bucket/x"]) == ["exams/", "b.zip", "s3://bucket/x"]
    assert card.sources([f"exams/{name}" for name in ("Doe", "Roe", "Poe", "Low")]) == ["4 inputs in exams"]


def test_card_names_the_version_of_the_software(dataset: Path) -> None:
    found = json.loads((dataset / shards.CARD).read_text())
    assert found["version"] == __version__ and found["built"] == "2026-01-01"
    assert f"Built on 2026-01-01 by Curia JAX {__version__} from {found['sources'][0]}." in words(page_of(dataset))


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
        "built": "2026-01-01", "version": "1", "sources": ["<s>"], "patients_from": {"file": 1}, "labels": {"<u>": {"slices": {"train": 1}, "classes": {"<q>": {"train": 1}}}},
        "kinds": [{"modality": "", "units": "HU", "slices": 1, "series": 1, "modality_inferred": 0, "series_by_units_evidence": {}}],
        "slices_left_out": {"<i>": 1}, "near_duplicates": {"series": 0, "of another patient": 0, "in another split": 0},
        "settings": {"size": None}, "shards": [{"file": "x", "split": "train", "slices": 1, "bytes": 5, "sha256": "0" * 64}],
    }  # fmt: skip
    page = ElementTree.fromstring(card_page.page(made, []).removeprefix("<!DOCTYPE html>\n"))
    assert "<b>x</b>" in words(page) and "c & d" in words(page) and "as acquired" in words(page)
    assert all(text in words(page) for text in ("<s>", "<i>")) and rows_under(page, "<u>") == {
        "class": "train",
        "<q>": "1",
    }
    assert "1 files name none and count as one patient each" in words(page)


def test_reasons_are_listed_by_fate_and_number(tmp_path: Path, write_series, run_build) -> None:
    write_series(tmp_path / "in", 3)
    for n in range(2):
        (tmp_path / "in" / f"{n}.pdf").write_bytes(b"%PDF")
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out").code == 0
    text = words(page_of(tmp_path / "out"))
    assert re.search(r"kept fewer than 5 slices 3 excluded not a medical image .*? nothing to do.*? 2 ", text)
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
