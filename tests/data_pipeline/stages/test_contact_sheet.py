import dataclasses

import numpy as np
import pytest

from data_pipeline.format.records import DecodedSlice, SliceFacts
from data_pipeline.stages import contact_sheet


def example(hu: np.ndarray, **changes) -> DecodedSlice:
    """A slice with these HU."""
    low, high = (float(v) for v in np.percentile(hu, (0.5, 99.5)))
    one = DecodedSlice(
        pixels=(np.asarray(hu) + 1024).astype(np.uint16), facts=SliceFacts(1.0, -1024.0, low, high, hu=True),
        mean=float(hu.mean()), std=float(hu.std()), body_box=(0, 0, *hu.shape), spacing=(1.0, 1.0, 1.0), modality="CT",
        plane="axial", body_part="", series="", patient="",
    )  # fmt: skip
    return dataclasses.replace(one, **changes)


BODY = np.full((40, 60), -1000)
BODY[10:30, 10:50] = 50


@pytest.mark.parametrize(
    ("part", "lung", "wanted"),
    [("", 0, "soft tissue 40/400 HU"), ("chest", 12, "lung -600/1500 HU"), ("", 12, "lung -600/1500 HU"),
     ("head", 0, "brain 40/80 HU"), ("abdomen", 2, "soft tissue 40/400 HU")],
)  # fmt: skip
def test_view_has_reading_window_of_the_slice(part: str, lung: int, wanted: str) -> None:
    hu = BODY.copy()
    hu[10 : 10 + lung, 10:50] = -800
    view = contact_sheet.view_of(example(hu, body_part=part))
    assert view.text == wanted
    centre, width = (float(v) for v in wanted.split()[-2].split("/"))
    assert (view.low, view.high) == (centre - width / 2, centre + width / 2)


def test_view_of_other_units_is_between_percentiles() -> None:
    view = contact_sheet.view_of(example(BODY, facts=SliceFacts(1.0, 0.0, 3.0, 9.0, hu=False)))
    assert (view.low, view.high) == (3.0, 9.0)
    view = contact_sheet.view_of(example(BODY, facts=SliceFacts(1.0, 0.0, 3.0, 3.0, hu=False)))
    assert view.high > view.low


def test_tile_has_true_proportions_and_grey_values_of_the_window() -> None:
    # Twice as far between rows as between columns: 40 x 60 px are 80 x 60 mm.
    view = contact_sheet.View(-160.0, 240.0, "", "")
    pixels = contact_sheet.tile(example(BODY, spacing=(2.0, 1.0, 5.0)), view, 80)
    assert pixels.shape == (80, 80)
    assert not pixels[:, :10].any() and not pixels[:, -10:].any()  # nothing beside the slice
    assert pixels[40, 40] == round((50 + 160) / 400 * 255)
    assert pixels[5, 40] == 0
    rows = np.flatnonzero(pixels[:, 40] > 60)
    assert abs(rows[0] - 20) <= 1 and abs(rows[-1] - 59) <= 1


def test_sheet_has_tiles_in_rows_and_captions_cut_to_width() -> None:
    tiles = [
        (np.full((50, 50), 40 * n, np.uint8), ("a caption that is far too long for its tile", "b")) for n in range(1, 6)
    ]
    picture = np.asarray(contact_sheet.sheet(tiles, 2))
    gap, line = contact_sheet.GAP, contact_sheet.LINE
    step = (50 + gap, 50 + 2 * line + gap)
    assert picture.shape == (3 * step[1] + gap, 2 * step[0] + gap)
    for n in range(5):
        y, x = gap + n // 2 * step[1], gap + n % 2 * step[0]
        assert (picture[y : y + 50, x : x + 50] == 40 * (n + 1)).all()
    assert (picture[:, -gap:] == 24).all()
    assert (picture[2 * step[1] + gap :, step[0] + gap :] == 24).all()  # no sixth tile
    with pytest.raises(ValueError, match="no slices"):
        contact_sheet.sheet([], 2)
