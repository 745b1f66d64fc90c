"""What a reader of the exported folder has to know: where the weights come from and how pixels are prepared for them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

from curia_jax.checkpoint import Origin
from curia_jax.convert.folder import OWN, PROCESSOR_CODE, Json
from curia_jax.convert.layouts import Layout
from curia_jax.models import mae, vit
from curia_jax.models.head import HeadConfig
from curia_jax.settings import Augment

PATCH_ORDER = "row, column, channel"  # of the values in a patch, as decoder_pred gives them
GELU = {"gelu": "exact (erf)", "gelu_tanh": "tanh approximation"}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where the weights come from.

    Attributes:
      run: name of the work directory; None where unknown.
      step, examples_seen: of the checkpoint.
      encoder_sha256: `trained_model.digest` of the encoder.
      version: of this project, at conversion.
      origin: whose weights the run started from; None where they were random.
      task: that the run was fine-tuned on; None of a pretrained one.
    """

    run: str | None
    step: int
    examples_seen: int
    encoder_sha256: str
    version: str
    origin: Origin | None = None
    task: str | None = None


def recipe(augment: Augment, encoder: vit.ViTConfig) -> Json:
    """How a slice becomes the encoder's input, as `augment.evaluation_view` does it; the whole slice is resized."""
    return {
        "hu_window": list(augment.hu_window),
        "percentiles_unless_hu": [0.5, 99.5],
        "percentile_method": "inverted_cdf",
        "scale_to": [0.0, 1.0],
        "size": list(encoder.image_size),
        "fit": "squash",
        "resample": augment.resample,
        "antialias": True,
        "image_mean": augment.image_mean,
        "image_std": augment.image_std,
        "channels": encoder.channels,
    }


# ---- what goes into the files


def safetensors_metadata(
    layout: Layout, encoder: vit.ViTConfig, augment: Augment, provenance: Provenance
) -> Mapping[str, str]:
    """Our own keys of the safetensors header."""
    steps = recipe(augment, encoder)
    header = {
        **_own(layout, encoder, provenance), "patch_order": PATCH_ORDER, "layer_norm_eps": encoder.layer_norm_eps,
        **{key: steps[key] for key in ("hu_window", "image_mean", "image_std")},
    }  # fmt: skip
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}


def config_json(
    layout: Layout, config: mae.MAEConfig, augment: Augment, provenance: Provenance, head: HeadConfig | None = None,
    slices: int = 1, base_sha256: str | None = None,
) -> Json:  # fmt: skip
    """config.json: what the class reads, and under our own key provenance and how pixels are prepared.

    Args:
      head: of a classifier, as `Layout.own_head` gives it.
      slices: most slices of a case that the head was trained on.
      base_sha256: digest of the encoder that an adapter belongs to; None where there is none.
    """
    content = layout.content(config, head)
    own = _own(layout, config.encoder, provenance) | {"preprocessing": recipe(augment, config.encoder)}
    if head is not None:
        own |= {"head": dataclasses.asdict(head), "slices": slices}
    if base_sha256 is not None:
        own["base_encoder_sha256"] = base_sha256
    if layout.for_transformers:
        return content | {OWN: own}
    # What timm's pretrained_cfg can say of the recipe: everything after the window has scaled a slice to [0, 1].
    told = {
        "interpolation": augment.resample,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": [augment.image_mean] * config.encoder.channels,
        "std": [augment.image_std] * config.encoder.channels,
    }
    return content | {"pretrained_cfg": content["pretrained_cfg"] | told, OWN: own}


def _own(layout: Layout, encoder: vit.ViTConfig, provenance: Provenance) -> Json:
    return {
        "layout": layout.name,
        **dataclasses.asdict(provenance),
        "image_size": list(encoder.image_size),
        "gelu": GELU[encoder.activation],
    }


def preprocessor_json(augment: Augment, encoder: vit.ViTConfig, *, hu: bool | Literal["auto"]) -> Json:
    """preprocessor_config.json: the arguments of the class in PROCESSOR_CODE, and where transformers finds it.

    The image processors of transformers cannot express the recipe: they resize in 8 bits and know no window in HU.

    Args:
      hu: pixels are in HU, or in other units; "auto" lets the processor tell.
    """
    steps, (height, width), name = recipe(augment, encoder), encoder.image_size, "CuriaJaxImageProcessor"
    return {
        # No class of transformers has this name, so that none of them is taken where nobody trusts the code.
        "image_processor_type": name,
        "auto_map": {"AutoImageProcessor": f"{PROCESSOR_CODE.removesuffix('.py')}.{name}"},
        "hu": hu,
        "hu_window": steps["hu_window"],
        "percentiles": steps["percentiles_unless_hu"],
        "size": {"height": height, "width": width},
        "resample": augment.resample,
        "image_mean": [augment.image_mean] * encoder.channels,
        "image_std": [augment.image_std] * encoder.channels,
    }


