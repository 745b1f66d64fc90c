"""Features of slices: they are those of the model, in order, whatever the batch."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import augment, config, data, trained_model
from curia_jax.evaluate import features
from curia_jax.evaluate.backbones import JaxBackbone
from curia_jax.evaluate.results import Provenance
from curia_jax.models import mae, vit
from curia_jax.settings import Augment
from data_pipeline.format.records import DecodedSlice, SliceFacts
from tests.slices import FakeSlices, decoded

MODEL = {"size": "Ti", "image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "bfloat16"}  # fmt: skip
SETTINGS = Augment.of(config.load("base").augment)
PREPARATION = json.dumps(dataclasses.asdict(SETTINGS))


def readout(text: str) -> features.Readout:
    return features.Readout.parse(text)


def backbone(view: features.View, name: str = "run") -> JaxBackbone:
    return JaxBackbone(name, view, Provenance("0" * 16, PREPARATION))


def extracted(source: FakeSlices, numbers, view: features.View, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Features of all batches together."""
    images = features.ShardImages(source)
    parts = list(features.extract(images, np.asarray(numbers), backbone(view), batch_size=batch_size))
    np.testing.assert_array_equal(np.concatenate([found for found, _ in parts]), numbers)
    return {name: np.concatenate([values[name] for _, values in parts]) for name in parts[0][1]}


class Slices(FakeSlices):
    """Random slices of two sizes without files, the odd ones in HU."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.split, self.largest, self.fingerprint = "test", (20, 24), "f" * 64
        self._index = pa.table({"height": [20] * count, "width": [24] * count})
        self.broken = broken

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> DecodedSlice:
        pixels = np.random.default_rng(number).integers(0, 2000, (20 - number % 2 * 4, 24), dtype=np.uint16)
        slope = np.nan if number == self.broken else 1.0
        return decoded(pixels, SliceFacts(slope, -1024.0, -900.0, 900.0, hu=bool(number % 2)))


@pytest.fixture(scope="module")
def model() -> tuple[mae.MAEConfig, dict]:
    params = mae.init(mae.config(**MODEL), jax.random.key(0))
    params = jax.tree.map(np.asarray, params)
    return trained_model.model_config(ml_collections.ConfigDict(MODEL), params), params


def direct(model, slices: int, layers: tuple[int, ...] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of the first slices, computed one at a time."""
    (model_config, params), source = model, Slices(slices)
    encoder = vit.bind(model_config.encoder, params["encoder"])
    outputs = []
    for number in range(slices):
        batch = next(data.evaluation_batches(source, np.array([number]), batch_size=1, canvas=(20, 24)))
        on_device = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
        view = augment.evaluation_view(on_device, SETTINGS, (16, 16))
        outputs.append(encoder.encode(encoder.embed(view), [layer - 1 for layer in layers]))
    return np.concatenate([o[0] for o in outputs]), [
        np.concatenate([o[1][i] for o in outputs]) for i in range(len(layers))
    ]


@pytest.mark.parametrize("count", [8, 11])
def test_features_do_not_depend_on_batch(model, count: int) -> None:
    model_config, params = model
    names = (*features.POOLINGS, "cls+mean+std")
    view = features.encoder_view(
        model_config.encoder, params["encoder"], SETTINGS, readouts=[readout(name) for name in names]
    )
    found = extracted(Slices(count), np.arange(count), view, batch_size=3)
    tokens, _ = direct(model, count)
    # float32 through three blocks, in another batch.
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found["mean"], tokens[:, 1:].mean(axis=1), **close)
    np.testing.assert_allclose(found["std"], tokens[:, 1:].std(axis=1), **close)
    np.testing.assert_allclose(found["cls"], tokens[:, 0], **close)
    joined = np.concatenate([found[name] for name in ("cls", "mean", "std")], axis=1)
    np.testing.assert_array_equal(found["cls+mean+std"], joined)
    assert found["mean"].dtype == np.float32 and set(found) == set(names)


def test_last_batch_of_another_size_compiles_nothing(model) -> None:
    model_config, params = model
    used = backbone(features.encoder_view(model_config.encoder, params["encoder"], SETTINGS))
    count = used.devices
    numbers = np.arange(2 * count + 1)
    parts = list(features.extract(features.ShardImages(Slices(len(numbers))), numbers, used, batch_size=count))
    assert [len(found) for found, _ in parts] == [count, count, 1]
    assert used._compiled[0]._cache_size() == 1


