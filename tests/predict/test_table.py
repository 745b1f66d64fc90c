"""Rows of the table from scores that are known."""

import numpy as np
import pytest

from curia_jax.evaluate.preparation import default_settings
from curia_jax.models.head import HeadConfig
from curia_jax.predict import classifier, table
from curia_jax.predict.classifier import Classifier, Scores
from data_pipeline.format.shards import SliceSource
from tests.convert import fine_tuned

CLASSES = HeadConfig("linear", "cls", "classes", ("no", "yes"))


class Known(Classifier):
    """Scores a slice by its number within the series: 0.1 more for each, for the first output, and the rest for the second."""

    places: dict[int, int]

    def scores(self, source, cases, *, together: int, canvas: tuple[int, int]) -> Scores:
        assert together >= 1 and canvas[0] % 128 == 0
        by_slice = np.full((len(cases), self.slices, self.head.outputs), -np.inf)
        for case, numbers in enumerate(cases):
            values = np.array([0.1 * self.places[int(number)] for number in numbers])
            by_slice[case, : len(numbers)] = np.stack([values, 1 - values], axis=1)[:, : self.head.outputs]
        outputs = np.where(np.isfinite(by_slice), by_slice, 0).sum(axis=1) / np.isfinite(by_slice).sum(axis=1)
        return Scores(outputs, by_slice)


def known(source: SliceSource, head: HeadConfig = CLASSES, slices: int = 1) -> Known:
    loaded = classifier.load(str(fine_tuned.run(fine_tuned.CLASSES)), otherwise=default_settings())
    model = Known(loaded.config, head, {}, loaded.settings, slices, 7, "0" * 16)
    object.__setattr__(model, "places", dict(enumerate(source.index["index"].to_pylist())))
    return model


@pytest.fixture(scope="module")
def source(dataset) -> SliceSource:
    return SliceSource(dataset, "test+train")


@pytest.mark.parametrize(
    ("volumes", "wanted"),
    [
        ("mean", [("no", 0.2, 4), ("yes", 0.8, 0)]),
        ("max", [("no", 0.4, 4), ("yes", 1.0, 0)]),
        ("each", [row for n in range(5) for row in (("no", 0.1 * n, n), ("yes", 1 - 0.1 * n, n))]),
    ],
)  # fmt: skip
def test_series_of_five_slices_gets_mean_highest_or_each(source, volumes: str, wanted: list[tuple]) -> None:
    found = table.rows(known(source), source, volumes, batch_size=4)
    series = set(source.index["series"].to_pylist())
    assert len(found) == len(series) * len(wanted)
    for name in series:
        rows = [row for row in found.to_pylist() if row["series"] == name]
        assert [(row["class"], pytest.approx(row["probability"]), row["slice"]) for row in rows] == wanted


def test_ids_are_pseudonyms_or_the_names_that_are_given(source) -> None:
    series = sorted(set(source.index["series"].to_pylist()))
    found = table.rows(known(source), source, "mean", batch_size=4, names={series[0]: "exams/7"}, only=series[:2])
    of_series = dict(zip(source.index["series"].to_pylist(), source.index["patient"].to_pylist(), strict=True))
    ids = {row["series"]: row["id"] for row in found.to_pylist()}
    assert ids == {series[0]: "exams/7", series[1]: of_series[series[1]]}


def test_bag_has_slices_spread_over_the_series(source) -> None:
    found = table.rows(known(source, slices=3), source, "mean", batch_size=64)
    # Slices 0, 2 and 4 of 5.
    assert {(row["class"], round(row["probability"], 6), row["slice"]) for row in found.to_pylist()} == {
        ("no", 0.2, 4),
        ("yes", 0.8, 0),
    }


@pytest.mark.parametrize("slices", [1, 3])
def test_no_slice_stands_for_the_mean_of_values(source, slices: int) -> None:
    head = HeadConfig("linear", "cls", "value", ("age",))
    found = table.rows(known(source, head, slices), source, "mean", batch_size=64)
    assert found.column_names[3] == "value" and found["slice"].null_count == len(found) == 8
    if slices == 1:
        assert set(table.rows(known(source, head), source, "max", batch_size=64)["slice"].to_pylist()) == {4}


def test_nothing_left_is_a_table_without_rows(source) -> None:
    found = table.rows(known(source), None, "mean", batch_size=4)
    assert len(found) == 0 and found.schema == table.schema(CLASSES)
