"""What PyTorch will compute from an exported folder, in NumPy and float64.

Written from the definitions of the classes that load a folder (ViTMAEForPreTraining, ViTModel and Dinov2Model of
transformers, VisionTransformer of timm), on the names and the config.json of each. It shares no line with the JAX
model or the key tables, so that a mistake in either does not cancel out. Images are (batch, channel, row, column).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float

Values = Float[np.ndarray, "..."]


class Tensors:
    """Tensors by name, in float64, each of the shape that config.json says.

    Attributes:
      unread: names that no forward pass has used.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def take(self, name: str, *shape: int) -> Values:
        """Raises KeyError without such a tensor, ValueError where it has another shape."""
        values = self._tensors[name]
        if values.shape != shape:
            raise ValueError(f"{name} is {values.shape}, but by the config {shape}")
        self.unread.discard(name)
        return values.astype(np.float64)

    def linear(self, name: str, x: Values, outputs: int) -> Values:
        return x @ self.take(f"{name}.weight", outputs, x.shape[-1]).T + self.take(f"{name}.bias", outputs)

    def norm(self, name: str, x: Values, eps: float) -> Values:
        width = x.shape[-1]
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
        return x * self.take(f"{name}.weight", width) + self.take(f"{name}.bias", width)


def features(
    layout: str, config: Mapping[str, Any], tensors: Tensors, images: Float[np.ndarray, "batch channels rows columns"]
) -> Float[np.ndarray, "batch tokens width"]:
    """All tokens after the final norm, CLS first, nothing masked.

    Args:
      layout: vit_mae, vit, dinov2 or timm.
      config: the folder's config.json.

    Raises:
      KeyError: a tensor or setting is missing.
      ValueError: a tensor or the images do not have the shape that the config says.
    """
    if layout == "timm":
        return _timm(config["model_args"], tensors, images)
    if layout == "dinov2":
        return _dinov2(config, tensors, images)
    prefix = "vit." if layout == "vit_mae" else ""
    x, cls = _embed(config, tensors, f"{prefix}embeddings", images)
    return _vit_layers(config, tensors, prefix, np.concatenate([cls, x], axis=1))


