"""Contact sheets: slices as a radiologist would look at them, several in one picture."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from curia_common import windows
from data_pipeline.format.records import DecodedSlice

GAP = 6  # px between tiles
LINE = 15  # px per line of text


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown from black to white, in real values, and how to name it ("lung -600/1500 HU", and "lung window")."""

    low: float
    high: float
    text: str
    name: str


def view_of(one: DecodedSlice) -> View:
    """The reading window that suits a slice in HU; else from the slice's 0.5 to its 99.5 percentile."""
    if one.facts.hu:
        window = windows.window_for(one.real, one.body_part)
        return View(window.low, window.high, str(window), f"{window.name} window")
    low, high = one.facts.low, one.facts.high
    return View(low, high if high > low else low + 1.0, "p0.5 to p99.5", "own range")


def tile(one: DecodedSlice, view: View, size: int) -> UInt8[np.ndarray, "size size"]:
    """A slice in a square of `size` px, black to white in its window, in its true proportions."""
    real = one.real
    grey = np.clip((real - view.low) / (view.high - view.low), 0, 1) * 255
    rows, columns = (float(v) or 1.0 for v in one.spacing[:2])
    height, width = real.shape[0] * rows, real.shape[1] * columns
    scale = size / max(height, width)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(np.rint(grey).astype(np.uint8)).resize(target, Image.Resampling.LANCZOS)
    square = Image.new("L", (size, size))
    square.paste(picture, ((size - target[0]) // 2, (size - target[1]) // 2))
    return np.asarray(square)


def sheet(tiles: Sequence[tuple[UInt8[np.ndarray, "size size"], Sequence[str]]], columns: int) -> Image.Image:
    """Tiles with their captions, `columns` in a row."""
    if not tiles:
        raise ValueError("a sheet of no slices")
    size = tiles[0][0].shape[0]
    lines = max(len(caption) for _, caption in tiles)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step = (size + GAP, size + LINE * lines + GAP)
    picture = Image.new("L", (columns * step[0] + GAP, rows * step[1] + GAP), 24)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    for number, (pixels, caption) in enumerate(tiles):
        x, y = GAP + number % columns * step[0], GAP + number // columns * step[1]
        picture.paste(Image.fromarray(pixels), (x, y))
        for line, text in enumerate(caption):
            while text and draw.textlength(text, font) > size:
                text = text[:-1]
            draw.text((x, y + size + line * LINE), text, 220, font)
    return picture
