import numpy as np
import pytest

from curia_common import windows


@pytest.mark.parametrize(
    ("window", "low", "high"),
    [
        (windows.LUNG, -1350, 150),
        (windows.SOFT_TISSUE, -160, 240),
        (windows.BONE, -500, 1300),
        (windows.BRAIN, 0, 80),
    ],
)
def test_window_edges_follow_from_centre_and_width(window: windows.Window, low: float, high: float) -> None:
    assert (window.low, window.high) == (low, high)


def test_window_is_written_as_reading_rooms_write_it() -> None:
    assert str(windows.LUNG) == "lung -600/1500 HU"


@pytest.mark.parametrize(("share", "wanted"), [(0.2, windows.LUNG), (0.1, windows.SOFT_TISSUE)])
def test_window_for_takes_lung_by_the_share_of_aerated_lung(share: float, wanted: windows.Window) -> None:
    hu = np.full((100, 100), 40.0)
    hu[: int(100 * share)] = -800.0
    hu[-20:] = -1000.0  # air around the body is no lung
    assert windows.window_for(hu) is wanted


def test_window_for_takes_brain_for_a_head_whatever_it_shows() -> None:
    assert windows.window_for(np.full((8, 8), -800.0), "brain") is windows.BRAIN
