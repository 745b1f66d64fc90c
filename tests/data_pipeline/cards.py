"""What tests of the dataset card share: rows of an index, and the page as a tree."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.format import shards


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


def rows(*given: tuple[str, str, str, str], **changes: Any) -> pa.Table:
    """Rows of an index: modality, plane, body part, series."""
    columns = {name: [row[n] for row in given] for n, name in enumerate(("modality", "plane", "body_part", "series"))}
    constant = {
        "split": "train", "units": "HU", "manufacturer": "ge", "patient": "p", "near_duplicate_of": "", "spacing_rows": 0.7,
        "spacing_columns": 0.7, "spacing_slices": 1.0, "height": 40, "width": 50, "shard": "x", "slot": 0, "flags": 0,
        "kind": "",
    }  # fmt: skip
    columns |= {name: [value] * len(given) for name, value in constant.items()} | {"record": list(range(len(given)))}
    return pa.table(columns | changes)
