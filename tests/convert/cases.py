"""Models and the layouts they are tested in."""

import importlib.util
from typing import Any

import numpy as np

from curia_jax.models import mae
from tests.models import make_references as reference

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))

# float32 on values of order 1: equivalent programs differ by a few units of 1e-7; a wrong epsilon or GELU by 1e-4.
TOLERANCE = 1e-5

# Arguments of mae.config. Frozen results of PyTorch exist for those of make_references.
CASES: dict[str, dict[str, Any]] = {
    **reference.CASES,
    "square_tanh": {**reference.CASES["square"], "activation": "gelu_tanh", "mlp_width": 64},
    "patches_not_square": {**reference.TINY, "image_size": (16, 24), "patch_size": (8, 4), "channels": 3},
}
# Every case in every layout that can hold it; square_tanh in two alone, to save time.
LAYOUTS_OF = {
    "square": ("vit_mae", "vit", "dinov2", "timm"),
    "three_channels": ("vit_mae", "vit", "dinov2", "timm"),
    "wide": ("vit", "timm"),
    "tall_tanh": ("vit", "timm"),
    "square_tanh": ("vit_mae", "dinov2"),
    "patches_not_square": ("vit", "timm"),
}
ENCODERS, CLASSIFIERS = ("vit_mae", "vit", "dinov2", "timm"), ("vit_classifier", "dinov2_classifier", "timm_classifier")
EXPORTS = [(name, layout) for name, layouts in LAYOUTS_OF.items() for layout in layouts]


def pixels_and_noise(name: str) -> tuple[np.ndarray, np.ndarray]:
    images, noise = reference.inputs(mae.config(**CASES[name]), seed=2)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), noise


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for what, values in found.items():
        assert values.shape == wanted[what].shape, what
        np.testing.assert_allclose(values, wanted[what], rtol=0, atol=TOLERANCE, err_msg=what)
