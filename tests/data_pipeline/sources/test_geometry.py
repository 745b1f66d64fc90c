import numpy as np
import pytest

from data_pipeline.sources import geometry

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def stack(z: list[float], orientation=AXIAL, step=None) -> tuple[list, list]:
    """Slices at distances z along the normal, or along `step` if given."""
    along = np.cross(orientation[:3], orientation[3:]) if step is None else np.asarray(step, np.float64)
    return [orientation] * len(z), [tuple((along * d).tolist()) for d in z]


def turned(degrees: float) -> tuple[float, ...]:
    """An axial orientation turned about x."""
    a = np.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, float(np.cos(a)), float(np.sin(a)))


@pytest.mark.parametrize(("orientation", "plane"), [(AXIAL, "axial"), (CORONAL, "coronal"), (SAGITTAL, "sagittal")])
def test_regular_series_has_no_problems(orientation, plane) -> None:
    (found,) = geometry.check(*stack([0, 2.5, 5, 7.5, 10, 12.5], orientation))
    assert found.plane == plane
    assert found.spacing == pytest.approx(2.5)
    assert found.tilt == pytest.approx(0, abs=1e-4)
    assert found.problems == ()
    assert np.diff(found.positions) == pytest.approx(2.5)


def test_input_order_changes_only_the_indices() -> None:
    orientations, positions = stack([10.0 - 1.5 * n for n in range(9)])
    shuffle = np.random.default_rng(1).permutation(9)
    (straight,) = geometry.check(orientations, positions)
    (shuffled,) = geometry.check([orientations[n] for n in shuffle], [positions[n] for n in shuffle])
    assert shuffled.positions == straight.positions
    assert tuple(int(shuffle[n]) for n in shuffled.order) == straight.order


def test_gantry_tilt_is_recognized_from_positions() -> None:
    # The gantry is tilted by 14 degrees while the table travels along z.
    (found,) = geometry.check(*stack([0, 4, 8, 12, 16, 20], turned(14), step=(0, 0, 1)))
    assert found.tilt == pytest.approx(14, abs=1e-6)
    assert found.problems == (geometry.TILTED,)
    assert found.spacing == pytest.approx(4 * np.cos(np.radians(14)))
    # The same slices stacked along their normal are a regular oblique volume.
    (straight,) = geometry.check(*stack([0, 4, 8, 12, 16, 20], turned(14)))
    assert straight.problems == ()


@pytest.mark.parametrize(
    ("z", "problems", "spacing"),
    [
        ([0, 2, 4, 8, 10, 12], (geometry.GAP,), 2),
        ([0, 2, 4, 6.2, 8.2, 10.2], (geometry.GAP,), 2),
        ([0, 2, 4, 6.05, 8.05, 10.05], (), 2),
        ([0, 2, 4, 4, 6, 8], (geometry.REPEATED_POSITION,), 2),
        ([0, 0, 0, 0, 0], (geometry.REPEATED_POSITION,), 0),
        ([0, 2], (geometry.FEW,), 2),
        ([3], (geometry.FEW,), 0),
        ([0, 2, 6, 6], (geometry.FEW, geometry.REPEATED_POSITION, geometry.GAP), 3),
    ],
)
def test_irregular_spacing_is_named(z: list[float], problems: tuple[str, ...], spacing: float) -> None:
    (found,) = geometry.check(*stack(z))
    assert found.problems == problems
    assert found.spacing == pytest.approx(spacing)


def test_two_orientations_become_two_flagged_parts() -> None:
    first, second = stack([0, 1, 2, 3, 4, 5, 6]), stack([0, 3, 6, 9, 12], CORONAL)
    parts = geometry.check(second[0] + first[0], second[1] + first[1])
    assert [part.plane for part in parts] == ["axial", "coronal"]  # the larger one first
    assert [part.problems for part in parts] == [(geometry.MIXED_ORIENTATION,)] * 2
    assert sorted(parts[0].order + parts[1].order) == list(range(12))
    assert set(parts[1].order) == set(range(5))


def test_rounded_direction_cosines_stay_one_orientation() -> None:
    orientations, positions = stack([0, 1, 2, 3, 4])
    orientations[2] = (1.0, 0.0004, 0.0, -0.0004, 1.0, 0.0)
    (found,) = geometry.check(orientations, positions)
    assert found.problems == ()


@pytest.mark.parametrize("broken", [None, (0.0,) * 6, (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)])
def test_slices_without_geometry_come_last_and_are_flagged(broken) -> None:
    orientations, positions = stack([0, 1, 2, 3, 4])
    parts = geometry.check([broken, *orientations, AXIAL], [(0.0, 0.0, 0.0), *positions, None])
    assert parts[0].problems == ()
    assert parts[1].order == (0, 6)
    assert parts[1].problems == (geometry.NO_POSITION,)
    assert parts[1].spacing == 0


@pytest.mark.parametrize(
    ("orientation", "plane"),
    [(turned(30), "axial"), (turned(60), "coronal"), (turned(45), "axial"), (None, "unknown"), ((0.0,) * 6, "unknown"),
     (tuple(np.r_[np.array([1, -1, 0]) / 2**0.5, np.array([1, 1, -2]) / 6**0.5]), "oblique")],
)  # fmt: skip
def test_plane_of_an_orientation(orientation, plane: str) -> None:
    assert geometry.plane_of(orientation) == plane
