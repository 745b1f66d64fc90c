"""The model card, its code, and the recipe for pixels that travels with the weights."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import augment, checkpoint
from curia_jax import config as configs
from curia_jax.convert import card, layouts
from curia_jax.models import mae
from curia_jax.settings import Augment
from tests.convert.cases import CASES, ENCODERS

AUGMENT = Augment.of(configs.load("demo").augment)
# Rounding of HU in float32, resized; the demo's window of 500 HU magnifies it four times as much as one of 2,000 HU.
TOLERANCE = 4e-5
PROVENANCE = card.Provenance(None, 7, 56, "0" * 16, "1.0")


def blocks_of_code(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def view(stored: np.ndarray, hu: bool) -> np.ndarray:
    """What training sees of values that a shard stores with 1024 added."""
    low_high = np.percentile(stored.astype(np.float64) - 1024, (0.5, 99.5), method="inverted_cdf")
    batch: augment.Batch = {
        "pixels": jnp.asarray(stored)[None], "extent": jnp.asarray([stored.shape], jnp.int32),
        "slope": jnp.ones(1), "intercept": jnp.asarray([-1024.0]), "hu": jnp.asarray([hu]),
        "low": jnp.asarray(low_high[:1], jnp.float32), "high": jnp.asarray(low_high[1:], jnp.float32),
    }  # fmt: skip
    return np.asarray(augment.evaluation_view(batch, AUGMENT, (24, 24)))[0, :, :, 0]


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize("layout", ["vit_mae", "vit", "dinov2"])
def test_model_card_code_runs_as_shown(layout: str, converted) -> None:
    import torch

    folder, _ = converted("square", layout)
    (load,) = blocks_of_code(folder)
    assert len([line for line in load.splitlines() if line]) == 5
    stored = np.random.RandomState(0).randint(1024, 3500, size=(2, 40, 32)).astype(np.uint16)
    names: dict[str, Any] = {"slices": list(stored.astype(np.float32) - 1024)}
    with torch.no_grad(), pytest.warns(UserWarning, match="taken for MR"):
        exec(load.replace("FOLDER", str(folder)), names)
    for found, one in zip(names["pixel_values"], stored, strict=True):
        np.testing.assert_allclose(found[0], view(one, False), rtol=0, atol=TOLERANCE)
    if layout == "vit_mae":
        assert names["output"].logits.shape == (2, 9, 64)
    else:
        assert names["tokens"].shape == (2, 10, 16)


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("hu", [True, False])
def test_prepare_of_timm_model_card_takes_every_integer_type(dtype: type, hu: bool, converted) -> None:
    """In the type's own arithmetic the differences to the window wrap around, and black becomes white."""
    names: dict[str, Any] = {}
    exec(blocks_of_code(converted("square", "timm")[0])[1], names)
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -1024), min(limits.max, 3071)
    pixels = np.random.RandomState(0).randint(low, high + 1, size=(40, 32)).astype(dtype)
    stored = (pixels.astype(np.int64) + 1024).astype(np.uint16)
    np.testing.assert_allclose(names["prepare"](pixels, hu=hu)[0, 0], view(stored, hu), rtol=0, atol=TOLERANCE)


def text_of(layout: str, provenance: card.Provenance = PROVENANCE, **model: Any) -> str:
    config = mae.config(**{**CASES["square"], **model})
    return card.text(layouts.LAYOUTS[layout], config, AUGMENT, provenance, 1_234_567)


