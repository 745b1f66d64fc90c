"""What the folders compute in NumPy, and the folders that it refuses."""

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from curia_jax.convert import numpy_forward
from curia_jax.convert.numpy_forward import Decoder, Settings
from tests.convert.cases import EXPORTS, assert_close, pixels_and_noise
from tests.models import make_references as reference


@pytest.mark.parametrize(("name", "layout"), [case for case in EXPORTS if case[0] in reference.CASES])
def test_files_give_frozen_results_of_transformers(name: str, layout: str, converted) -> None:
    folder, _ = converted(name, layout)
    frozen = reference.read_frozen(name)
    wanted = {
        "features": frozen["tokens"], "prediction": frozen["logits"], "mask": frozen["mask"], "loss": frozen["loss"]
    }  # fmt: skip
    settings = numpy_forward.read_settings(layout, json.loads((folder / "config.json").read_text()))
    tensors = numpy_forward.Tensors(safetensors.numpy.load_file(folder / "model.safetensors"))
    pixels, noise = pixels_and_noise(name)
    found = {"features": numpy_forward.features(layout, settings, tensors, pixels)}
    if layout == "vit_mae":
        found |= numpy_forward.reconstruction(settings, tensors, pixels, noise)
    assert_close(found, wanted)


COMMON = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40, "num_channels": 1,
    "image_size": 24, "patch_size": [8, 4], "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-5,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 20, "mask_ratio": 0.6, "norm_pix_loss": False,
}  # fmt: skip
TIMM = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.5, "in_chans": 1, "img_size": [24, 24],
    "patch_size": [8, 4], "act_layer": "gelu_tanh", "global_pool": "token",
}  # fmt: skip
ENCODER = {
    "width": 16, "depth": 3, "heads": 2, "mlp_width": 40, "channels": 1, "image_size": (24, 24), "patch_size": (8, 4)
}  # fmt: skip
TANH, EPS = "gelu_pytorch_tanh", 1e-5


@pytest.mark.parametrize(
    ("layout", "config", "wanted"),
    [
        ("vit", COMMON, Settings(**ENCODER, activation=TANH, eps=EPS)),
        ("vit_mae", COMMON | DECODER,
         Settings(**ENCODER, activation=TANH, eps=EPS, decoder=Decoder(12, 1, 3, 20, 0.6, False))),
        # Dinov2 has no intermediate_size but a whole ratio; timm's ratio may be broken, and its epsilon is always 1e-6.
        ("dinov2", {name: value for name, value in COMMON.items() if name != "intermediate_size"} | {"mlp_ratio": 4},
         Settings(**ENCODER | {"mlp_width": 64}, activation=TANH, eps=EPS)),
        ("timm", {"model_args": TIMM, "num_classes": 0}, Settings(**ENCODER, activation="gelu_tanh", eps=1e-6, pool="token")),
        ("vit_classifier", COMMON | {"id2label": {"0": "no", "1": "yes"}}, Settings(**ENCODER, activation=TANH, eps=EPS, outputs=2)),
        ("timm_classifier", {"model_args": TIMM | {"global_pool": "avg", "fc_norm": False}, "num_classes": 3},
         Settings(**ENCODER, activation="gelu_tanh", eps=1e-6, outputs=3, pool="avg")),
    ],
)  # fmt: skip
def test_settings_are_those_that_the_class_reads(layout: str, config: dict[str, Any], wanted: Settings) -> None:
    assert numpy_forward.read_settings(layout, config) == wanted


def test_missing_setting_raises_key_error() -> None:
    with pytest.raises(KeyError, match="layer_norm_eps"):
        numpy_forward.read_settings("vit", {name: COMMON[name] for name in COMMON if name != "layer_norm_eps"})


def read(converted, name: str, layout: str) -> tuple[Settings, dict[str, np.ndarray]]:
    folder, _ = converted(name, layout)
    settings = numpy_forward.read_settings(layout, json.loads((folder / "config.json").read_text()))
    return settings, safetensors.numpy.load_file(folder / "model.safetensors")


def test_tensor_of_another_shape_and_missing_tensor_are_named(converted) -> None:
    settings, values = read(converted, "square", "vit")
    images, _ = pixels_and_noise("square")
    wrong = values | {"layernorm.bias": np.zeros(15, np.float32)}
    with pytest.raises(ValueError, match=r"layernorm.bias is \(15,\), but by the config \(16,\)"):
        numpy_forward.features("vit", settings, numpy_forward.Tensors(wrong), images)
    del values["layernorm.bias"]
    with pytest.raises(KeyError, match="layernorm.bias"):
        numpy_forward.features("vit", settings, numpy_forward.Tensors(values), images)


def test_images_of_another_size_are_refused(converted) -> None:
    settings, values = read(converted, "square", "timm")
    with pytest.raises(ValueError, match=r"images are \(1, 16, 24\), but by the config \(1, 24, 24\)"):
        numpy_forward.features("timm", settings, numpy_forward.Tensors(values), np.zeros((2, 1, 16, 24), np.float32))


def test_reconstruction_needs_a_decoder(converted) -> None:
    settings, values = read(converted, "square", "vit")
    with pytest.raises(ValueError, match="the layout has no decoder"):
        numpy_forward.reconstruction(settings, numpy_forward.Tensors(values), *pixels_and_noise("square"))


def test_tensors_that_no_forward_pass_uses_are_listed(converted) -> None:
    settings, values = read(converted, "square", "vit_mae")
    tensors = numpy_forward.Tensors(values | {"head.weight": np.zeros((2, 2), np.float32)})
    images, noise = pixels_and_noise("square")
    numpy_forward.features("vit_mae", settings, tensors, images)
    assert all(name.startswith("decoder.") for name in tensors.unread - {"head.weight"})
    numpy_forward.reconstruction(settings, tensors, images, noise)
    assert tensors.unread == {"head.weight"}