def reconstruction(
    config: Mapping[str, Any],
    tensors: Tensors,
    images: Float[np.ndarray, "batch channels rows columns"],
    noise: Float[np.ndarray, "batch patches"],
) -> dict[str, Values]:
    """prediction (batch, patches, values), mask (batch, patches) and loss () of ViTMAEForPreTraining.

    Raises:
      KeyError, ValueError: as `features`.
    """
    x, cls = _embed(config, tensors, "vit.embeddings", images)
    batch, patches, _ = x.shape
    keep = int(patches * (1 - config["mask_ratio"]))
    order = np.argsort(noise, axis=1)
    place = np.argsort(order, axis=1)
    visible = np.take_along_axis(x, order[:, :keep, None], axis=1)
    tokens = _vit_layers(config, tensors, "vit.", np.concatenate([cls, visible], axis=1))

    side, width, channels = config["patch_size"], config["decoder_hidden_size"], config["num_channels"]
    y = tensors.linear("decoder.decoder_embed", tokens, width)
    hidden = np.broadcast_to(tensors.take("decoder.mask_token", 1, 1, width), (batch, patches - keep, width))
    shuffled = np.concatenate([y[:, 1:], hidden], axis=1)
    y = np.concatenate([y[:, :1], np.take_along_axis(shuffled, place[:, :, None], axis=1)], axis=1)
    y = y + tensors.take("decoder.decoder_pos_embed", 1, 1 + patches, width)
    heads, inner = config["decoder_num_attention_heads"], config["decoder_intermediate_size"]
    for i in range(config["decoder_num_hidden_layers"]):
        y = _vit_layer(config, tensors, f"decoder.decoder_layers.{i}", y, heads, inner)
    y = tensors.norm("decoder.decoder_norm", y, config["layer_norm_eps"])
    prediction = tensors.linear("decoder.decoder_pred", y, side**2 * channels)[:, 1:]

    height, width = images.shape[2:]
    target = images.astype(np.float64).reshape(batch, channels, height // side, side, width // side, side)
    target = target.transpose(0, 2, 4, 3, 5, 1).reshape(batch, patches, -1)
    if config["norm_pix_loss"]:
        variance = target.var(axis=-1, ddof=1, keepdims=True)
        target = (target - target.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    mask = (place >= keep).astype(np.float64)
    error = np.square(prediction - target).mean(axis=-1)
    return {"prediction": prediction, "mask": mask, "loss": np.sum(error * mask) / np.sum(mask)}


# ---- transformers


def _embed(config: Mapping[str, Any], tensors: Tensors, name: str, images: Values) -> tuple[Values, Values]:
    """Patches with their positions, and CLS with its own."""
    width = config["hidden_size"]
    x = _convolve(
        tensors, f"{name}.patch_embeddings.projection", images,
        width, config["num_channels"], config["image_size"], config["patch_size"],
    )  # fmt: skip
    positions = tensors.take(f"{name}.position_embeddings", 1, 1 + x.shape[1], width)
    cls = tensors.take(f"{name}.cls_token", 1, 1, width) + positions[:, :1]
    return x + positions[:, 1:], np.repeat(cls, len(x), axis=0)


def _vit_layers(config: Mapping[str, Any], tensors: Tensors, prefix: str, x: Values) -> Values:
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        x = _vit_layer(config, tensors, f"{prefix}encoder.layer.{i}", x, heads, inner)
    return tensors.norm(f"{prefix}layernorm", x, config["layer_norm_eps"])


def _vit_layer(
    config: Mapping[str, Any], tensors: Tensors, name: str, x: Values, heads: int, intermediate: int
) -> Values:
    eps, width = config["layer_norm_eps"], x.shape[-1]
    y = _attend(*_query_key_value(tensors, name, tensors.norm(f"{name}.layernorm_before", x, eps)), heads)
    x = x + tensors.linear(f"{name}.attention.output.dense", y, width)
    y = tensors.linear(f"{name}.intermediate.dense", tensors.norm(f"{name}.layernorm_after", x, eps), intermediate)
    return x + tensors.linear(f"{name}.output.dense", _activate(config["hidden_act"], y), width)


def _query_key_value(tensors: Tensors, name: str, x: Values) -> tuple[Values, Values, Values]:
    name = f"{name}.attention.attention"
    query, key, value = (tensors.linear(f"{name}.{part}", x, x.shape[-1]) for part in ("query", "key", "value"))
    return query, key, value


def _dinov2(config: Mapping[str, Any], tensors: Tensors, images: Values) -> Values:
    patches, cls = _embed(config, tensors, "embeddings", images)
    x = np.concatenate([cls, patches], axis=1)
    width, heads, eps = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        y = _attend(*_query_key_value(tensors, name, tensors.norm(f"{name}.norm1", x, eps)), heads)
        y = tensors.linear(f"{name}.attention.output.dense", y, width)
        x = x + y * tensors.take(f"{name}.layer_scale1.lambda1", width)
        y = tensors.linear(f"{name}.mlp.fc1", tensors.norm(f"{name}.norm2", x, eps), width * config["mlp_ratio"])
        y = tensors.linear(f"{name}.mlp.fc2", _activate(config["hidden_act"], y), width)
        x = x + y * tensors.take(f"{name}.layer_scale2.lambda1", width)
    return tensors.norm("layernorm", x, eps)


# ---- timm


def _timm(args: Mapping[str, Any], tensors: Tensors, images: Values) -> Values:
    eps = 1e-6  # of timm's LayerNorm
    width = args["embed_dim"]
    x = _convolve(
        tensors, "patch_embed.proj", images, width, args["in_chans"], args["img_size"], args["patch_size"]
    )  # fmt: skip
    x = np.concatenate([np.repeat(tensors.take("cls_token", 1, 1, width), len(x), axis=0), x], axis=1)
    x = x + tensors.take("pos_embed", 1, x.shape[1], width)
    for i in range(args["depth"]):
        name = f"blocks.{i}"
        y = tensors.linear(f"{name}.attn.qkv", tensors.norm(f"{name}.norm1", x, eps), 3 * width)
        y = _attend(y[..., :width], y[..., width : 2 * width], y[..., 2 * width :], args["num_heads"])
        x = x + tensors.linear(f"{name}.attn.proj", y, width)
        y = tensors.linear(f"{name}.mlp.fc1", tensors.norm(f"{name}.norm2", x, eps), int(width * args["mlp_ratio"]))
        x = x + tensors.linear(f"{name}.mlp.fc2", _activate(args["act_layer"], y), width)
    return tensors.norm("norm", x, eps)


# ---- what all have in common


def _convolve(
    tensors: Tensors, name: str, images: Values, width: int, channels: int, image_size: Any, patch_size: Any
) -> Values:
    """A convolution whose stride is the size of its kernel, flattened row by row to (batch, patches, width)."""
    (rows, columns), (ph, pw) = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (image_size, patch_size)
    )
    if images.shape[1:] != (channels, rows, columns):
        raise ValueError(f"images are {images.shape[1:]}, but by the config {(channels, rows, columns)}")
    weight, bias = tensors.take(f"{name}.weight", width, channels, ph, pw), tensors.take(f"{name}.bias", width)
    x = images.astype(np.float64).reshape(len(images), channels, rows // ph, ph, columns // pw, pw)
    return np.tensordot(x, weight, axes=([1, 3, 5], [1, 2, 3])).reshape(len(images), -1, width) + bias


def _attend(query: Values, key: Values, value: Values, heads: int) -> Values:
    """softmax(q k' / sqrt(head width)) v; image by image, because the weights are the largest array of all."""

    def split(x: Values) -> Values:
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

    outputs = []
    for q, k, v in zip(query, key, value, strict=True):
        logits = split(q) @ split(k).transpose(0, 2, 1) / np.sqrt(q.shape[-1] // heads)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        outputs.append((weights @ split(v)).transpose(1, 0, 2).reshape(q.shape))
    return np.stack(outputs)


def _activate(name: str, x: Values) -> Values:
    if name == "gelu":
        return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
    if name in ("gelu_pytorch_tanh", "gelu_tanh"):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"no activation {name!r}")