def test_model_card_states_size_and_origin_of_the_weights() -> None:
    origin = checkpoint.Origin("/data/secret-place", 300, 9_600, "fedcba9876543210")
    named = card.Provenance("ward-seven", 1200, 56_000, "0123456789abcdef", "1.0", origin)
    text = text_of("vit", named, image_size=(16, 24), patch_size=(8, 4), channels=3)
    for words in (
        "# ViT of 2 blocks, width 16, patches of 8 x 4 px, for CT and MR slices\n",
        "Encoder of a masked autoencoder, pretrained with curia_jax, 1.23 M parameters",
        "\nTraining started from the weights `fedcba9876543210` of another run, at its step 300 (9,600 examples seen).\n",
        "From run ward-seven, step 1,200 (56,000 examples seen); encoder weights\n`0123456789abcdef`",
        "batch x 3 x 16 x 24",
        "resized to 16 x 24",
        "every image alike; 3 channels, each:",
        "positions for\n2 x 6 patches",
    ):
        assert words in text
    unnamed = text_of("vit_mae")
    assert "secret-place" not in text  # a path of the machine
    assert "From step 7 (56 examples seen)" in unnamed and "started from" not in unnamed
    assert "Masked autoencoder (encoder and decoder)" in unnamed


def test_model_card_says_how_pixels_are_prepared() -> None:
    for layout in ("vit", "vit_mae", "dinov2"):
        text = text_of(layout)
        assert text.startswith("---\nlibrary_name: transformers\n") and "def prepare" not in text
        assert "it runs `image_processing_curia_jax.py` of this folder, hence `trust_remote_code`" in text
        assert "`hu` in `preprocessor_config.json`" in text
        assert "CT in Hounsfield units, clipped to -200 … 300" in text
    text = text_of("timm")
    assert text.startswith("---\nlibrary_name: timm\n") and "def prepare" in text and "trust_remote_code" not in text
    assert "The recipe is in `config.json` under the key `curia_jax`" in text


def test_gelu_of_the_model_is_named() -> None:
    config = mae.config(**{**CASES["square"], "activation": "gelu_tanh"})
    layout = layouts.LAYOUTS["vit"]
    header = card.safetensors_metadata(layout, config.encoder, AUGMENT, PROVENANCE)
    assert header["gelu"] == card.config_json(layout, config, AUGMENT, PROVENANCE)["curia_jax"]["gelu"]
    assert header["gelu"] == "tanh approximation" and "GELU tanh approximation;" in text_of(
        "vit", activation="gelu_tanh"
    )


def test_model_card_explains_inverted_files_and_norm_pix() -> None:
    text = text_of("vit_mae")
    assert "MONOCHROME1" in text and "Predictions are standardised patches (norm_pix)" in text
    vit = text_of("vit")
    assert "MONOCHROME1" in vit and "norm_pix" not in vit
    text = text_of("vit_mae", norm_pix=False)
    assert "in the units of `pixel_values` (no norm_pix)" in text


def test_model_card_advertises_no_pipeline() -> None:
    """Pipelines read images as 8-bit RGB, and raise with an encoder of one channel."""
    for layout in ENCODERS:
        assert "pipeline_tag" not in text_of(layout)


def test_recipe_is_that_of_training(converted) -> None:
    wanted = {
        "hu_window": [-200.0, 300.0], "percentiles_unless_hu": [0.5, 99.5], "percentile_method": "inverted_cdf",
        "scale_to": [0.0, 1.0], "size": [8, 32], "fit": "squash", "resample": "bicubic", "antialias": True,
        "image_mean": 0.3, "image_std": 0.25, "channels": 1,
    }  # fmt: skip
    processor = json.loads((converted("wide", "vit")[0] / "preprocessor_config.json").read_text())
    assert processor == {
        "image_processor_type": "CuriaJaxImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_curia_jax.CuriaJaxImageProcessor"},
        "hu": "auto", "hu_window": [-200.0, 300.0], "percentiles": [0.5, 99.5], "size": {"height": 8, "width": 32},
        "resample": "bicubic", "image_mean": [0.3], "image_std": [0.25],
    }  # fmt: skip
    for layout in ("vit", "timm"):
        content = json.loads((converted("wide", layout)[0] / "config.json").read_text())
        assert content["curia_jax"]["preprocessing"] == wanted
    told = content["pretrained_cfg"]
    assert (told["mean"], told["std"], told["interpolation"], told["crop_mode"]) == ([0.3], [0.25], "bicubic", "squash")