def test_layers_are_block_outputs_before_norm(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, readouts=[readout("mean@1+3+last")])
    found = extracted(Slices(4), np.arange(4), view)["mean@1+3+last"]
    last, hidden = direct(model, 4, (1, 3))
    wanted = np.concatenate([tokens[:, 1:].mean(axis=1) for tokens in (*hidden, last)], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_features_are_in_requested_order(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)
    forward, backward = (extracted(Slices(6), o, view)["mean"] for o in ([1, 4, 5], [5, 4, 1]))
    np.testing.assert_array_equal(forward, backward[::-1])


def test_pixel_view_is_small_evaluation_view() -> None:
    source = Slices(5)
    (found,) = extracted(source, np.arange(5), features.pixel_view(SETTINGS)).values()
    assert found.shape == (5, features.PIXELS**2)
    batch = next(data.evaluation_batches(source, np.arange(5), batch_size=5, canvas=source.largest))
    on_device = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    view = augment.evaluation_view(on_device, SETTINGS, (features.PIXELS, features.PIXELS))
    np.testing.assert_allclose(found, np.asarray(view).reshape(5, -1), atol=1e-5)


def test_feature_that_is_not_finite_names_its_slice(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)
    with pytest.raises(DataError, match="the run features of slice 3 of split 'test' are not finite"):
        extracted(Slices(5, broken=3), np.arange(5), view)


def test_unknown_pooling_and_layer_list_known_ones(model) -> None:
    model_config, params = model
    with pytest.raises(UserError, match=r"no features 'max'; there are: mean, std, cls, and several joined by \+"):
        readout("mean+max")
    for text in ("mean@first", "mean@", "mean@1+", "mean@²"):
        with pytest.raises(UserError, match="after @ write last, prenorm, or numbers of blocks"):
            readout(text)
    for text in ("mean@4", "cls@0+last"):
        with pytest.raises(UserError, match="no layer [04]; this encoder has layers 1 to 3"):
            features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, readouts=[readout(text)])


@pytest.mark.parametrize("text", ["cls", "mean+std", "mean@2+last"])
def test_readout_is_written_as_it_is_read(text: str) -> None:
    assert str(readout(text)) == text
    assert str(readout("mean@last")) == "mean"


def test_histogram_counts_the_prepared_intensities() -> None:
    (found,) = extracted(Slices(4), np.arange(4), features.histogram_view(SETTINGS)).values()
    assert found.shape == (4, features.BINS)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    # A slice of one value in HU has all its pixels in that value's bin of the window.
    flat = Slices(1)
    flat.__class__ = type("Flat", (Slices,), {"__getitem__": lambda self, n: decoded(
        np.full((20, 24), 1530, np.uint16), SliceFacts(1.0, -1024.0, 0.0, 1.0, hu=True))})  # fmt: skip
    (counted,) = extracted(flat, [0], features.histogram_view(SETTINGS)).values()
    low, high = SETTINGS.hu_window
    assert counted[0].argmax() == int((1530 - 1024 - low) / (high - low) * features.BINS) and counted.max() > 0.99


def test_view_passes_weights_as_argument(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)
    assert view.params is params["encoder"]


def test_several_image_sizes_are_concatenated(model) -> None:
    encoder, params = model[0].encoder, model[1]["encoder"]
    views = {
        "own": features.encoder_view(encoder, params, SETTINGS, readouts=[readout("mean@1+last")]),
        "both": features.encoder_view(
            encoder, params, SETTINGS, readouts=[readout("mean@1+last")], image_sizes=[(16, 16), (24, 24)]
        ),
        "larger": features.encoder_view(
            encoder, params, SETTINGS, readouts=[readout("mean@1+last")], image_sizes=[(24, 24)]
        ),
    }
    found = {name: extracted(Slices(3), np.arange(3), view)["mean@1+last"] for name, view in views.items()}
    np.testing.assert_allclose(found["both"], np.concatenate([found["own"], found["larger"]], axis=1), atol=1e-5)
    assert np.abs(found["own"] - found["larger"]).max() > 1e-3


def test_image_size_that_is_no_multiple_of_patch_is_refused(model) -> None:
    with pytest.raises(UserError, match=r"--image-sizes: image size \(20, 20\) is not a multiple of the patch size"):
        features.encoder_view(model[0].encoder, model[1]["encoder"], SETTINGS, image_sizes=[(20, 20)])