def text(
    layout: Layout, config: mae.MAEConfig, augment: Augment, provenance: Provenance, parameters: int,
    head: HeadConfig | None = None, slices: int = 1, base_sha256: str | None = None,
) -> str:  # fmt: skip
    """The model card, README.md.

    Args:
      parameters: trained values in the file.
      head: of a classifier, as `Layout.own_head` gives it.
      slices: most slices of a case that the head was trained on.
      base_sha256: digest of the encoder that an adapter belongs to; None where there is none.
    """
    # No pipeline_tag: the pipelines of transformers read images as 8-bit RGB, which is not what the encoder takes.
    encoder = config.encoder
    height, width = encoder.image_size
    patch = " x ".join(map(str, encoder.patch_size))
    run = f"run {provenance.run}, " if provenance.run else ""
    origin = ""
    if provenance.origin:
        origin = (
            f"\nTraining started from the weights `{provenance.origin.weights}` of another run, at its step "
            f"{provenance.origin.step:,} ({provenance.origin.examples_seen:,} examples seen)."
        )
    what = "Masked autoencoder (encoder and decoder)" if layout.has_decoder else "Encoder of a masked autoencoder"
    if head is not None:
        what = f"Classifier ({TARGETS[head.target]})"
    if head is not None and base_sha256 is not None:
        what = f"Low-rank adapter (LoRA) and head of a classifier ({TARGETS[head.target]})"
    made, cls_note = "pretrained", ""
    if provenance.task is not None:
        made = f"fine-tuned on {provenance.task}"
    else:
        cls_note = (
            "CLS is the first token; no training loss acted on it directly, so compare it with the mean of\n"
            "the patch tokens before you rely on it.\n"
        )
    return f"""---
library_name: {"transformers" if layout.for_transformers else "timm"}
tags: [medical-imaging, ct, mri, masked-autoencoder]
---

# ViT of {encoder.depth} blocks, width {encoder.width}, patches of {patch} px, for CT and MR slices

{what}, {made} with curia_jax, {parameters / 1e6:.2f} M parameters, float32.
From {run}step {provenance.step:,} ({provenance.examples_seen:,} examples seen); encoder weights
`{provenance.encoder_sha256}`; converted with curia_jax {provenance.version}.{origin}

## Load

```python
{_load(layout) if base_sha256 is None else _load_adapter(layout, base_sha256)}
```

`pixel_values` is float32, batch x {encoder.channels} x {height} x {width}. {_result(layout, config, head, slices)}

## Input

{_input(layout, augment, encoder)}
{PROCESSOR_NOTES if layout.for_transformers else TIMM_NOTES}
## Details that change the numbers

LayerNorm epsilon {encoder.layer_norm_eps:g}; GELU {GELU[encoder.activation]}; fixed 2-D sin-cos positions for
{encoder.grid[0]} x {encoder.grid[1]} patches (for another image size convert again with `--image-size`: interpolated
positions differ). {cls_note}
This folder was read back and compared with the trained model before it was published.
"""


TARGETS = {
    "classes": "one class each", "labels": "labels, each yes or no", "value": "a value", "time": "log hazard of a Cox model",
}  # fmt: skip


def _load(layout: Layout) -> str:
    if not layout.for_transformers:
        call = "logits = model(pixel_values)" if layout.has_head else "tokens = model.forward_features(pixel_values)"
        return f'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n{call}'
    extra = ", add_pooling_layer=False" if layout.name == "vit" else ""
    call = (
        "output = model(pixel_values)" if layout.has_decoder else "logits = model(pixel_values).logits" if layout.has_head
        else "tokens = model(pixel_values).last_hidden_state"
    )  # fmt: skip
    return (
        f"from transformers import AutoImageProcessor, {layout.target}\n\n"
        'processor = AutoImageProcessor.from_pretrained("FOLDER", trust_remote_code=True)\n'
        f'model = {layout.target}.from_pretrained("FOLDER"{extra}).eval()\n'
        f'pixel_values = processor(slices)["pixel_values"]\n{call}'
    )


