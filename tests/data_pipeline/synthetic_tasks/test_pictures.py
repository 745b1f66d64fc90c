"""What the tasks draw with: where a patient lies, how tissues look, masks and shapes."""

import numpy as np
import pytest

from data_pipeline.synthetic_anatomy import LABELS, SUPERSAMPLING
from data_pipeline.synthetic_tasks import pictures
from data_pipeline.synthetic_tasks.pictures import Patient


def patient(seed: int = 0, size: int = 32) -> Patient:
    return Patient(np.random.default_rng(seed), "train", 0, 0, size)


def test_view_is_an_empty_canvas_of_the_size_of_the_pictures() -> None:
    canvas = pictures.view(patient(), at=(-0.5, 0.0, 0.5))
    assert canvas.labels.shape == (3, 32 * SUPERSAMPLING, 32 * SUPERSAMPLING)
    assert len(np.unique(canvas.labels)) == 1


def test_view_differs_from_patient_to_patient() -> None:
    first, same, other = (pictures.view(patient(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.asarray(first.x), np.asarray(same.x))
    assert not np.allclose(np.asarray(first.x), np.asarray(other.x))


@pytest.mark.parametrize(("places", "shape"), [((0.0,), (32, 32)), ((0.0, 0.1, 0.2), (32, 32, 3))])
def test_slices_of_an_image_are_last(places: tuple[float, ...], shape: tuple[int, ...]) -> None:
    one = patient()
    canvas = pictures.view(one, at=places)
    image = pictures.expose(canvas, "CT", one.r)
    assert image.shape == shape and (image == np.rint(image)).all()
    assert pictures.mask(canvas.labels == canvas.labels[0, 0, 0]).shape == shape


def test_expose_takes_the_value_of_a_tissue() -> None:
    """An empty canvas is air; with another value for it the image is of that value, but for noise."""
    (name,) = (name for name, number in LABELS.items() if number == pictures.view(patient()).labels.flat[0])
    canvas, r = pictures.view(patient()), np.random.default_rng(1)
    air = pictures.expose(canvas, "CT", r)
    changed = pictures.expose(canvas, "CT", r, **{name.replace(" ", "_"): 200})
    assert np.median(air) < -900 and abs(np.median(changed) - 200) < 20


def test_mask_holds_pixels_that_are_half_inside() -> None:
    where = np.zeros((1, 32 * SUPERSAMPLING, 32 * SUPERSAMPLING), bool)
    half = SUPERSAMPLING - SUPERSAMPLING // 2
    where[0, : 4 * SUPERSAMPLING, : 3 * SUPERSAMPLING + half] = True
    found = pictures.mask(where)
    assert found.sum() == 4 * 4 and found[:4, :4].all()
    # Nothing is half inside: the fullest pixel stays.
    where[:] = False
    where[0, 0, 0] = True
    assert np.argwhere(pictures.mask(where)).tolist() == [[0, 0]]


def test_blob_has_the_area_of_its_radius_and_lobes_change_its_outline() -> None:
    canvas = pictures.view(patient(size=64), half_width=1.0)
    area = canvas.pixel**2
    ball = pictures.blob(canvas, (0.0, 0.0, 0.0), 0.3, np.random.default_rng(0))
    assert ball.sum() * area == pytest.approx(np.pi * 0.3**2, rel=0.03)
    lobed = pictures.blob(canvas, (0.0, 0.0, 0.0), 0.3, np.random.default_rng(0), lobes=5, depth=0.4)
    # The mean of (1 + d cos)^2 is 1 + d^2 / 2.
    assert lobed.sum() * area == pytest.approx(np.pi * 0.3**2 * (1 + 0.4**2 / 2), rel=0.03)
    assert (ball & ~lobed).any() and (lobed & ~ball).any()


def test_point_inside_lies_in_the_fullest_slice_away_from_the_edge() -> None:
    canvas = pictures.view(patient(), at=(0.0, 0.5))
    where = np.zeros(canvas.labels.shape, bool)
    where[1, 20:60, 30:70] = True
    where[0, 0, 0] = True
    point = pictures.point_inside(where, canvas, np.random.default_rng(0))
    assert point is not None
    x, y, z = (np.broadcast_to(axis, where.shape) for axis in (canvas.x, canvas.y, canvas.z))
    nearest = np.unravel_index(((x - point[0]) ** 2 + (y - point[1]) ** 2 + (z - point[2]) ** 2).argmin(), where.shape)
    assert nearest[0] == 1 and 30 <= nearest[1] < 50 and 40 <= nearest[2] < 60
    assert pictures.point_inside(np.zeros_like(where), canvas, np.random.default_rng(0)) is None


def test_distances_are_in_coordinates_of_the_body_and_within_a_slice() -> None:
    canvas = pictures.view(patient(), at=(0.0, 0.5))
    where = np.zeros(canvas.labels.shape, bool)
    where[0, 10, 10] = True
    found = pictures.distance_to(where, canvas)
    assert found[0, 10, 13] == pytest.approx(3 * canvas.pixel) and found[0, 14, 13] == pytest.approx(5 * canvas.pixel)
    assert np.isinf(found[1]).all()


def test_along_gives_the_place_on_a_segment_and_the_distance_to_it() -> None:
    u, v = np.array([0.0, 2.0, 4.0]), np.array([0.0, 3.0, -1.0])
    place, distance = pictures.along((0, 0), (4, 0), u, v)
    np.testing.assert_allclose(place, [0, 0.5, 1])
    np.testing.assert_allclose(distance, [0, 3, 1])
