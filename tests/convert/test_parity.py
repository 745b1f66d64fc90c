"""Exported folders against PyTorch, on equal images and noise: features, and for vit_mae prediction, mask and loss.

Where PyTorch is not installed, test_numpy_forward.py compares the files with the frozen results of transformers.
"""

import functools
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.convert import __main__ as convert
from curia_jax.convert.layouts import LAYOUTS
from curia_jax.models import mae, vit
from tests.convert.cases import (
    CASES,
    ENCODERS,
    EXPORTS,
    HAS_TORCH,
    LAYOUTS_OF,
    TOLERANCE,
    assert_close,
    pixels_and_noise,
)
from tests.models import make_references as reference

if HAS_TORCH:
    from tests.convert import timm_like


@functools.cache
def jax_results(name: str) -> dict[str, np.ndarray]:
    config = mae.config(**CASES[name])
    params = reference.random_params(config, seed=1)
    images, noise = (jnp.asarray(array) for array in reference.inputs(config, seed=2))

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        output = mae.bind(config, params)(images, noise)
        tokens = vit.bind(config.encoder, params["encoder"])(images)
        return {"features": tokens, "prediction": output.prediction, "mask": output.mask, "loss": output.loss}

    return jax.device_get(run(params))


@pytest.mark.torch
@pytest.mark.parametrize(("name", "layout"), [case for case in EXPORTS if case[1] != "timm"])
def test_transformers_matches_jax(name: str, layout: str, converted) -> None:
    import torch
    from transformers import Dinov2Model, ViTMAEForPreTraining, ViTModel

    folder, _ = converted(name, layout)
    target = {"vit_mae": ViTMAEForPreTraining, "vit": ViTModel, "dinov2": Dinov2Model}[layout]
    extra = {"add_pooling_layer": False} if layout == "vit" else {}
    model, info = target.from_pretrained(folder, output_loading_info=True, **extra)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    pixels, noise = (torch.tensor(array) for array in pixels_and_noise(name))
    with torch.no_grad():
        if layout == "vit_mae":
            output = model(pixels, noise=noise)
            found = {"prediction": output.logits, "mask": output.mask, "loss": output.loss}
        else:
            found = {"features": model(pixels).last_hidden_state}
    assert_close({what: values.numpy() for what, values in found.items()}, jax_results(name))


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name, layout in EXPORTS if layout == "timm"])
def test_module_with_names_of_timm_matches_jax(name: str, converted) -> None:
    import torch
    from safetensors.torch import load_file

    folder, _ = converted(name, "timm")
    model = timm_like.VisionTransformer(**json.loads((folder / "config.json").read_text())["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        features = model.forward_features(torch.tensor(pixels_and_noise(name)[0]))
    assert_close({"features": features.numpy()}, jax_results(name))


@pytest.mark.torch
def test_encoder_layouts_agree_in_transformers(converted) -> None:
    import torch
    from transformers import AutoModel

    pixels = torch.tensor(pixels_and_noise("square")[0])
    with torch.no_grad():
        outputs = [
            AutoModel.from_pretrained(converted("square", layout)[0])(pixels).last_hidden_state
            for layout in ("vit", "dinov2")
        ]
    assert torch.equal(*outputs)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_auto_model_loads_timm_folder(converted) -> None:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(converted("square", "timm")[0]).eval()
    with torch.no_grad():
        found = model(torch.tensor(pixels_and_noise("square")[0])).last_hidden_state
    assert_close({"features": found.numpy()}, jax_results("square"))


@pytest.mark.torch
@pytest.mark.parametrize("image_size", ["32", "16x40"])
def test_positions_of_another_image_size_are_computed(image_size: str, runs, tmp_path) -> None:
    import torch
    from transformers import ViTModel

    words = [f"--checkpoint={runs('square')}", f"--output={tmp_path / 'vit'}", "--layout=vit"]
    assert convert.main([*words, f"--image-size={image_size}"]) == 0
    height, width = (32, 32) if image_size == "32" else (16, 40)
    model = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    wanted = reference.position_table(16, (height // 8, width // 8))[None]
    # sin and cos of 64-bit numbers rounded to 32 bits: at most the last bit may differ.
    np.testing.assert_allclose(model.embeddings.position_embeddings.detach(), wanted, rtol=0, atol=6e-8)

    config = mae.config(**{**CASES["square"], "image_size": (height, width)})
    params = reference.random_params(config, seed=1)
    images, _ = reference.inputs(config, seed=2)
    tokens = jax.jit(lambda params: vit.bind(config.encoder, params["encoder"])(jnp.asarray(images)))(params)
    with torch.no_grad():
        found = model(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    np.testing.assert_allclose(found, tokens, rtol=0, atol=TOLERANCE)


def test_every_case_is_tested_in_every_layout_that_holds_it() -> None:
    for name, arguments in CASES.items():
        config = mae.config(**arguments)
        assert LAYOUTS_OF[name] == tuple(
            layout for layout in ENCODERS if not LAYOUTS[layout].obstacles(config) and layout in LAYOUTS_OF[name]
        )
        for layout in set(ENCODERS) - set(LAYOUTS_OF[name]):
            assert LAYOUTS[layout].obstacles(config) or name == "square_tanh"
