import numpy as np
import pytest

from data_pipeline.stages import contact_sheet as sheets


def example(values: np.ndarray, **more) -> dict:
    """A slice of these HU."""
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    return {
        "pixels": (np.asarray(values) + 1024).astype(np.uint16), "slope": 1.0, "intercept": -1024.0, "hu": True, "low": low,
        "high": high, "spacing": np.array([1, 1, 1], np.float32),
    } | more  # fmt: skip


BODY = np.full((40, 60), -1000)
BODY[10:30, 10:50] = 50


@pytest.mark.parametrize(
    ("part", "lung", "wanted"),
    [("", 0, "soft tissue 40/400 HU"), ("chest", 12, "lung -600/1500 HU"), ("", 12, "lung -600/1500 HU"),
     ("head", 0, "brain 40/80 HU"), ("abdomen", 2, "soft tissue 40/400 HU")],
)  # fmt: skip
def test_the_window_suits_what_is_seen(part: str, lung: int, wanted: str) -> None:
    hu = BODY.copy()
    hu[10 : 10 + lung, 10:50] = -800
    view = sheets.window(example(hu, body_part=part))
    assert view.text == wanted
    centre, width = (float(v) for v in wanted.split()[-2].split("/"))
    assert (view.low, view.high) == (centre - width / 2, centre + width / 2)


def test_values_that_are_no_hu_are_shown_between_their_percentiles() -> None:
    view = sheets.window(example(BODY, hu=False, low=3.0, high=9.0))
    assert (view.low, view.high) == (3.0, 9.0)
    view = sheets.window(example(BODY, hu=False, low=3.0, high=3.0))
    assert view.high > view.low


def test_a_tile_has_true_proportions_and_the_window_s_grey_values() -> None:
    # Twice as far between rows as between columns: 40 x 60 px are 80 x 60 mm.
    pixels = sheets.tile(example(BODY, spacing=np.array([2, 1, 5])), sheets.Window(-160.0, 240.0, ""), 80)
    assert pixels.shape == (80, 80)
    assert not pixels[:, :10].any() and not pixels[:, -10:].any()  # nothing beside the slice
    assert pixels[40, 40] == round((50 + 160) / 400 * 255)
    assert pixels[5, 40] == 0
    rows = np.flatnonzero(pixels[:, 40] > 60)
    assert abs(rows[0] - 20) <= 1 and abs(rows[-1] - 59) <= 1


def test_a_sheet_puts_tiles_in_rows_and_keeps_captions_inside() -> None:
    tiles = [
        (np.full((50, 50), 40 * n, np.uint8), ("a caption that is far too long for its tile", "b")) for n in range(1, 6)
    ]
    picture = np.asarray(sheets.sheet(tiles, 2))
    step = (50 + sheets.GAP, 50 + 2 * sheets.LINE + sheets.GAP)
    assert picture.shape == (3 * step[1] + sheets.GAP, 2 * step[0] + sheets.GAP)
    for n in range(5):
        y, x = sheets.GAP + n // 2 * step[1], sheets.GAP + n % 2 * step[0]
        assert (picture[y : y + 50, x : x + 50] == 40 * (n + 1)).all()
    assert (picture[:, -sheets.GAP :] == 24).all()
    assert (picture[2 * step[1] + sheets.GAP :, step[0] + sheets.GAP :] == 24).all()  # no sixth tile
    with pytest.raises(ValueError, match="no slices"):
        sheets.sheet([], 2)
