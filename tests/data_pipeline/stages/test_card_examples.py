"""Which slices the dataset card shows, and how."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.format import shards
from data_pipeline.stages import card_examples
from data_pipeline.stages.card_examples import Choice
from tests.data_pipeline.cards import page_of, rows, words


def chosen(count: int, *given: tuple[str, str, str, str]) -> list[int]:
    choice = Choice(count)
    choice.add(rows(*given))
    return [example.record for example in choice.examples()]


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
    choice = Choice(3)
    choice.add(rows(*given, patient=list("ppqqr"), manufacturer=["ge", "ge", "ge", "siemens", "ge"]))
    shown = [(given[one.record][3], one.manufacturer) for one in choice.examples()]
    # One series of each patient; of patient q the one of another scanner.
    assert shown == [("a", "ge"), ("d", "siemens"), ("e", "ge")]


def test_pictures_are_shown_unless_faces_are_dropped() -> None:
    table = rows(("OT", "unknown", "", "a"), ("MR", "sagittal", "", "b"), kind=["image", "volume"])
    for pictures, wanted in ((True, [0]), (False, [])):
        choice = Choice(24, pictures=pictures)
        choice.add(table)
        assert [one.record for one in choice.examples()] == wanted


def test_choice_and_its_memory_do_not_depend_on_parts() -> None:
    given = [("CT", "axial", "chest", f"{n:03d}") for n in range(300)]
    table = rows(
        *given, patient=[f"{n % 7}" for n in range(300)], manufacturer=[["ge", "philips"][n == 299] for n in range(300)]
    )
    whole, parts, few = Choice(4), Choice(4), Choice(4)
    whole.add(table)
    for start in range(0, 300, 7):
        parts.add(table.slice(start, 7))
    few.add(table.slice(0, 30))
    assert whole.examples() == parts.examples()
    assert {one.manufacturer for one in whole.examples()} == {"ge", "philips"}
    assert len(pickle.dumps(parts)) < 2 * len(pickle.dumps(few))  # of ten times the series


def test_examples_are_large_and_described_in_words(dataset: Path) -> None:
    figures = list(page_of(dataset).iter("{http://www.w3.org/1999/xhtml}figure"))
    captions = [words(figure) for figure in figures if list(figure.iter("{http://www.w3.org/1999/xhtml}img"))]
    assert 4 <= len(captions) <= 24
    assert any(
        caption == "CT, abdomen, axial plane. Soft tissue window: black \u2212160, white 240 HU."
        for caption in captions
    )
    assert any(caption.startswith("MR, head, axial plane. Black to white: all but") for caption in captions)
    choice = Choice(3)
    choice.add(pq.read_table(dataset / shards.INDEX))
    for data, _ in card_examples.pictures(dataset, choice.examples()):
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (card_examples.SIDE, card_examples.SIDE) and np.asarray(picture).std() > 10


def test_examples_can_be_left_out(tmp_path: Path, write_series, run_build) -> None:
    write_series(tmp_path / "in", 5)
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out", "--examples", 0).code == 0
    assert "<img" not in (tmp_path / "out" / shards.PAGE).read_text()
