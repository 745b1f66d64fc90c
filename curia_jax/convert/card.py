"""What a reader of the exported folder has to know: where the weights come from and what pixels they expect."""

from collections.abc import Mapping
from typing import Any

from curia_common.errors import UserError
from curia_jax.convert.folder import OWN
from curia_jax.convert.layouts import Layout
from curia_jax.models import mae, vit

PATCH_ORDER = "row, column, channel"  # of the values in a patch, as decoder_pred gives them
GELU = {"gelu": "exact (erf)", "gelu_tanh": "tanh approximation"}


def recipe(settings: Mapping[str, Any], config: vit.ViTConfig) -> dict[str, Any]:
    """How a slice becomes the encoder's input, as `augment.evaluation_view` does it.

    Args:
      settings: `augment` part of the run's config.

    Raises:
      UserError: a setting is missing.
    """
    try:
        window, kernel = settings["hu_window"], settings["resample"]
        mean, std = settings["image_mean"], settings["image_std"]
    except KeyError as error:
        raise UserError(
            f"the checkpoint's config has no augment.{error.args[0]}, which the preprocessing is from; "
            "convert it with the version that trained it"
        ) from None
    return {
        "hu_window": [float(edge) for edge in window],
        "percentiles_unless_hu": [0.5, 99.5],
        "percentile_method": "inverted_cdf",
        "scale_to": [0.0, 1.0],
        "size": list(config.image_size),
        "fit": "squash",
        "resample": kernel,
        "antialias": True,
        "image_mean": float(mean),
        "image_std": float(std),
        "channels": config.channels,
    }


def preprocessor(steps: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: a processor that leaves pixels alone, and the real recipe under our own key.

    The image processors of transformers cannot express it: they resize by way of 8 bits and know no window in HU.
    """
    height, width = steps["size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": height, "width": width},
        "resample": {"bilinear": 2, "bicubic": 3}[steps["resample"]],
        "do_rescale": False,
        "rescale_factor": 1.0,
        "do_normalize": False,
        "image_mean": [steps["image_mean"]] * steps["channels"],
        "image_std": [steps["image_std"]] * steps["channels"],
        "do_convert_rgb": False,
        OWN: dict(steps),
    }


def timm_input(steps: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg can say of the recipe: all that comes after the window has made [0, 1] of a slice."""
    return {
        "interpolation": steps["resample"],
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": [steps["image_mean"]] * steps["channels"],
        "std": [steps["image_std"]] * steps["channels"],
    }


def text(
    layout: Layout, config: mae.MAEConfig, steps: Mapping[str, Any], provenance: Mapping[str, Any], parameters: int
) -> str:
    """README.md.

    Args:
      steps: from `recipe`.
      provenance: run (None where unknown), step, examples_seen, encoder_sha256.
      parameters: trained values in the file.
    """
    encoder = config.encoder
    height, width = encoder.image_size
    patch = " x ".join(map(str, encoder.patch_size))
    run = f"run {provenance['run']}, " if provenance["run"] else ""
    what = (
        "Masked autoencoder (encoder and decoder)" if "decoder" in layout.parts else "Encoder of a masked autoencoder"
    )
    return f"""---
library_name: {"transformers" if layout.for_transformers else "timm"}
pipeline_tag: image-feature-extraction
tags: [medical-imaging, ct, mri, masked-autoencoder]
---

# ViT of {encoder.depth} blocks, width {encoder.width}, patches of {patch} px, for CT and MR slices

{what}, pretrained with curia_jax, {parameters / 1e6:.2f} M parameters, float32.
From {run}step {provenance["step"]:,} ({provenance["examples_seen"]:,} examples seen); encoder weights
`{provenance["encoder_sha256"]}`.

## Load

```python
{_load(layout)}
```

`pixel_values` is float32, batch x {encoder.channels} x {height} x {width}. {_result(layout)}

## Input

{_input(steps)}
The image processor of this folder, if there is one, hands arrays on unchanged. The recipe is in
`{"preprocessor_config.json" if layout.for_transformers else "config.json"}` under the key `{OWN}`.

## Details that change the numbers

LayerNorm epsilon {encoder.layer_norm_eps:g}; GELU {GELU[encoder.activation]}; fixed 2-D sin-cos positions for
{encoder.grid[0]} x {encoder.grid[1]} patches (convert again with `--image-size` for another size: interpolated
positions are others). CLS is the first token; no training loss acted on it directly, so compare it with the mean of
the patch tokens before you rely on it.

Before this folder appeared, it was read back and compared with the model that was trained.
"""


def _load(layout: Layout) -> str:
    if layout.name == "timm":
        return (
            "import timm\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "tokens = model.forward_features(pixel_values)"
        )
    extra = ", add_pooling_layer=False" if layout.name == "vit" else ""
    call = {"vit_mae": "output = model(pixel_values)"}.get(
        layout.name, "tokens = model(pixel_values).last_hidden_state"
    )
    return (
        f"from transformers import {layout.target}\n\n"
        f'model = {layout.target}.from_pretrained("FOLDER"{extra}).eval()\n{call}'
    )


def _result(layout: Layout) -> str:
    if layout.name == "vit_mae":
        return (
            "`output.logits` are the predicted patches, `output.loss` the training loss; every call hides other "
            f"patches unless `noise` is given. Values of a patch are in the order {PATCH_ORDER}. For features take "
            "the layouts vit, dinov2 or timm."
        )
    return "`tokens[:, 0]` is CLS, `tokens[:, 1:]` are the patches row by row, after the final norm."


def _input(steps: Mapping[str, Any]) -> str:
    low, high = steps["hu_window"]
    height, width = steps["size"]
    told = (
        f"CT in Hounsfield units, cut to {low:g} … {high:g}; any other modality cut to its own 0.5 and 99.5 percentile. "
        f"Then scaled to [0, 1], the whole slice resized to {height} x {width} ({steps['resample']}, antialiased, "
        "aspect ratio not kept) and normalised, every image alike:"
    )
    code = f'''import numpy as np
import torch


def prepare(pixels, hu):
    """A slice, rows x columns, in HU (hu=True) or in any other unit, to pixel_values."""
    low, high = ({low}, {high}) if hu else np.percentile(pixels, (0.5, 99.5), method="inverted_cdf")
    x = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
    x = torch.tensor(x, dtype=torch.float32)[None, None]
    x = torch.nn.functional.interpolate(x, ({height}, {width}), mode="{steps["resample"]}", antialias=True)
    return (x - {steps["image_mean"]}) / {steps["image_std"]}'''
    if steps["channels"] != 1:
        told = told.replace("alike:", f"alike; {steps['channels']} channels, each:")
    return f"{told}\n\n```python\n{code}\n```\n"
