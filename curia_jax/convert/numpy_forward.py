"""What PyTorch computes from an exported folder, in NumPy and float64.

Written from the definitions of the classes that load a folder (ViTMAEForPreTraining, ViTModel, Dinov2Model and the classifiers of
both of transformers, VisionTransformer of timm), on the tensor names and the config.json of each. It shares no code with the JAX
model or the name tables, so that a mistake in either does not cancel out. Images are (batch, channel, row, column).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.special
from jaxtyping import Float

from curia_jax.convert.folder import Json

Values = Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder of ViTMAEForPreTraining, as config.json describes it."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    mask_ratio: float
    norm_pix: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """A model as config.json describes it.

    Attributes:
      image_size, patch_size: (rows, columns) in px.
      activation: "gelu", "gelu_pytorch_tanh" or "gelu_tanh".
      decoder: of the layout vit_mae.
      outputs: of a classifier; else 0.
      pool: of timm, "token" or "avg".
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    channels: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    activation: str
    eps: float
    decoder: Decoder | None = None
    outputs: int = 0
    pool: str = ""


def read_settings(layout: str, config: Json) -> Settings:
    """Settings from config.json.

    Args:
      layout: vit_mae, vit, dinov2, timm, or one of the last three with _classifier.

    Raises:
      KeyError: a setting is missing.
    """
    if layout.startswith("timm"):
        args = config["model_args"]
        if layout == "timm_classifier" and args["fc_norm"]:
            raise ValueError("fc_norm is on, which replaces the final norm")
        width = args["embed_dim"]
        return Settings(
            width=width, depth=args["depth"], heads=args["num_heads"], mlp_width=int(width * args["mlp_ratio"]),
            channels=args["in_chans"], image_size=_pair(args["img_size"]), patch_size=_pair(args["patch_size"]),
            activation=args["act_layer"], eps=1e-6,  # of timm's LayerNorm
            outputs=config["num_classes"], pool=args["global_pool"],
        )  # fmt: skip
    width = config["hidden_size"]
    decoder = None
    if layout == "vit_mae":
        decoder = Decoder(
            width=config["decoder_hidden_size"], depth=config["decoder_num_hidden_layers"],
            heads=config["decoder_num_attention_heads"], mlp_width=config["decoder_intermediate_size"],
            mask_ratio=config["mask_ratio"], norm_pix=config["norm_pix_loss"],
        )  # fmt: skip
    return Settings(
        width=width, depth=config["num_hidden_layers"], heads=config["num_attention_heads"],
        mlp_width=width * config["mlp_ratio"] if layout.startswith("dinov2") else config["intermediate_size"],
        channels=config["num_channels"], image_size=_pair(config["image_size"]), patch_size=_pair(config["patch_size"]),
        activation=config["hidden_act"], eps=config["layer_norm_eps"], decoder=decoder,
        outputs=len(config["id2label"]) if layout.endswith("_classifier") else 0,
    )  # fmt: skip


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class Tensors:
    """Tensors by name, in float64, each checked to have the shape that config.json gives.

    Attributes:
      unread: names that no forward pass has used.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def read(self, name: str, *shape: int) -> Values:
        """Raises KeyError without such a tensor, ValueError where it has another shape."""
        values = self._tensors[name]
        if values.shape != shape:
            raise ValueError(f"{name} is {values.shape}, but by the config {shape}")
        self.unread.discard(name)
        return values.astype(np.float64)

    def linear(self, name: str, x: Values, outputs: int) -> Values:
        return x @ self.read(f"{name}.weight", outputs, x.shape[-1]).T + self.read(f"{name}.bias", outputs)

    def norm(self, name: str, x: Values, eps: float) -> Values:
        width = x.shape[-1]
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
        return x * self.read(f"{name}.weight", width) + self.read(f"{name}.bias", width)


def features(
    layout: str, settings: Settings, tensors: Tensors, images: Float[np.ndarray, "batch channels rows columns"]
) -> Float[np.ndarray, "batch tokens width"]:
    """All tokens after the final norm, CLS first, nothing masked.

    Args:
      layout: as of `read_settings`.

    Raises:
      KeyError: a tensor is missing.
      ValueError: a tensor or the images do not have the shape that config.json gives.
    """
    if layout.startswith("timm"):
        return _timm(settings, tensors, images)
    if layout.startswith("dinov2"):
        return _dinov2(settings, tensors, "dinov2." if layout == "dinov2_classifier" else "", images)
    prefix = "" if layout == "vit" else "vit."
    x, cls = _embed(settings, tensors, f"{prefix}embeddings", images)
    return _vit_layers(settings, tensors, prefix, np.concatenate([cls, x], axis=1))


def logits(
    layout: str, settings: Settings, tensors: Tensors, tokens: Float[np.ndarray, "batch tokens width"]
) -> Float[np.ndarray, "batch outputs"]:
    """What a classifier returns.

    Args:
      layout: vit_classifier, dinov2_classifier or timm_classifier.
      tokens: from `features`.

    Raises:
      KeyError: a tensor is missing.
      ValueError: a tensor does not have the shape that config.json gives.
    """
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(axis=1)
    if layout == "vit_classifier":
        return tensors.linear("classifier", cls, settings.outputs)
    if layout == "dinov2_classifier":
        return tensors.linear("classifier", np.concatenate([cls, mean], axis=1), settings.outputs)
    return tensors.linear("head", {"token": cls, "avg": mean}[settings.pool], settings.outputs)


def reconstruction(
    settings: Settings,
    tensors: Tensors,
    images: Float[np.ndarray, "batch channels rows columns"],
    noise: Float[np.ndarray, "batch patches"],
) -> dict[str, Values]:
    """prediction (batch, patches, values), mask (batch, patches) and loss () of ViTMAEForPreTraining.

    Raises:
      KeyError, ValueError: as `features`; ValueError also for settings without a decoder.
    """
    decoder = settings.decoder
    if decoder is None:
        raise ValueError("the layout has no decoder")
    x, cls = _embed(settings, tensors, "vit.embeddings", images)
    batch, patches, _ = x.shape
    keep = int(patches * (1 - decoder.mask_ratio))
    order = np.argsort(noise, axis=1)
    place = np.argsort(order, axis=1)
    visible = np.take_along_axis(x, order[:, :keep, None], axis=1)
    tokens = _vit_layers(settings, tensors, "vit.", np.concatenate([cls, visible], axis=1))

    y = tensors.linear("decoder.decoder_embed", tokens, decoder.width)
    mask_token = tensors.read("decoder.mask_token", 1, 1, decoder.width)
    hidden = np.broadcast_to(mask_token, (batch, patches - keep, decoder.width))
    shuffled = np.concatenate([y[:, 1:], hidden], axis=1)
    y = np.concatenate([y[:, :1], np.take_along_axis(shuffled, place[:, :, None], axis=1)], axis=1)
    y = y + tensors.read("decoder.decoder_pos_embed", 1, 1 + patches, decoder.width)
    for i in range(decoder.depth):
        y = _vit_layer(settings, tensors, f"decoder.decoder_layers.{i}", y, decoder.heads, decoder.mlp_width)
    y = tensors.norm("decoder.decoder_norm", y, settings.eps)
    side, channels = settings.patch_size[0], settings.channels
    prediction = tensors.linear("decoder.decoder_pred", y, side**2 * channels)[:, 1:]

    height, width = images.shape[2:]
    target = images.astype(np.float64).reshape(batch, channels, height // side, side, width // side, side)
    target = target.transpose(0, 2, 4, 3, 5, 1).reshape(batch, patches, -1)
    if decoder.norm_pix:
        variance = target.var(axis=-1, ddof=1, keepdims=True)
        target = (target - target.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    mask = (place >= keep).astype(np.float64)
    error = np.square(prediction - target).mean(axis=-1)
    return {"prediction": prediction, "mask": mask, "loss": np.sum(error * mask) / np.sum(mask)}


# ---- transformers


def _embed(settings: Settings, tensors: Tensors, name: str, images: Values) -> tuple[Values, Values]:
    """Patches with their positions, and CLS with its own."""
    x = _convolve(settings, tensors, f"{name}.patch_embeddings.projection", images)
    positions = tensors.read(f"{name}.position_embeddings", 1, 1 + x.shape[1], settings.width)
    cls = tensors.read(f"{name}.cls_token", 1, 1, settings.width) + positions[:, :1]
    return x + positions[:, 1:], np.repeat(cls, len(x), axis=0)


def _vit_layers(settings: Settings, tensors: Tensors, prefix: str, x: Values) -> Values:
    for i in range(settings.depth):
        x = _vit_layer(settings, tensors, f"{prefix}encoder.layer.{i}", x, settings.heads, settings.mlp_width)
    return tensors.norm(f"{prefix}layernorm", x, settings.eps)


def _vit_layer(settings: Settings, tensors: Tensors, name: str, x: Values, heads: int, mlp_width: int) -> Values:
    eps, width = settings.eps, x.shape[-1]
    y = _attend(*_query_key_value(tensors, name, tensors.norm(f"{name}.layernorm_before", x, eps)), heads)
    x = x + tensors.linear(f"{name}.attention.output.dense", y, width)
    y = tensors.linear(f"{name}.intermediate.dense", tensors.norm(f"{name}.layernorm_after", x, eps), mlp_width)
    return x + tensors.linear(f"{name}.output.dense", _activate(settings.activation, y), width)


def _query_key_value(tensors: Tensors, name: str, x: Values) -> tuple[Values, Values, Values]:
    name = f"{name}.attention.attention"
    query, key, value = (tensors.linear(f"{name}.{part}", x, x.shape[-1]) for part in ("query", "key", "value"))
    return query, key, value


def _dinov2(settings: Settings, tensors: Tensors, prefix: str, images: Values) -> Values:
    patches, cls = _embed(settings, tensors, f"{prefix}embeddings", images)
    x = np.concatenate([cls, patches], axis=1)
    width, eps = settings.width, settings.eps
    for i in range(settings.depth):
        name = f"{prefix}encoder.layer.{i}"
        y = _attend(*_query_key_value(tensors, name, tensors.norm(f"{name}.norm1", x, eps)), settings.heads)
        y = tensors.linear(f"{name}.attention.output.dense", y, width)
        x = x + y * tensors.read(f"{name}.layer_scale1.lambda1", width)
        y = tensors.linear(f"{name}.mlp.fc1", tensors.norm(f"{name}.norm2", x, eps), settings.mlp_width)
        y = tensors.linear(f"{name}.mlp.fc2", _activate(settings.activation, y), width)
        x = x + y * tensors.read(f"{name}.layer_scale2.lambda1", width)
    return tensors.norm(f"{prefix}layernorm", x, eps)


# ---- timm


def _timm(settings: Settings, tensors: Tensors, images: Values) -> Values:
    width, eps = settings.width, settings.eps
    x = _convolve(settings, tensors, "patch_embed.proj", images)
    x = np.concatenate([np.repeat(tensors.read("cls_token", 1, 1, width), len(x), axis=0), x], axis=1)
    x = x + tensors.read("pos_embed", 1, x.shape[1], width)
    for i in range(settings.depth):
        name = f"blocks.{i}"
        y = tensors.linear(f"{name}.attn.qkv", tensors.norm(f"{name}.norm1", x, eps), 3 * width)
        y = _attend(y[..., :width], y[..., width : 2 * width], y[..., 2 * width :], settings.heads)
        x = x + tensors.linear(f"{name}.attn.proj", y, width)
        y = tensors.linear(f"{name}.mlp.fc1", tensors.norm(f"{name}.norm2", x, eps), settings.mlp_width)
        x = x + tensors.linear(f"{name}.mlp.fc2", _activate(settings.activation, y), width)
    return tensors.norm("norm", x, eps)


# ---- shared by all layouts


def _convolve(settings: Settings, tensors: Tensors, name: str, images: Values) -> Values:
    """A convolution whose stride is the patch size, flattened row by row to (batch, patches, width)."""
    (rows, columns), (ph, pw) = settings.image_size, settings.patch_size
    width, channels = settings.width, settings.channels
    if images.shape[1:] != (channels, rows, columns):
        raise ValueError(f"images are {images.shape[1:]}, but by the config {(channels, rows, columns)}")
    weight, bias = tensors.read(f"{name}.weight", width, channels, ph, pw), tensors.read(f"{name}.bias", width)
    x = images.astype(np.float64).reshape(len(images), channels, rows // ph, ph, columns // pw, pw)
    return np.tensordot(x, weight, axes=([1, 3, 5], [1, 2, 3])).reshape(len(images), -1, width) + bias


def _attend(query: Values, key: Values, value: Values, heads: int) -> Values:
    """softmax(q k' / sqrt(head width)) v; image by image, because the attention weights are the largest array."""

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
