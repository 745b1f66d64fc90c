"""One table of tensor names per layout, and the config.json that belongs to it.

A table maps a module or token of our parameter tree to its name in the layout. A linear layer or norm stands for its
weight and bias; "{}" is the index of the block; a tuple names the parts of a fused layer, whose output columns are
split equally in this order. `entries` expands a table tensor by tensor, in either direction.

Names are those of transformers 4, which version 5 reads as well; only version 5 reads the names that it uses in memory.

The layouts of classifiers hold the linear head of a fine-tuned run too. Each class pools tokens in a way of its own, so that a head
goes into the classes of its pooling; that of Dinov2ForImageClassification, CLS and mean, contains the two others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from curia_common.errors import UserError
from curia_jax.convert.folder import Json
from curia_jax.models import mae, vit
from curia_jax.models.head import HeadConfig
from curia_jax.models.params import Params

Table = Mapping[str, str | tuple[str, ...]]

# eps that transformers' ViTMAE adds to a patch's variance; a literal there, not a setting.
HF_NORM_PIX_EPS = 1e-6
# eps of timm's LayerNorm; config.json cannot set it.
TIMM_LAYER_NORM_EPS = 1e-6
EVALUATOR_MASK_SIDE = 512  # px, to which CuriaBench's official evaluator resizes masks


# ---- tables


_BLOCK = ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_VIT_BLOCK = (
    "layernorm_before", _QKV, "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"
)  # fmt: skip
_DINOV2_BLOCK = ("norm1", _QKV, "attention.output.dense", "norm2", "mlp.fc1", "mlp.fc2")
_TIMM_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def _blocks(ours: str, theirs: str, names: Sequence[str | tuple[str, ...]]) -> Table:
    """Stacked blocks; `names` are those of the modules of _BLOCK."""
    return {
        f"{ours}/{module}": f"{theirs}.{name}" if isinstance(name, str) else tuple(f"{theirs}.{part}" for part in name)
        for module, name in zip(_BLOCK, names, strict=True)
    }


def _transformers_encoder(prefix: str, block: Sequence[str | tuple[str, ...]]) -> Table:
    return {
        "encoder/cls_token": f"{prefix}embeddings.cls_token",
        "encoder/patch_embed": f"{prefix}embeddings.patch_embeddings.projection",
        **_blocks("encoder/blocks", f"{prefix}encoder.layer.{{}}", block),
        "encoder/norm": f"{prefix}layernorm",
    }


VIT_TABLE = _transformers_encoder("", _VIT_BLOCK)
VIT_MAE_TABLE: Table = {
    **_transformers_encoder("vit.", _VIT_BLOCK),
    "decoder/embed": "decoder.decoder_embed",
    "decoder/mask_token": "decoder.mask_token",
    **_blocks("decoder/blocks", "decoder.decoder_layers.{}", _VIT_BLOCK),
    "decoder/norm": "decoder.decoder_norm",
    "decoder/pred": "decoder.decoder_pred",
}
DINOV2_TABLE = _transformers_encoder("", _DINOV2_BLOCK)
TIMM_TABLE: Table = {
    "encoder/cls_token": "cls_token",
    "encoder/patch_embed": "patch_embed.proj",
    **_blocks("encoder/blocks", "blocks.{}", _TIMM_BLOCK),
    "encoder/norm": "norm",
}
VIT_CLASSIFIER_TABLE: Table = {**_transformers_encoder("vit.", _VIT_BLOCK), "head": "classifier"}
DINOV2_CLASSIFIER_TABLE: Table = {**_transformers_encoder("dinov2.", _DINOV2_BLOCK), "head": "classifier"}
TIMM_CLASSIFIER_TABLE: Table = {**TIMM_TABLE, "head": "head"}


# ---- tensors that are not parameters of ours


def _encoder_positions(config: mae.MAEConfig) -> Float[np.ndarray, "1 tokens width"]:
    return vit.position_table(config.encoder.width, config.encoder.grid)[None]


def _no_layer_scale(config: mae.MAEConfig) -> Float[np.ndarray, " width"]:
    return np.ones(config.encoder.width, np.float32)


def _dinov2_constants(prefix: str = "") -> dict[str, Callable[[mae.MAEConfig], np.ndarray]]:
    return {
        f"{prefix}embeddings.position_embeddings": _encoder_positions,
        # Dinov2 replaces hidden patches with it before the encoder; a masked autoencoder drops them.
        f"{prefix}embeddings.mask_token": lambda config: np.zeros((1, config.encoder.width), np.float32),
        f"{prefix}encoder.layer.{{}}.layer_scale1.lambda1": _no_layer_scale,
        f"{prefix}encoder.layer.{{}}.layer_scale2.lambda1": _no_layer_scale,
    }


# ---- config.json


def _side(size: tuple[int, int]) -> int | list[int]:
    """One number for a square, which most readers expect."""
    return size[0] if size[0] == size[1] else list(size)


def _transformers_config(config: vit.ViTConfig) -> Json:
    # transformers 5 checks types strictly: sizes have to be int and rates float.
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": float(config.layer_norm_eps),
        "image_size": _side(config.image_size),
        "patch_size": _side(config.patch_size),
        "num_channels": config.channels,
        "qkv_bias": True,
        "dtype": "float32",
    }


def _vit_config(config: mae.MAEConfig, name: str = "ViTModel") -> Json:
    return {
        "architectures": [name],
        "model_type": "vit",
        **_transformers_config(config.encoder),
        "intermediate_size": config.encoder.mlp_width,
    }


def _vit_mae_config(config: mae.MAEConfig) -> Json:
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_transformers_config(config.encoder),
        "intermediate_size": config.encoder.mlp_width,
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": config.decoder_mlp_width,
        "mask_ratio": float(config.mask_ratio),
        "norm_pix_loss": config.norm_pix,
    }


def _dinov2_config(config: mae.MAEConfig, name: str = "Dinov2Model") -> Json:
    return {
        "architectures": [name],
        "model_type": "dinov2",
        **_transformers_config(config.encoder),
        "mlp_ratio": config.encoder.mlp_width // config.encoder.width,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "use_mask_token": True,
    }


def _timm_config(config: mae.MAEConfig) -> Json:
    """The form of timm's models on the Hugging Face hub: create_model calls `architecture` with `model_args`.

    The number of classes stands outside `model_args`: transformers' AutoModel passes its own beside them.
    """
    encoder = config.encoder
    ratio = encoder.mlp_width / encoder.width
    if int(encoder.width * ratio) != encoder.mlp_width:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    names = {192: "tiny_patch16", 384: "small_patch16", 1024: "large_patch16", 1280: "huge_patch14"}
    return {
        # Only a constructor's name: every size is in model_args.
        "architecture": f"vit_{names.get(encoder.width, 'base_patch16')}_224",
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token",
        "model_args": {
            "img_size": _side(encoder.image_size),
            "patch_size": _side(encoder.patch_size),
            "in_chans": encoder.channels,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": ratio,
            "act_layer": encoder.activation,  # timm has both names
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "input_size": [encoder.channels, *encoder.image_size],
            "fixed_input_size": True,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": None,  # otherwise older versions adapt the weights as if they had 3 channels
            "classifier": "head",
        },
    }


PROBLEM_TYPES = {
    "classes": "single_label_classification", "labels": "multi_label_classification", "value": "regression",
    "time": "regression",
}  # fmt: skip


def _with_head(content: Json, head: HeadConfig) -> Json:
    """config.json of a classifier: that of its encoder, and what its outputs are called."""
    if "architectures" not in content:  # timm's
        pool = {"cls": "token", "mean": "avg"}[head.pooling]
        # timm has no final norm before pooling and one after it, unless fc_norm is off.
        args = content["model_args"] | {"global_pool": pool, "fc_norm": False}
        given = content["pretrained_cfg"] | {"num_classes": head.outputs}
        return content | {
            "num_classes": head.outputs, "label_names": list(head.names), "global_pool": pool, "model_args": args,
            "pretrained_cfg": given,
        }  # fmt: skip
    return content | {
        "id2label": {str(number): name for number, name in enumerate(head.names)},
        "label2id": {name: number for number, name in enumerate(head.names)},
        "problem_type": PROBLEM_TYPES[head.target],
    }


# ---- what a layout cannot hold


def _square_obstacles(config: mae.MAEConfig, kind: str = "") -> list[str]:
    """`kind`: ending of the names of the layouts to use instead."""
    sizes = {"patches": config.encoder.patch_size, "images": config.encoder.image_size}
    return [
        f"takes square {what}, but this model's are {height}x{width} px; use --layout=vit{kind} or timm{kind}"
        for what, (height, width) in sizes.items()
        if height != width
    ]


def _vit_mae_obstacles(config: mae.MAEConfig) -> list[str]:
    obstacles = _square_obstacles(config)
    if config.norm_pix and config.norm_pix_eps != HF_NORM_PIX_EPS:
        obstacles.append(
            f"has a fixed norm_pix_eps of {HF_NORM_PIX_EPS:g}, but this model was trained with {config.norm_pix_eps:g}, so "
            "that its loss would differ; for the encoder alone use --layout=vit, dinov2 or timm"
        )
    return obstacles


def _dinov2_obstacles(config: mae.MAEConfig, kind: str = "") -> list[str]:
    obstacles, encoder = _square_obstacles(config, kind), config.encoder
    if encoder.mlp_width % encoder.width:
        obstacles.append(
            f"takes an MLP width that is a multiple of the width, but this model's are {encoder.mlp_width} and "
            f"{encoder.width}; use --layout=vit{kind}"
        )
    return obstacles


def _timm_obstacles(config: mae.MAEConfig, kind: str = "") -> list[str]:
    if config.encoder.layer_norm_eps == TIMM_LAYER_NORM_EPS:
        return []
    return [
        f"has a fixed layer_norm_eps of {TIMM_LAYER_NORM_EPS:g}, but this model was trained with "
        f"{config.encoder.layer_norm_eps:g}; use --layout=vit{kind}"
    ]


def evaluator_obstacle(config: mae.MAEConfig) -> str | None:
    """Why CuriaBench's official evaluator cannot score tasks with masks, and which image size it can; None where it can.

    It resizes masks to 512 px and pools them with a kernel and stride of 512 // grid, which does not give every grid.
    """
    patch, grid = config.encoder.patch_size[0], config.encoder.grid[0]

    def pooled(grid: int) -> int:
        kernel = EVALUATOR_MASK_SIDE // grid
        return EVALUATOR_MASK_SIDE // kernel if kernel else 0

    if pooled(grid) == grid:
        return None
    nearest = min((g for g in range(1, EVALUATOR_MASK_SIDE + 1) if pooled(g) == g), key=lambda g: (abs(g - grid), -g))
    return (
        f"CuriaBench's official evaluator cannot score tasks with masks on {grid}x{grid} patches: it pools masks of "
        f"{EVALUATOR_MASK_SIDE} px to {pooled(grid)}x{pooled(grid)}; try --image-size={nearest * patch}, {nearest}x{nearest} patches"
    )


# ---- layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensor names and config.json of one PyTorch class.

    Attributes:
      target: the class that loads it, as error messages name it.
      table: module or token of our tree -> name(s) in the layout.
      constants: name -> tensor that is computed, not trained; "{}" is the index of the block.
      config: content of config.json without our own key.
      obstacles: reasons why the class cannot hold a model; each continues the sentence "<target> …".
      poolings: of the heads that it holds; empty where it holds an encoder alone.
    """

    name: str
    target: str
    table: Table
    constants: Mapping[str, Callable[[mae.MAEConfig], np.ndarray]]
    config: Callable[[mae.MAEConfig], Json]
    obstacles: Callable[[mae.MAEConfig], list[str]]
    poolings: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Branches of our tree that the layout holds."""
        return tuple(
            part for part in ("encoder", "decoder", "head") if any(key.split("/")[0] == part for key in self.table)
        )

    @property
    def has_decoder(self) -> bool:
        return "decoder" in self.parts

    @property
    def has_head(self) -> bool:
        return "head" in self.parts

    @property
    def computes(self) -> tuple[str, ...]:
        """What its class returns, by the names of `checks.Results`."""
        return (
            "features",
            *(("prediction", "mask", "loss") if self.has_decoder else ()),
            *(("logits",) if self.has_head else ()),
        )

    @property
    def for_transformers(self) -> bool:
        return not self.name.startswith("timm")

    def check(
        self, config: mae.MAEConfig, head: HeadConfig | None = None, *, decoder: bool = True, region: bool = False
    ) -> None:
        """Raises UserError where the layout cannot hold the model.

        Args:
          head: of a fine-tuned run.
          decoder: the run has one; a fine-tuned one does not.
          region: the head pools the patches inside a mask.
        """
        obstacles = self.obstacles(config)
        if self.has_decoder and not decoder:
            obstacles.append(
                "has a decoder, which a fine-tuned run has not; use --layout=vit, or convert the run that it started from"
            )
        if self.has_head:
            obstacles += self._head_obstacles(head, region=region)
        if obstacles:
            raise UserError(f"--layout={self.name} cannot hold this model: {self.target} {'; it '.join(obstacles)}")

    def _head_obstacles(self, head: HeadConfig | None, *, region: bool) -> list[str]:
        """Why the class cannot hold a head."""
        if head is None:
            return [
                "has a head, which a pretrained run has not; use --layout=vit, dinov2 or timm, or fine-tune it first"
            ]
        encoder = "--layout=vit holds its encoder, and curia_jax.predict runs it as it is"
        if head.kind != "linear":
            return [f"has a linear head, but this run's is {head.kind}; {encoder}"]
        if region:
            return ["pools all patches, but this run's head those inside a mask; --layout=vit holds its encoder"]
        if head.pooling in self.poolings:
            return []
        others = ", ".join(name for name, layout in LAYOUTS.items() if head.pooling in layout.poolings)
        return [
            f"pools {' or '.join(self.poolings)}, but this run's head {head.pooling}; use --layout={others}, or fine-tune with "
            f"--config.finetune.pooling={self.poolings[0]}"
        ]

    def own_head(self, head: HeadConfig, params: Params) -> tuple[HeadConfig, Params]:
        """The linear head as the class computes it: in its own pooling, and a value in its own units.

        Args:
          params: kernel (features, outputs) and bias (outputs).
        """
        kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
        kernel, bias = kernel * head.scale, bias * head.scale + head.mean
        pooling = head.pooling
        if self.poolings[-1] == "cls_mean" != pooling:
            nothing, pooling = np.zeros_like(kernel), "cls_mean"
            kernel = np.concatenate([kernel, nothing] if head.pooling == "cls" else [nothing, kernel])
        own = dataclasses.replace(head, pooling=pooling, mean=0.0, scale=1.0)
        return own, {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    def content(self, config: mae.MAEConfig, head: HeadConfig | None = None) -> Json:
        """config.json without our own key; of a classifier with the head that it has after `own_head`."""
        content = self.config(config)
        return _with_head(content, head) if self.has_head and head is not None else content


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "vit_mae", "ViTMAEForPreTraining", VIT_MAE_TABLE,
            {
                "vit.embeddings.position_embeddings": _encoder_positions,
                "decoder.decoder_pos_embed": lambda config: vit.position_table(config.decoder_width, config.encoder.grid)[None],
            },
            _vit_mae_config, _vit_mae_obstacles,
        ),
        Layout(
            "vit", "ViTModel", VIT_TABLE, {"embeddings.position_embeddings": _encoder_positions},
            _vit_config, lambda config: [],
        ),
        Layout(
            "dinov2", "Dinov2Model", DINOV2_TABLE, _dinov2_constants(), _dinov2_config, _dinov2_obstacles,
        ),
        Layout(
            "timm", "timm's VisionTransformer", TIMM_TABLE, {"pos_embed": _encoder_positions},
            _timm_config, _timm_obstacles,
        ),
        Layout(
            "vit_classifier", "ViTForImageClassification", VIT_CLASSIFIER_TABLE,
            {"vit.embeddings.position_embeddings": _encoder_positions},
            lambda config: _vit_config(config, "ViTForImageClassification"), lambda config: [], ("cls",),
        ),
        Layout(
            "dinov2_classifier", "Dinov2ForImageClassification", DINOV2_CLASSIFIER_TABLE, _dinov2_constants("dinov2."),
            lambda config: _dinov2_config(config, "Dinov2ForImageClassification"),
            lambda config: _dinov2_obstacles(config, "_classifier"), ("cls", "mean", "cls_mean"),
        ),
        Layout(
            "timm_classifier", "timm's VisionTransformer", TIMM_CLASSIFIER_TABLE, {"pos_embed": _encoder_positions},
            _timm_config, lambda config: _timm_obstacles(config, "_classifier"), ("cls", "mean"),
        ),
    )
}  # fmt: skip


# ---- from a table to tensors

_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a layout and its source in our tree.

    Attributes:
      name: in the layout.
      path: of the leaf in our tree.
      block: index into the leaf's leading dimension, depth; None where blocks are not stacked.
      part, parts: index and number of the equal parts of the leaf's last dimension.
    """

    name: str
    path: tuple[str, ...]
    block: int | None
    part: int
    parts: int

    def read(self, params: Params, config: mae.MAEConfig) -> Float[np.ndarray, "..."]:
        """The tensor in the layout's form, float32 and C-contiguous.

        A `kernel` (in, out) becomes a weight (out, in); that of the patch embedding, whose inputs are row, column, channel of
        a patch, becomes the weight of a convolution (out, channel, row, column).
        """
        values: Any = params
        for key in self.path:
            values = values[key]
        values = np.asarray(values if self.block is None else values[self.block])
        values = np.split(values, self.parts, axis=-1)[self.part]
        if self.path[-2:] == ("patch_embed", "kernel"):
            values = values.reshape(*config.encoder.patch_size, config.encoder.channels, -1).transpose(3, 2, 0, 1)
        elif self.path[-1] == "kernel":
            values = values.T
        # safetensors writes a transposed view in memory order, without an error.
        return np.ascontiguousarray(values, np.float32)


