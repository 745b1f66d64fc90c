"""Contact sheets: slices as a radiologist would look at them, several in one picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# Centre and width in HU, as reading rooms use them.
LUNG, SOFT_TISSUE, BRAIN = ("lung", -600.0, 1500.0), ("soft tissue", 40.0, 400.0), ("brain", 40.0, 80.0)
HEAD_PARTS = frozenset({"head", "brain", "skull"})
LUNG_HU = (-950.0, -500.0)
LUNG_SHARE = 0.15  # of the slice; in an abdomen the bases of the lungs stay below it
GAP = 6  # px between tiles
LINE = 15  # px per line of text


@dataclasses.dataclass(frozen=True)
class Window:
    """From black to white, in real values.

    Attributes:
      text: how to name it, as "lung -600/1500 HU" (centre/width).
    """

    low: float
    high: float
    text: str


def window(example: Mapping[str, Any]) -> Window:
    """The window that suits a slice: lung, soft tissue or brain for HU, else from the slice's 0.5 to its 99.5 percentile.

    Args:
      example: a slice as records.parse_slice gives it; `body_part` is used where it is there.
    """
    if not example["hu"]:
        low, high = example["low"], example["high"]
        return Window(low, high if high > low else low + 1.0, "p0.5 to p99.5")
    real = _real(example)
    if example.get("body_part", "") in HEAD_PARTS:
        name, centre, width = BRAIN
    elif float(((real > LUNG_HU[0]) & (real < LUNG_HU[1])).mean()) > LUNG_SHARE:
        name, centre, width = LUNG
    else:
        name, centre, width = SOFT_TISSUE
    return Window(centre - width / 2, centre + width / 2, f"{name} {centre:.0f}/{width:.0f} HU")


def _real(example: Mapping[str, Any]) -> Float[np.ndarray, "height width"]:
    return example["pixels"].astype(np.float32) * np.float32(example["slope"]) + np.float32(example["intercept"])


def tile(example: Mapping[str, Any], view: Window, size: int) -> UInt8[np.ndarray, "size size"]:
    """A slice in a square of `size` px, black to white in its window, in its true proportions."""
    real = _real(example)
    grey = np.clip((real - view.low) / (view.high - view.low), 0, 1) * 255
    rows, columns = (float(v) or 1.0 for v in example["spacing"][:2])
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
