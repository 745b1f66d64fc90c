"""Mistakes that exporters make, applied to a finished folder: the checks have to detect each.

A mistake changes the tensors and config of a layout in place; it is tried in the layouts listed with it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

ALL = ("vit_mae", "vit", "dinov2", "timm")
TRANSFORMERS = ("vit_mae", "vit", "dinov2")

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]


def _encoder(tensors: Tensors, *endings: str) -> str:
    """Name of the first tensor of the encoder with one of the endings."""
    return min(name for name in tensors if name.endswith(endings) and not name.startswith("decoder."))


def _square_weight(tensors: Tensors) -> str:
    return _encoder(tensors, "attention.output.dense.weight", "attn.proj.weight")


def one_value(tensors: Tensors, config: Config) -> None:
    tensors[_square_weight(tensors)][3, 5] += 1e-2


def transposed(tensors: Tensors, config: Config) -> None:
    name = _square_weight(tensors)
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def written_in_memory_order(tensors: Tensors, config: Config) -> None:
    """What safetensors makes of a transposed view: the right shape, the values in memory order."""
    name = _encoder(tensors, "intermediate.dense.weight", "mlp.fc1.weight")
    tensors[name] = np.ascontiguousarray(tensors[name].T).reshape(tensors[name].shape)


def query_and_key_swapped(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if ".query." in name]:
        other = name.replace(".query.", ".key.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    for name in [name for name in tensors if ".attn.qkv." in name]:
        query, key, value = np.split(tensors[name], 3)
        tensors[name] = np.concatenate([key, query, value])


def blocks_swapped(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if "encoder.layer.0." in name or name.startswith("blocks.0.")]:
        other = name.replace("layer.0.", "layer.1.").replace("blocks.0.", "blocks.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def patch_rows_and_columns_swapped(tensors: Tensors, config: Config) -> None:
    name = _encoder(tensors, "projection.weight", "patch_embed.proj.weight")
    tensors[name] = np.ascontiguousarray(tensors[name].transpose(0, 1, 3, 2))


def positions_row_first(tensors: Tensors, config: Config) -> None:
    name = _encoder(tensors, "position_embeddings", "pos_embed")
    column, row = np.split(tensors[name], 2, axis=-1)
    tensors[name] = np.concatenate([row, column], axis=-1)


def decoder_positions_row_first(tensors: Tensors, config: Config) -> None:
    column, row = np.split(tensors["decoder.decoder_pos_embed"], 2, axis=-1)
    tensors["decoder.decoder_pos_embed"] = np.concatenate([row, column], axis=-1)


def channel_first_in_prediction(tensors: Tensors, config: Config) -> None:
    for name in ("decoder.decoder_pred.weight", "decoder.decoder_pred.bias"):
        values, side, channels = tensors[name], config["patch_size"], config["num_channels"]
        by_channel = np.moveaxis(values.reshape(side, side, channels, *values.shape[1:]), 2, 0)
        tensors[name] = np.ascontiguousarray(by_channel).reshape(values.shape)


def layer_scale_a_tenth(tensors: Tensors, config: Config) -> None:
    tensors["encoder.layer.0.layer_scale1.lambda1"] *= 0.1


def norm_missing(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if name.endswith("layernorm.weight") or name == "norm.weight"]:
        del tensors[name]


def names_of_transformers_5(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if "intermediate.dense" in name]:
        tensors[name.replace("intermediate.dense", "mlp.fc1")] = tensors.pop(name)


def a_tensor_too_many(tensors: Tensors, config: Config) -> None:
    tensors["head.weight"] = np.zeros((2, 2), np.float32)


def a_block_too_few(tensors: Tensors, config: Config) -> None:
    _settings(config)["depth" if "model_args" in config else "num_hidden_layers"] -= 1


def epsilon(value: float) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        config["layer_norm_eps"] = value

    return change


def other_gelu(tensors: Tensors, config: Config) -> None:
    key, tanh = ("act_layer", "gelu_tanh") if "model_args" in config else ("hidden_act", "gelu_pytorch_tanh")
    settings = _settings(config)
    settings[key] = "gelu" if settings[key] == tanh else tanh


def heads_doubled(tensors: Tensors, config: Config) -> None:
    _settings(config)["num_heads" if "model_args" in config else "num_attention_heads"] *= 2


def mlp_of_another_width(tensors: Tensors, config: Config) -> None:
    settings = _settings(config)
    key = next(key for key in ("intermediate_size", "mlp_ratio") if key in settings)
    settings[key] = 2 * settings[key]


def image_of_another_size(tensors: Tensors, config: Config) -> None:
    settings = _settings(config)
    settings["img_size" if "model_args" in config else "image_size"] *= 2


def mask_ratio_half(tensors: Tensors, config: Config) -> None:
    config["mask_ratio"] = 0.5


def target_not_standardised(tensors: Tensors, config: Config) -> None:
    config["norm_pix_loss"] = not config["norm_pix_loss"]


def _settings(config: Config) -> dict[str, Any]:
    return config.get("model_args", config)


# Name -> the change, its layouts, and the message of the NumPy check.
MISTAKES: dict[str, tuple[Callable[[Tensors, Config], None], tuple[str, ...], str]] = {
    "one value of a weight off by 0.01": (one_value, ALL, "differ: (features|prediction)"),
    "a weight transposed": (transposed, ALL, "differ"),
    "a weight written in memory order": (written_in_memory_order, ALL, "differ"),
    "query and key swapped": (query_and_key_swapped, ALL, "differ"),
    "two blocks swapped": (blocks_swapped, ALL, "differ"),
    "rows and columns of a patch swapped": (patch_rows_and_columns_swapped, ALL, "differ"),
    "positions with the row first": (positions_row_first, ALL, "differ"),
    "decoder positions with the row first": (decoder_positions_row_first, ("vit_mae",), "differ: prediction"),
    "channel first in the prediction": (channel_first_in_prediction, ("vit_mae",), "differ: prediction"),
    "layer scale of 0.1 in a block": (layer_scale_a_tenth, ("dinov2",), "differ: features"),
    "LayerNorm epsilon 1e-5": (epsilon(1e-5), TRANSFORMERS, "differ"),
    # Below float32 precision in the features of these weights; test_checks has weights in which it is above.
    "LayerNorm epsilon 1e-12": (epsilon(1e-12), ("vit_mae",), "differ: prediction"),
    "the other GELU": (other_gelu, ALL, "differ"),
    "twice the heads": (heads_doubled, ALL, "differ"),
    "mask ratio 0.5": (mask_ratio_half, ("vit_mae",), "differ: (mask|prediction)"),
    "norm_pix switched": (target_not_standardised, ("vit_mae",), "differ: loss"),
    "final norm missing": (norm_missing, ALL, r"finds no '.*norm.weight'"),
    "names of transformers 5": (names_of_transformers_5, ("vit_mae", "vit"), r"finds no '.*intermediate.dense.weight'"),
    "a tensor too many": (a_tensor_too_many, ALL, "holds head.weight, which this layout does not use"),
    "a block too few": (a_block_too_few, ALL, "differ|does not use"),
    "an MLP of another width": (mlp_of_another_width, ALL, "cannot run .* but by the config"),
    "images of another size": (image_of_another_size, ALL, r"cannot run .* images are \(\d"),
}


def spoil(folder: Path, copy: Path, change: Callable[[Tensors, Config], None]) -> Path:
    """A copy of an exported folder with a mistake in it."""
    shutil.copytree(folder, copy)
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    change(tensors, config)
    safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy
