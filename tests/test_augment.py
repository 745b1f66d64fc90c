"""Views against PIL and the documented recipe, and what their randomness depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from curia_jax import augment
from curia_jax import config as configs
from curia_jax.settings import Augment

SIZE = (16, 20)


@pytest.fixture(scope="module")
def settings():
    return Augment.of(configs.load("base").augment)


def make_batch(count: int = 6, *, hu: bool, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    pixels = np.full((count, 48, 64), 60000, np.uint16)  # what lies outside the extent must not matter
    extent = np.stack([rng.integers(30, 49, count), rng.integers(40, 65, count)], axis=1).astype(np.int32)
    for image, (h, w) in zip(pixels, extent, strict=True):
        image[:h, :w] = rng.integers(0, 2500, (h, w))
    return {
        "pixels": jnp.asarray(pixels), "extent": jnp.asarray(extent),
        "slope": jnp.full(count, 1.0 if hu else 0.5, jnp.float32), "intercept": jnp.full(count, -1024.0 if hu else 3.0, jnp.float32),
        "low": jnp.full(count, 50.0, jnp.float32), "high": jnp.full(count, 1100.0, jnp.float32), "hu": jnp.full(count, hu),
    }  # fmt: skip


@pytest.mark.parametrize(("method", "pil"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
@pytest.mark.parametrize("size", [(16, 20), (80, 96)])
def test_resize_equals_antialiased_resize_of_pil(method: str, pil: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((40, 56), np.float32)
    canvas = np.full((1, 64, 64), 9.0, np.float32)
    canvas[0, :40, :56] = image
    box = (3.5, 7.25, 30.0, 50.0)
    for top, left, bottom, right in ((0.0, 0.0, 40.0, 56.0), box):
        ours = augment.resize(
            jnp.asarray(canvas), jnp.array([[40, 56]]), jnp.array([[top, left, bottom, right]]), size, method
        )[0]
        theirs = np.asarray(Image.fromarray(image).resize(size[::-1], pil, box=(left, top, right, bottom)))
        # PIL computes its weights in double precision and rounds them to float32; ours are float32 throughout.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("hu", [True, False])
def test_evaluation_view_follows_the_documented_recipe(settings, hu: bool) -> None:
    batch = make_batch(hu=hu)
    view = augment.evaluation_view(batch, settings, SIZE)
    assert view.shape == (6, *SIZE, 1)
    for i, (h, w) in enumerate(np.asarray(batch["extent"])):
        values = np.asarray(batch["pixels"][i, :h, :w], np.float64) * float(batch["slope"][i]) + float(
            batch["intercept"][i]
        )
        low, high = (-1000, 1000) if hu else (50, 1100)
        unit = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
        small = np.asarray(Image.fromarray(unit).resize(SIZE[::-1], Image.BICUBIC), np.float64)
        expected = (small - settings.image_mean) / settings.image_std
        np.testing.assert_allclose(view[i, :, :, 0], expected, atol=2e-4)  # float32 rescaling of 16-bit integers


def test_same_hu_gives_the_same_value_in_every_slice(settings) -> None:
    batch = make_batch(2, hu=True)
    flat = jnp.full((48, 64), 1064, jnp.uint16)
    batch |= {"pixels": jnp.stack([flat, flat.at[:, 40:].set(3000)]), "extent": jnp.array([[48, 64], [48, 64]])}
    hu = 1064 * float(batch["slope"][0]) + float(batch["intercept"][0])
    expected = ((hu + 1000) / 2000 - settings.image_mean) / settings.image_std
    view = augment.evaluation_view(batch, settings, SIZE)
    np.testing.assert_allclose(view[:, :, 0, 0], expected, atol=1e-4)


def test_training_view_follows_from_its_key_alone(settings) -> None:
    batch = make_batch(hu=True)
    views = [augment.training_view(batch, jax.random.key(seed), settings, SIZE) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(views[0], views[1])
    assert float(jnp.abs(views[0] - views[2]).mean()) > 0.1


def test_training_view_ignores_canvas_outside_the_slice(settings) -> None:
    batch = make_batch(hu=False)
    inside = (jnp.arange(48)[None, :, None] < batch["extent"][:, 0, None, None]) & (
        jnp.arange(64)[None, None, :] < batch["extent"][:, 1, None, None]
    )
    emptied = batch | {"pixels": jnp.where(inside, batch["pixels"], 0).astype(jnp.uint16)}
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        augment.training_view(batch, key, settings, SIZE), augment.training_view(emptied, key, settings, SIZE)
    )


def test_training_view_without_randomness_equals_evaluation_view(settings) -> None:
    plain = dataclasses.replace(
        settings,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip=False,
        reading_window_probability=0.0,
        intensity_jitter=0.0,
    )
    batch = make_batch(hu=True)
    square = batch | {"extent": jnp.full((6, 2), 40, jnp.int32)}  # aspect 1 fits whole
    np.testing.assert_allclose(
        augment.training_view(square, jax.random.key(0), plain, SIZE),
        augment.evaluation_view(square, plain, SIZE),
        atol=1e-4,
    )


def test_half_of_the_images_are_flipped(settings) -> None:
    plain = dataclasses.replace(
        settings, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), reading_window_probability=0.0, intensity_jitter=0.0
    )
    batch = {k: jnp.repeat(v[:1], 200, axis=0) for k, v in make_batch(hu=True).items()}
    batch["extent"] = jnp.full((200, 2), 40, jnp.int32)
    view = augment.training_view(batch, jax.random.key(0), plain, SIZE)
    straight = augment.evaluation_view(batch, plain, SIZE)
    same = jnp.max(jnp.abs(view - straight), axis=(1, 2, 3)) < 1e-3
    mirrored = jnp.max(jnp.abs(view - straight[:, :, ::-1]), axis=(1, 2, 3)) < 1e-3
    assert bool(jnp.all(same ^ mirrored))
    assert 70 < int(jnp.sum(mirrored)) < 130  # 200 fair coins: beyond 4 standard deviations


def test_reading_windows_keep_their_order() -> None:
    """Random draws index them: another order would change every run."""
    assert augment.READING_WINDOWS == [(-1350.0, 150.0), (-160.0, 240.0), (-500.0, 1300.0)]


def test_training_view_of_a_region_holds_it_and_marks_its_patches(settings) -> None:
    """Crops of a fifth of the slice would lose a region in a corner. The pixels of the region are bright, the rest dark."""
    batch = make_batch(40, hu=True) | {"extent": jnp.full((40, 2), 48, jnp.int32)}
    mask = np.zeros((40, 48, 64), np.float32)
    mask[:, 36:44, 4:10] = 1
    mask[39] = 0  # a slice that the region does not reach
    batch |= {"mask": jnp.asarray(mask), "pixels": jnp.asarray(np.where(mask > 0, 2024, 24).astype(np.uint16))}
    settings = dataclasses.replace(settings, crop_scale=(0.04, 0.3), reading_window_probability=0.0)
    grid = (8, 8)
    images, inside = augment.training_view_and_region(batch, jax.random.key(0), settings, (64, 64), grid)
    bright = np.asarray(images)[:39, :, :, 0] > np.asarray(images).mean()
    patches = bright.reshape(39, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(39, 64)
    inside = np.asarray(inside)[:39]
    assert inside[patches > 0.5].all() and not inside[patches == 0].any()
    assert len({row.tobytes() for row in inside}) > 20  # the views differ
    # All of it is in view: in its own pixels its area is that of the region.
    assert (patches.sum(axis=1) > 0).all()
    plain = {name: value for name, value in batch.items() if name != "mask"}
    lost = np.asarray(augment.training_view(plain, jax.random.key(0), settings, (64, 64)))[:39, :, :, 0]
    assert (lost.max(axis=(1, 2)) < np.asarray(images).mean()).mean() > 0.3


def test_training_view_of_a_region_is_the_evaluation_view_where_nothing_is_random(settings) -> None:
    batch = make_batch(hu=False)
    mask = np.zeros((6, 48, 64), np.float32)
    mask[:, 5:15, 20:30] = 1
    batch |= {"mask": jnp.asarray(mask)}
    still = dataclasses.replace(
        settings, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, intensity_jitter=0.0
    )
    square = batch | {"extent": jnp.full((6, 2), 40, jnp.int32)}
    found = augment.training_view_and_region(square, jax.random.key(0), still, SIZE, (4, 5))
    np.testing.assert_allclose(found.images, augment.evaluation_view(square, still, SIZE), atol=2e-4)
    np.testing.assert_array_equal(found.inside, augment.patches_inside(square["mask"], square["extent"], (4, 5)))
