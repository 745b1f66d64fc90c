"""The pixel preparation of a backbone, against PyTorch, which most backbones were trained with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import data
from curia_jax.evaluate import preparation
from curia_jax.evaluate.preparation import STANDARD, WINDOW, Preparation, prepare
from tests.evaluate.test_features import Slices

COUNT = 4  # the odd ones in HU


def batch() -> Any:
    (found,) = data.evaluation_batches(Slices(COUNT), np.arange(COUNT), batch_size=COUNT, canvas=(20, 24))
    return {name: jnp.asarray(found[name]) for name in data.DEVICE_FIELDS}


@pytest.mark.torch
@pytest.mark.parametrize(
    "wanted",
    [
        Preparation(WINDOW, (-500, 700), (16, 16)),
        Preparation(WINDOW, (-500, 700), (12, 20), "bilinear", 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        Preparation(STANDARD, (-500, 700), (16, 16), "bilinear", 3),
        Preparation(STANDARD, (-500, 700), (32, 32)),
    ],
    ids=lambda wanted: f"{wanted.intensities}-{wanted.size}",
)
def test_input_is_that_of_pytorch(wanted: Preparation) -> None:
    torch = pytest.importorskip("torch")
    found = np.asarray(jax.jit(prepare, static_argnums=1)(batch(), wanted))
    assert found.shape == (COUNT, *wanted.size, wanted.channels)
    for number in range(COUNT):
        one = Slices(COUNT)[number]
        values = torch.from_numpy(one.pixels.astype(np.float32)) + one.facts.intercept
        if wanted.intensities == WINDOW:
            low, high = wanted.hu_window if one.facts.hu else (one.facts.low, one.facts.high)
            values = ((values - low) / (high - low)).clamp(0, 1)
        resized = torch.nn.functional.interpolate(
            values[None, None], wanted.size, mode=wanted.resample, antialias=True, align_corners=False
        )[0, 0]
        if wanted.intensities == STANDARD:
            resized = (resized - resized.mean()) / resized.std()
        for channel in range(wanted.channels):
            mean, std = (one[channel % len(one)] for one in (wanted.mean, wanted.std))
            # float32: values of standard deviation 1 after sums over a thousand pixels.
            np.testing.assert_allclose(found[number, :, :, channel], (resized - mean) / std, atol=5e-5)


def test_flat_image_is_centred_and_not_divided_by_nothing() -> None:
    flat = batch()
    flat["pixels"] = jnp.full_like(flat["pixels"], 1024)  # 0 in real values
    assert (np.asarray(prepare(flat, Preparation(STANDARD, (-500, 700), (16, 16)))) == 0).all()


def test_record_survives_json_and_says_what_it_does() -> None:
    settings = preparation.default_settings()
    ours = Preparation.of(settings, (96, 64))
    assert Preparation.from_json(ours.to_json()) == ours
    assert str(ours) == (
        "96x64 px, bicubic, 1 channel; HU -1000 to 1000, other values 0.5 to 99.5 percentile; mean 0.3, deviation 0.25"
    )
    theirs = Preparation(STANDARD, (-1000, 1000), (512, 512), "bilinear", 3)
    assert str(theirs) == "512x512 px, bilinear, 3 channels; the image's own mean and deviation"