def _load_adapter(layout: Layout, base_sha256: str) -> str:
    return (
        f"from peft import PeftModel\nfrom transformers import AutoConfig, AutoImageProcessor, {layout.target}\n\n"
        f"# BASE: the run that fine-tuning started from, by curia_jax.convert --layout={layout.name.removesuffix('_classifier')}, with\n"
        f"# the encoder {base_sha256} in its config.json\n"
        'config = AutoConfig.from_pretrained("FOLDER")\n'
        f'base = {layout.target}.from_pretrained("BASE", config=config)\n'
        'model = PeftModel.from_pretrained(base, "FOLDER").eval()\n'
        'processor = AutoImageProcessor.from_pretrained("FOLDER", trust_remote_code=True)\n'
        'logits = model(processor(slices)["pixel_values"]).logits'
    )


def _result(layout: Layout, config: mae.MAEConfig, head: HeadConfig | None, slices: int) -> str:
    if head is not None:
        names = ", ".join(f"{number} {name}" for number, name in enumerate(head.names))
        meaning = {
            "classes": "their softmax are probabilities of", "labels": "the sigmoid of each is the probability of",
            "value": "they are the value, in its own units:", "time": "they are the log hazard, higher is sooner:",
        }[head.target]  # fmt: skip
        of_many = (
            ""
            if slices == 1
            else f" It was trained on cases of up to {slices} slices: the logits of a case are the mean of theirs."
        )
        return f"`logits` is batch x {head.outputs}; {meaning} {names}.{of_many}"
    if not layout.has_decoder:
        return "`tokens[:, 0]` is CLS, `tokens[:, 1:]` are the patches row by row, after the final norm."
    units = (
        "Predictions are standardised patches (norm_pix): to see pixels, multiply each by sqrt(variance + "
        f"{config.norm_pix_eps:g}) of the original patch (unbiased variance) and add its mean. The grey level of a hidden "
        "patch is therefore not predicted."
        if config.norm_pix
        else "Predictions are in the units of `pixel_values` (no norm_pix)."
    )
    return (
        "`output.logits` are the predicted patches, `output.loss` the training loss; every call hides other "
        f"patches unless `noise` is given. Values of a patch are in the order {PATCH_ORDER}. {units} For features use "
        "the layouts vit, dinov2 or timm."
    )


PROCESSOR_NOTES = f"""That is what `processor` does; it runs `{PROCESSOR_CODE}` of this folder, hence `trust_remote_code`. `slices` is a slice
(rows x columns), a volume (rows x columns x slices) or a list of either: arrays of any number type, pydicom datasets, paths of
DICOM files. Give values as they are, neither windowed nor scaled, as a viewer shows them: rows run from the front of the body or from
the head, columns from the patient's right or, in sagittal slices, from the face. Volumes give an axis more, images x slices x …; the
model takes them as `pixel_values.flatten(0, 1)`.

`hu` in `preprocessor_config.json`, or `from_pretrained("FOLDER", hu=True, trust_remote_code=True)`, says the units: `true` for CT in HU,
`false` for anything else. `"auto"` goes by the header of DICOM files; for arrays it guesses, reports the guess, and raises where it
cannot tell. Where you know the units, say them. MONOCHROME1 is inverted unless it is CT, as in training; an array has to be so
already.
"""
TIMM_NOTES = f"""The recipe is in `config.json` under the key `{OWN}`.

DICOM files other than CT whose PhotometricInterpretation is MONOCHROME1 store bright as low. They were inverted before
training, so that larger values are brighter: replace a stored value v of b bits with 2^b - 1 - v (signed: -1 - v), then
apply the rescale slope and intercept. HU are never inverted.
"""


def _input(layout: Layout, augment: Augment, encoder: vit.ViTConfig) -> str:
    low, high = augment.hu_window
    height, width = encoder.image_size
    alike = "alike:" if encoder.channels == 1 else f"alike; {encoder.channels} channels, each:"
    told = (
        f"CT in Hounsfield units, clipped to {low:g} … {high:g}; any other modality clipped to its own 0.5 and 99.5 percentile. "
        f"Then scaled to [0, 1], the whole slice resized to {height} x {width} ({augment.resample}, antialiased, "
        f"aspect ratio not kept) and normalised, every image {alike}"
    )
    if layout.for_transformers:
        return told + "\n"
    code = f'''import numpy as np
import torch


def prepare(pixels, hu):
    """A slice of any number type, rows x columns, in HU (hu=True) or in any other unit, to pixel_values."""
    pixels = np.asarray(pixels, np.float64)  # before any arithmetic: integers wrap around
    low, high = ({low}, {high}) if hu else np.percentile(pixels, (0.5, 99.5), method="inverted_cdf")
    x = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
    x = torch.tensor(x, dtype=torch.float32)[None, None]
    x = torch.nn.functional.interpolate(x, ({height}, {width}), mode="{augment.resample}", antialias=True)
    return (x - {augment.image_mean}) / {augment.image_std}'''
    return f"{told}\n\n```python\n{code}\n```\n"
