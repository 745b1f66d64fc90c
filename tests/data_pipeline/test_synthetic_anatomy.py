import numpy as np
import pytest

from data_pipeline import synthetic_anatomy as anatomy
from data_pipeline.synthetic_anatomy import LABELS, Canvas, Position

STRAIGHT = Position()


def canvas(position: Position = STRAIGHT, **settings) -> Canvas:
    return Canvas((1, 64, 64), np.random.default_rng(0), position, places=[0.0], **settings)


@pytest.mark.parametrize("rotation", [0.0, 0.7])
def test_position_around_a_point_puts_it_in_the_middle(rotation: float) -> None:
    seen = canvas(Position.around((0.4, -0.2), half_width=0.25, rotation=rotation))
    assert float(seen.x[0, 31:33, 31:33].mean()) == pytest.approx(0.4, abs=0.03)  # the wobble moves it by up to 0.025
    assert float(seen.y[0, 31:33, 31:33].mean()) == pytest.approx(-0.2, abs=0.03)
    across = np.hypot(seen.x[0, 32, 63] - seen.x[0, 32, 0], seen.y[0, 32, 63] - seen.y[0, 32, 0])
    assert across == pytest.approx(0.5 * 63 / 64, rel=0.05)
    assert seen.pixel == pytest.approx(0.5 / 64)


def test_sagittal_canvas_has_front_left_and_head_up() -> None:
    seen = canvas(plane="sagittal")
    seen.paint("bone", seen.ellipsoid((0, -0.6, 0.6), (0.2, 0.2, 0.2)))
    rows, columns = np.nonzero(seen.labels[0] == LABELS["bone"])
    assert rows.mean() < 20 and columns.mean() < 20


def test_paint_returns_what_it_painted() -> None:
    seen = canvas()
    seen.paint("fat", seen.tube((0, 0), (0.5, 0.5)))
    painted = seen.paint("bone", seen.tube((0.5, 0), (0.3, 0.3)), only=("fat",))
    np.testing.assert_array_equal(painted, seen.labels == LABELS["bone"])
    assert 0 < painted.sum() < (seen.labels == LABELS["fat"]).sum()


def test_ellipsoid_is_the_same_in_one_slice_and_in_many() -> None:
    places = [-0.5, -0.1, 0.0, 0.3]
    many = Canvas((4, 32, 32), np.random.default_rng(0), Position(), places=places)
    for n, place in enumerate(places):
        one = Canvas((1, 32, 32), np.random.default_rng(0), Position(), places=[place])
        shape = (0.1, 0.0, -0.05), (0.4, 0.3, 0.2)
        np.testing.assert_array_equal(many.ellipsoid(*shape)[n], one.ellipsoid(*shape)[0])
    assert [bool(part.any()) for part in many.ellipsoid(*shape)] == [False, True, True, False]


def test_atrophy_widens_the_ventricles() -> None:
    areas = []
    for atrophy in (0.0, 0.5, 1.0):
        seen = canvas()
        anatomy.head(seen, np.random.default_rng(3), atrophy)
        areas.append(int((seen.labels == LABELS["ventricle"]).sum()))
    assert areas[0] * 1.3 < areas[1] and areas[1] * 1.3 < areas[2]


@pytest.mark.parametrize("name", list(LABELS))
def test_every_tissue_has_hu_and_mr_signals(name: str) -> None:
    assert anatomy.tissue_values("CT")[LABELS[name]] == anatomy.HU[name][0]
    assert 0 <= anatomy.tissue_values("T1")[LABELS[name]] <= 1 >= anatomy.tissue_values("T2")[LABELS[name]] >= 0