def entries(layout: Layout, params: Params) -> list[Entry]:
    """The layout's tensors that come from parameters: each parameter exactly once.

    Args:
      params: the tree, or its shapes.

    Raises:
      ValueError: a parameter without a row in the table, or a row without a parameter.
    """
    found, used = [], set()
    branches = {part: params[part] for part in layout.parts}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(branches):
        path = tuple(str(key.key) for key in keys)
        module, suffix = ("/".join(path[:-1]), _LEAVES[path[-1]]) if path[-1] in _LEAVES else ("/".join(path), "")
        if module not in layout.table:
            raise ValueError(f"layout {layout.name} has no name for {module}")
        used.add(module)
        names = layout.table[module]
        names = (names,) if isinstance(names, str) else names
        for block in range(leaf.shape[0]) if "blocks" in path else (None,):
            for part, name in enumerate(names):
                found.append(Entry(name.format(block) + suffix, path, block, part, len(names)))
    if unused := sorted(set(layout.table) - used):
        raise ValueError(f"layout {layout.name} names {unused[0]}, which the model does not have")
    return found


def tensors(layout: Layout, config: mae.MAEConfig, params: Params) -> tuple[dict[str, Float[np.ndarray, "..."]], int]:
    """The content of model.safetensors, and the number of its values that are trained parameters."""
    trained = {entry.name: entry.read(params, config) for entry in entries(layout, params)}
    constants = {
        name.format(block): make(config)
        for name, make in layout.constants.items()
        for block in (range(config.encoder.depth) if "{}" in name else (None,))
    }
    return trained | constants, sum(values.size for values in trained.values())
