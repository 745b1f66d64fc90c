"""Building blocks of the page: escaping, numbers, and what may be left out."""

import base64
from pathlib import Path

import matplotlib.figure
import pytest

from curia_jax.report import page

HOSTILE = '<b onclick="x">&\'</b>'
ESCAPED = "&lt;b onclick=&quot;x&quot;&gt;&amp;&#x27;&lt;/b&gt;"


@pytest.mark.parametrize(
    "made",
    [
        page.page(HOSTILE, HOSTILE, [], HOSTILE),
        page.figure("data:image/png;base64,", HOSTILE, HOSTILE),
        page.key_figures([(HOSTILE, HOSTILE)]),
        page.table(HOSTILE, [HOSTILE], [HOSTILE], []),
        page.row(page.cell(HOSTILE), page.code(HOSTILE), page.number(HOSTILE, HOSTILE)),
        page.paragraph(HOSTILE),
    ],
    ids=["page", "figure", "key_figures", "table", "row", "paragraph"],
)
def test_texts_are_escaped_everywhere(made: str) -> None:
    assert ESCAPED in made and "<b " not in made


def test_page_leaves_out_empty_sections() -> None:
    made = page.page("Run", "Trained", ["<p>one</p>", "", "<p>two</p>"], "Python")
    assert made.count("<section>") == 2
    assert "<section><p>one</p></section><section><p>two</p></section>" in made


def test_table_has_columns_of_words_then_of_numbers() -> None:
    rows = [
        page.row(page.cell("CT"), page.number("5"), style="first"),
        page.row(page.cell("MR"), page.number("7", "[6, 8]")),
    ]
    made = page.table("", ["modality"], ["slices"], rows)
    assert made == (
        '<div class="scroll"><table><thead><tr><th>modality</th><th class="number">slices</th></tr></thead><tbody>'
        '<tr class="first"><td>CT</td><td class="number">5</td></tr>'
        '<tr><td>MR</td><td class="number">7 <small>[6, 8]</small></td></tr></tbody></table></div>'
    )
    assert page.table("By modality", ["modality"], [], []).startswith('<p class="note">By modality</p><div')


def test_figure_without_caption_has_none() -> None:
    assert "figcaption" not in page.figure("data:", "", "loss")


def test_embedded_picture_is_that_on_disk_and_always_the_same(tmp_path: Path) -> None:
    made = []
    for name in ("a.png", "b.png"):
        figure = matplotlib.figure.Figure(figsize=(1, 1))
        figure.add_subplot().plot([0, 1])
        made.append(page.embed(figure, tmp_path / name))
    assert made[0] == made[1]
    kind, data = made[0].split(",", 1)
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()


def test_picture_is_drawn_again_only_with_another_key_or_when_damaged(tmp_path: Path) -> None:
    drawn = []

    def draw() -> matplotlib.figure.Figure:
        drawn.append(1)
        return matplotlib.figure.Figure(figsize=(1, 1))

    path = tmp_path / "a.png"
    first = page.draw_once(path, "results 1", draw)
    assert page.draw_once(path, "results 1", draw) == first and len(drawn) == 1
    page.draw_once(path, "results 2", draw)
    page.draw_once(path, "", draw)
    page.draw_once(path, "", draw)
    assert len(drawn) == 4
    page.draw_once(path, "results 2", draw)
    path.write_bytes(path.read_bytes()[:20])
    assert page.draw_once(path, "results 2", draw) == page.draw_once(path, "results 2", draw)
    assert len(drawn) == 6


@pytest.mark.parametrize(("number", "text"), [(0, "0 slices"), (1, "1 slice"), (2000, "2,000 slices")])
def test_count_has_plural_and_thousands(number: int, text: str) -> None:
    assert page.count(number, "slice") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (99.4, "99 s"), (210.0, "3.5 min"), (5400, "1.5 h"), (360_000, "100.0 h")]
)
def test_duration_has_a_unit_that_suits_it(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (2500, "2.5 kB"), (1_250_000, "1.2 MB"), (3_000_000_000, "3.0 GB")]
)
def test_file_size_is_that_of_a_file_or_of_all_in_a_folder(tmp_path: Path, size: int, text: str) -> None:
    (tmp_path / "shards" / "a").mkdir(parents=True)
    with (tmp_path / "shards" / "a" / "file").open("wb") as file:
        file.truncate(size)
    assert page.file_size(tmp_path / "shards" / "a" / "file") == page.file_size(tmp_path / "shards") == text


def test_file_size_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert page.file_size(tmp_path / "none") == ""
