import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from curia_common.errors import UserError
from curia_jax import augment, config, data
from curia_jax.evaluate import features
from curia_jax.models import mae, vit
from tests.slices import FakeSlices

MODEL = {"size": "Ti", "image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "bfloat16"}  # fmt: skip
SETTINGS = config.load("configs/demo.py").augment


class Slices(FakeSlices):
    """Random slices of two sizes without files, the odd ones in HU."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.split, self.largest = "test", (20, 24)
        self._index = pa.table({"height": [20] * count, "width": [24] * count})
        self.broken = broken

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> dict[str, object]:
        pixels = np.random.default_rng(number).integers(0, 2000, (20 - number % 2 * 4, 24), dtype=np.uint16)
        return {
            "pixels": pixels, "slope": np.nan if number == self.broken else 1.0, "intercept": -1024.0,
            "low": -900.0, "high": 900.0, "hu": bool(number % 2),
        }  # fmt: skip


@pytest.fixture(scope="module")
def model() -> tuple[mae.MAEConfig, dict]:
    params = mae.init(mae.config(**MODEL), jax.random.key(0))
    return features.model(MODEL, params), jax.tree.map(np.asarray, params)


def direct(model, slices: int, layers: tuple[int, ...] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of the first slices, one at a time, without any of the machinery."""
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
def test_features_are_those_of_each_slice_whatever_the_batch(model, count: int) -> None:
    model_config, params = model
    views = {
        name: features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, pooling=name)
        for name in (*features.POOLINGS, "cls+mean+std")
    }
    done = []
    found = features.extract(Slices(count), np.arange(count), views, batch_size=3, progress=done.append)
    tokens, _ = direct(model, count)
    # float32 through three blocks, in another batch.
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found["mean"], tokens[:, 1:].mean(axis=1), **close)
    np.testing.assert_allclose(found["std"], tokens[:, 1:].std(axis=1), **close)
    np.testing.assert_allclose(found["cls"], tokens[:, 0], **close)
    joined = np.concatenate([found[name] for name in ("cls", "mean", "std")], axis=1)
    np.testing.assert_array_equal(found["cls+mean+std"], joined)
    assert found["mean"].dtype == np.float32 and sum(done) == count


def test_layers_are_outputs_of_blocks_before_the_norm(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, layers=[1, 3, features.LAST])
    found = features.extract(Slices(4), np.arange(4), {"x": view})["x"]
    last, hidden = direct(model, 4, (1, 3))
    wanted = np.concatenate([tokens[:, 1:].mean(axis=1) for tokens in (*hidden, last)], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_slices_come_in_the_order_asked_for(model) -> None:
    model_config, params = model
    view = {"x": features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)}
    forward, backward = (features.extract(Slices(6), np.array(o), view)["x"] for o in ([1, 4, 5], [5, 4, 1]))
    np.testing.assert_array_equal(forward, backward[::-1])


def test_pixels_are_the_same_view_in_few_values() -> None:
    source = Slices(5)
    found = features.extract(source, np.arange(5), {"pixels": features.pixel_view(SETTINGS)})["pixels"]
    assert found.shape == (5, features.PIXELS**2)
    batch = next(data.evaluation_batches(source, np.arange(5), batch_size=5, canvas=source.largest))
    on_device = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    view = augment.evaluation_view(on_device, SETTINGS, (features.PIXELS, features.PIXELS))
    np.testing.assert_allclose(found, np.asarray(view).reshape(5, -1), atol=1e-5)


def test_a_feature_that_is_not_finite_is_named_with_its_slice(model) -> None:
    model_config, params = model
    view = {"checkpoint": features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)}
    with pytest.raises(UserError, match="the checkpoint features of slice 3 of split 'test' are not finite"):
        features.extract(Slices(5, broken=3), np.arange(5), view)


def test_the_model_is_computed_in_float32(model) -> None:
    assert model[0].encoder.dtype == "float32"


def test_weights_of_another_size_or_channel_count_are_refused(model) -> None:
    _, params = model
    with pytest.raises(UserError, match="does not hold the model of its config: .*wanted"):
        features.model({**MODEL, "width": 48}, params)
    with pytest.raises(UserError, match="does not hold the model of its config: .*size is 'XXL'"):
        features.model({**MODEL, "size": "XXL"}, params)
    coloured = {**MODEL, "channels": 3}
    with pytest.raises(UserError, match="takes 3 channels, but a slice has 1"):
        features.model(coloured, mae.init(mae.config(**coloured), jax.random.key(0)))


def test_unknown_poolings_and_layers_list_what_there_is(model) -> None:
    model_config, params = model
    with pytest.raises(UserError, match=r"no features 'max'; there are: mean, std, cls, and several joined by \+"):
        features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, pooling="mean+max")
    with pytest.raises(UserError, match="no layer 4; this encoder has layers 1 to 3"):
        features.encoder_view(model_config.encoder, params["encoder"], SETTINGS, layers=[4])


def test_the_digest_names_the_weights(model) -> None:
    _, params = model
    same = jax.tree.map(np.copy, params)
    assert features.digest(params) == features.digest(same)
    same["encoder"]["norm"]["bias"][0] += 1e-7
    assert features.digest(params) != features.digest(same)


def test_progress_counts_and_tells_rate_and_time_left(capsys) -> None:
    with features.Progress("features", 10, seconds_between_lines=0.0) as progress:
        progress.advance(4)
        progress.advance(6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("features 4/10") and "slices/s" in lines[0] and "s left" in lines[0]
    assert lines[-1].startswith("features 10/10")


def test_a_view_keeps_weights_out_of_the_program(model) -> None:
    model_config, params = model
    view = features.encoder_view(model_config.encoder, params["encoder"], SETTINGS)
    assert dataclasses.asdict(view).keys() == {"of", "params"} and view.params is params["encoder"]


def test_several_image_sizes_are_concatenated_and_the_own_one_is_the_default(model) -> None:
    encoder, params = model[0].encoder, model[1]["encoder"]
    views = {
        "own": features.encoder_view(encoder, params, SETTINGS, layers=[1, "last"]),
        "both": features.encoder_view(encoder, params, SETTINGS, layers=[1, "last"], image_sizes=[(16, 16), (24, 24)]),
        "larger": features.encoder_view(encoder, params, SETTINGS, layers=[1, "last"], image_sizes=[(24, 24)]),
    }
    found = features.extract(Slices(3), np.arange(3), views)
    np.testing.assert_allclose(found["both"], np.concatenate([found["own"], found["larger"]], axis=1), atol=1e-5)
    assert np.abs(found["own"] - found["larger"]).max() > 1e-3


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(model) -> None:
    with pytest.raises(UserError, match=r"--image-sizes: image size \(20, 20\) is no multiple of the patch size"):
        features.encoder_view(model[0].encoder, model[1]["encoder"], SETTINGS, image_sizes=[(20, 20)])