# ---- masks


def inside(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    found = augment.patches_inside(jnp.asarray(mask[None], jnp.float32), jnp.asarray([mask.shape]), grid)
    return np.asarray(found)[0].reshape(grid)


@pytest.mark.parametrize("grid", [(32, 32), (14, 14), (6, 6), (48, 48)])
def test_one_pixel_reaches_its_patch_alone(grid: tuple[int, int]) -> None:
    for y, x in ((0, 0), (0, 47), (47, 0), (20, 30)):
        mask = np.zeros((48, 48))
        mask[y, x] = 1
        found = np.argwhere(inside(mask, grid))
        wanted = (np.array([y, x]) + 0.5) / 48 * grid
        # Its patch is there, and none further than the pixel's own size and its blur.
        assert (np.abs(found + 0.5 - wanted).max(axis=1) < 0.5 + grid[0] / 48).all()
        assert len(found) >= 1


def test_patches_are_those_with_any_pixel_at_512_px() -> None:
    mask = np.zeros((512, 512))
    mask[100:140, 15:17], mask[500, 500] = 1, 1
    wanted = mask.reshape(32, 16, 32, 16).any(axis=(1, 3))
    np.testing.assert_array_equal(inside(mask, (32, 32)), wanted)


@pytest.mark.parametrize("grid", [(32, 32), (14, 14)])
def test_masks_that_need_no_resizing_reach_the_same_patches(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 520, 516), bool)
    masks[0, 3:100, 40:300] = rng.random((97, 260)) > 0.5
    masks[1, 511, 511], masks[2, 250, 100:103] = True, True
    masks[:, 512:], masks[:, :, 512:] = True, True  # outside of the images
    extent = jnp.full((3, 2), 512)
    direct = augment.patches_inside(jnp.asarray(masks), extent, grid)
    resized = augment.patches_inside(jnp.asarray(masks), extent, grid, augment.whole(extent))
    np.testing.assert_array_equal(direct, resized)
    assert direct.any(axis=1).all() and not direct.all()


def test_mask_that_vanishes_when_resized_is_found_at_half_its_maximum() -> None:
    mask = np.zeros((2048, 2048))
    mask[1030, 70] = 1
    assert np.argwhere(inside(mask, (32, 32))).tolist() == [[16, 1]]


def test_mean_of_a_masked_task_is_over_the_patches_inside(model) -> None:
    model_config, params = model
    view = features.encoder_view(
        model_config.encoder, params["encoder"], SETTINGS, readouts=[readout("mean"), readout("std"), readout("cls")]
    )
    batch = next(data.evaluation_batches(Slices(2), np.arange(2), batch_size=2, canvas=(20, 24)))
    on_device: Any = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    masks = np.zeros((2, 20, 24), np.float32)
    masks[0, :10, :12] = masks[1, :, 12:] = 1  # the first of four patches; both on the right
    masks[1, 16:] = 0  # outside of the second slice, which has 16 rows
    found = view.compute(view.params, {**on_device, "mask": jnp.asarray(masks)})
    tokens, _ = direct(model, 2)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found["mean"], [tokens[0, 1], tokens[1, [2, 4]].mean(axis=0)], **close)
    np.testing.assert_allclose(found["std"], [np.zeros(16), tokens[1, [2, 4]].std(axis=0)], **close)
    np.testing.assert_allclose(found["cls"], tokens[:, 0], **close)


def test_floors_of_a_masked_task_see_the_region_alone() -> None:
    batch = next(data.evaluation_batches(Slices(1), np.arange(1), batch_size=1, canvas=(20, 24)))
    on_device: Any = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    mask = np.zeros((1, 20, 24), np.float32)
    mask[:, :, :12] = 1
    outside = jnp.where(mask > 0, on_device["pixels"], 0)
    for view in (features.pixel_view(SETTINGS), features.histogram_view(SETTINGS)):
        (first,) = view.compute({}, {**on_device, "mask": jnp.asarray(mask)}).values()
        # Pixels far from the region do not matter; within two pixels of its edge the resampling mixes.
        changed = jnp.where(jnp.arange(24) < 16, on_device["pixels"], outside.astype(jnp.uint16))
        (second,) = view.compute({}, {**on_device, "pixels": changed, "mask": jnp.asarray(mask)}).values()
        np.testing.assert_allclose(first, second, atol=1e-5)
        assert np.abs(np.asarray(first)).max() > 0
