"""Pages of text as consoles draw them."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT = (
    "Ward: X1", "NAME^SYNTHETIC", "01-JAN-1970", "Total mAs 123", "DLP 456 mGy cm", "Head Routine", "CTDIvol 51.2", "kV 120 Series 2",
)  # fmt: skip


def page_of_text(side: int, size: int, *, table: bool = False, level: int = 255) -> np.ndarray:
    """A square page of `side` px, letters of `size` px at grey `level`; 0 to 255."""
    image = Image.new("L", (side, side))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for n, y in enumerate(range(4, side - 2 * size, size * 3 // 2)):
        draw.text((6, y), TEXT[n % len(TEXT)] + f"  {n}", fill=level, font=font)
    if table:
        draw.rectangle((1, 1, side - 2, side - 2), outline=200)
        for y in range(2, side, size * 3):
            draw.line((0, y, side, y), fill=128)
    return np.asarray(image)
