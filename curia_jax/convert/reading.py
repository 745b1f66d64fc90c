"""Reads a folder that this command wrote back into a model of ours, without PyTorch."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from curia_common.errors import DataError
from curia_jax import json_records, trained_model
from curia_jax.convert import numpy_forward
from curia_jax.convert.folder import CONFIG, OWN, PREPROCESSOR, WEIGHTS, Json
from curia_jax.convert.layouts import LAYOUTS, Layout, entries
from curia_jax.models import vit
from curia_jax.models.head import HeadConfig
from curia_jax.models.params import Params
from curia_jax.settings import Augment

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Export:
    """The encoder of an exported folder.

    Attributes:
      step, examples_seen: of the checkpoint.
      recipe: what the folder says of the preparation of pixels; fields of Augment.
      head, head_params: of a classifier; None of other layouts.
      slices: most slices of a case that the head was trained on.
    """

    config: vit.ViTConfig
    params: Params
    step: int
    examples_seen: int
    recipe: Json
    head: HeadConfig | None = None
    head_params: Params | None = None
    slices: int = 1

    def augment(self, otherwise: Augment) -> Augment:
        """The preparation of pixels; what concerns training alone is from `otherwise`."""
        window = self.recipe["hu_window"]
        return dataclasses.replace(
            otherwise, hu_window=(window[0], window[1]), resample=self.recipe["resample"],
            image_mean=self.recipe["image_mean"], image_std=self.recipe["image_std"],
        )  # fmt: skip


def is_export(folder: Path) -> bool:
    """Whether curia_jax.convert wrote this folder."""
    try:
        content = json_records.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and OWN in content


def read(folder: Path) -> Export:
    """The encoder of a folder of any layout, and the head of a classifier.

    Raises:
      DataError: a file is missing or damaged, or the weights are not those that were written.
    """
    try:
        content = json_records.loads((folder / CONFIG).read_bytes())
        own = content[OWN]
        layout = LAYOUTS[own["layout"]]
        settings = numpy_forward.read_settings(layout.name, content)
        config = vit.config(
            image_size=settings.image_size, patch_size=settings.patch_size, channels=settings.channels, width=settings.width,
            depth=settings.depth, heads=settings.heads, mlp_width=settings.mlp_width, layer_norm_eps=settings.eps,
            activation=_ACTIVATIONS[settings.activation], dtype="float32", remat="none",
        )  # fmt: skip
        if "preprocessing" in own:
            recipe = own["preprocessing"]
        else:  # a folder for transformers, written by version 0.3.0 or before
            recipe = json_records.loads((folder / PREPROCESSOR).read_bytes())[OWN]
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        params, head, head_params, slices = _params(layout, config, tensors), None, None, 1
        if layout.has_head:
            head = json_records.record(HeadConfig, own["head"])
            name = str(layout.table["head"])
            kernel = np.ascontiguousarray(tensors[f"{name}.weight"].T)
            if kernel.shape != (head.features(config.width), head.outputs):
                raise ValueError(f"{name}.weight is not of {head.outputs} outputs on {head.pooling}")
            head_params, slices = {"kernel": kernel, "bias": tensors[f"{name}.bias"]}, int(own["slices"])
        found = Export(config, params, own["step"], own["examples_seen"], recipe, head, head_params, slices)
        wanted = own["encoder_sha256"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(
            f"the export {folder} cannot be read ({type(error).__name__}: {error}); convert the checkpoint again"
        ) from error
    digest = trained_model.digest(params)
    if digest != wanted:
        raise DataError(
            f"the weights of the export {folder} are not those that were written: digest {digest}, in {CONFIG} {wanted}; convert "
            "the checkpoint again, or name the folder as hf:FOLDER or timm:local-dir:FOLDER"
        )
    return found


def _params(layout: Layout, config: vit.ViTConfig, tensors: dict[str, np.ndarray]) -> Params:
    """The encoder's tree; the inverse of `layouts.tensors`.

    Raises:
      KeyError: a tensor is missing.
      ValueError: one has another shape.
    """
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
    table = {key: names for key, names in layout.table.items() if key.startswith("encoder/")}
    encoder = dataclasses.replace(layout, table=table)
    params: Params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    for entry in entries(encoder, {"encoder": shapes}):
        leaf: Any = params
        for key in entry.path[1:]:
            leaf = leaf[key]
        target = leaf if entry.block is None else leaf[entry.block]
        width = target.shape[-1] // entry.parts
        part = target[..., entry.part * width : (entry.part + 1) * width]
        values = tensors[entry.name]
        if entry.path[-2:] == ("patch_embed", "kernel"):
            values = values.transpose(2, 3, 1, 0)
        elif entry.path[-1] == "kernel":
            values = values.T
        if values.size != part.size:
            raise ValueError(f"{entry.name} has {values.size} values, the model {part.size}")
        part[...] = values.reshape(part.shape)
    return params
