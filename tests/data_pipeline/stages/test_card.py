import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curia_common import __version__
from data_pipeline.format import shards
from data_pipeline.stages import card
from tests.data_pipeline.cards import page_of, rows, words


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


def test_spacings_are_counted_in_order_and_unknown_ones_last() -> None:
    counts = card.Counts(0)
    counts.add(rows(*[("CT", "axial", "", "a")] * 5, spacing_slices=[0.0, 40.0, 0.7, 0.76, 0.75]))
    made = card.make(
        name="x", settings={}, codec="", counts=counts, shard_rows=[], files={}, intensity={}, left_out={}, holdout=None,
        refused=card.UnitsRefused(), additions=1, inputs=[],
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


@pytest.mark.parametrize("slope", [0.1, 0.3, 1 / 3])
def test_intensities_use_precision_of_the_record(slope: float) -> None:
    """Records have single precision; in double, a value on an edge would be counted in another bin than it is taken from."""
    histogram = np.ones(200, np.int64)
    exact = (slope, -3 * slope, [0.0, 50 * slope, 100 * slope])
    kept = (float(np.float32(slope)), float(np.float32(-3 * slope)), [float(np.float32(p)) for p in exact[2]])
    np.testing.assert_array_equal(
        card.intensities(histogram, *exact, hu=False), card.intensities(histogram, *kept, hu=False)
    )
