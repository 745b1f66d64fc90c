"""Pages of text that are stored as images: protocols, dose reports and screens, which show names and dates.

Text is strokes, thin and about equally bright, on a background of one value, and it stands in lines. Anatomy on such a background
(air that was cut off, a masked brain) has parts that are wider than a stroke.
"""

import numpy as np
from jaxtyping import Bool, Shaped, UInt16

BACKGROUND_SHARE = 0.35  # of the pixels have the most frequent value itself, as little as in dense text after JPEG
BAND = 1 / 64  # of the range on either side of it is background too
STROKE = 6  # px; blocks of this side that are wholly ink are wider than the strokes of text
SOLID_SHARE = 0.1  # of the ink may be in such blocks: headings, logos
LINES, LETTERS = 3, 4  # lines of a page; letters of an average line
LETTER_SIZE = 4  # px; smaller specks are noise
EMPTY = 0.2  # a row between lines has less ink than this share of a full one: frames run through it
TALLEST_LINE = 0.12  # of the height of the page


def is_page(
    pixels: UInt16[np.ndarray, "rows columns"], values: Shaped[np.ndarray, " values"], counts: Shaped[np.ndarray, " values"]
) -> bool:  # fmt: skip
    """Whether a slice is a page of text.

    Args:
      values, counts: the distinct values of `pixels`, in order, and how many pixels have them.
    """
    place = int(counts.argmax())
    if counts[place] < BACKGROUND_SHARE * pixels.size:  # almost every slice ends here
        return False
    background, low, high = int(values[place]), int(values[0]), int(values[-1])
    band = int((high - low) * BAND)
    ink = pixels > background + band
    if background - band > low:
        ink |= pixels < background - band
    area = np.count_nonzero(ink)
    rows, columns = (side // STROKE for side in ink.shape)
    blocks = ink[: rows * STROKE, : columns * STROKE].reshape(rows, STROKE, columns, STROKE)
    if not area or blocks.all(axis=(1, 3)).sum() * STROKE**2 > SOLID_SHARE * area:
        return False
    contrast = np.abs(pixels.astype(np.int32) - background)
    return _in_lines(contrast >= np.percentile(contrast[ink], 95) / 2)


def _in_lines(strokes: Bool[np.ndarray, "rows columns"]) -> bool:
    """Whether strokes stand in lines."""
    from scipy import ndimage  # slow to import; it changes the warning filters, and few slices come here

    profile = strokes.sum(axis=1)
    full = np.percentile(profile[profile > 0], 90)
    edges = np.diff(np.concatenate([[0], (profile >= EMPTY * full).astype(np.int8), [0]]))
    heights = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    heights = heights[heights > 2]  # others are rules of a table
    letters = np.empty(strokes.shape, np.int32)
    ndimage.label(strokes, np.ones((3, 3)), output=letters)
    count = int((np.bincount(letters.ravel())[1:] >= LETTER_SIZE).sum())
    tallest = max(8, TALLEST_LINE * len(strokes))
    return len(heights) >= LINES and count >= LETTERS * len(heights) and float(np.median(heights)) <= tallest
