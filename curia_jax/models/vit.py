"""Vision transformer (Dosovitskiy et al. 2021) as the MAE reference builds it: pre-norm blocks, fixed 2-D positions.

NNX modules hold the parameters; around them everything is a nested dict of arrays and pure functions:

  params = vit.init(config, key)                  nested dict, float32
  tokens = vit.bind(config, params)(images)       pure in params and images

Blocks are stacked over depth in one set of arrays, so that one tree serves the scanned and the unrolled program.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from curia_jax.models import attention, ops
from curia_jax.models.params import Params, from_dict, to_dict

# Width, depth and heads; Ti, S: Touvron et al. 2021 (DeiT); B, L, H: Dosovitskiy et al. 2021.
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
CUSTOM = "custom"  # the size of a model whose width, depth and heads are given
ACTIVATIONS = {"gelu": False, "gelu_tanh": True}  # value of jax.nn.gelu's `approximate`
ATTENTION = {"xla": attention.xla_attention, "pallas": attention.pallas_attention}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What the backward pass may reuse instead of computing again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_only_these_names(ops.MATMUL),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides the shapes and the arithmetic of an encoder.

    Attributes:
      image_size, patch_size: (height, width) in px.
      mlp_width: hidden width of the MLP.
      activation: "gelu" (exact, erf) or "gelu_tanh".
      dtype: of matmuls and the residual stream; parameters, LayerNorm statistics and softmax are float32.
      attention: a key of ATTENTION: "xla" for any device, "pallas" for TPUs and NVIDIA GPUs.
      remat: a key of REMAT.
      unroll: blocks per iteration of the scan over depth; `depth` leaves no loop.

    Raises:
      ValueError: sizes that do not fit together, or an unknown name.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    dtype: str
    attention: str
    remat: str
    unroll: int

    def __post_init__(self) -> None:
        counts = {"channels": self.channels, "width": self.width, "depth": self.depth, "heads": self.heads}
        sizes = {"image_size": min(self.image_size), "patch_size": min(self.patch_size), "mlp_width": self.mlp_width}
        for name, value in {**counts, **sizes}.items():
            if value < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        if any(n % p for n, p in zip(self.image_size, self.patch_size, strict=True)):
            # Halves round down: (n - 1) / p is less than its nearest integer plus a half.
            sides = zip(self.image_size, self.patch_size, strict=True)
            nearest = tuple(max(1, round((n - 0.5) / p)) * p for n, p in sides)
            raise ValueError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}; "
                f"nearest that is: {nearest}"
            )
        check_width("width", self.width, "heads", self.heads)
        known: dict[str, Collection[str]] = {
            "activation": ACTIVATIONS, "dtype": DTYPES, "attention": ATTENTION, "remat": REMAT
        }  # fmt: skip
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it may be {', '.join(names)}")
        if not 1 <= self.unroll <= self.depth or self.depth % self.unroll:
            good = ", ".join(str(n) for n in range(1, min(self.depth, 1000) + 1) if self.depth % n == 0)
            raise ValueError(f"unroll {self.unroll} does not divide the depth {self.depth}; it may be {good}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Values in a patch: height x width x channels."""
        return self.patch_size[0] * self.patch_size[1] * self.channels

    def describe(self) -> str:
        """What the model is, by its dimensions: "ViT-B/16", or "ViT/8 (width 128, depth 6, heads 4)" if it has no name."""
        height, width = self.patch_size
        patch = f"{height}" if height == width else f"{height}x{width}"
        for name, dimensions in SIZES.items():
            if (self.width, self.depth, self.heads) == dimensions and self.mlp_width == 4 * self.width:
                return f"ViT-{name}/{patch}"
        mlp = "" if self.mlp_width == 4 * self.width else f", MLP width {self.mlp_width}"
        return f"ViT/{patch} (width {self.width}, depth {self.depth}, heads {self.heads}{mlp})"


def check_width(name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises ValueError unless `heads` divides `width`, and 4, which sin-cos positions need, does too."""
    if width % heads or width % 4:
        good = width + next(n for n in range(1, 4 * heads + 1) if not (width + n) % heads and not (width + n) % 4)
        raise ValueError(
            f"{name} {width} has to be a multiple of 4 and of {heads_name} ({heads}); the next that is: {good}"
        )


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A side of a square, or (height, width).

    Raises:
      ValueError: another number of sides than two.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"a size is a side of a square or (height, width), not {sides}")
    return int(sides[0]), int(sides[1])


def config(
    size: str = "B",
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | Sequence[int] = 16,
    channels: int = 1,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_width: int | None = None,
    activation: str = "gelu",
    layer_norm_eps: float = 1e-6,
    dtype: str = "bfloat16",
    attention: str = "xla",
    remat: str = "none",
    unroll: int = 1,
) -> ViTConfig:
    """A model of a named size, or of size "custom" with its own width, depth and heads; see ViTConfig.

    Args:
      width, depth, heads: those of the named size unless given.
      mlp_width: 4 x width unless given.

    Raises:
      ValueError: an unknown size, a custom one without dimensions, or what ViTConfig raises.
    """
    if size not in (*SIZES, CUSTOM):
        raise ValueError(f"size is {size!r}; it may be {', '.join((*SIZES, CUSTOM))}")
    named = SIZES.get(size, (None, None, None))
    width, depth, heads = (
        default if own is None else own for own, default in zip((width, depth, heads), named, strict=True)
    )
    if width is None or depth is None or heads is None:
        raise ValueError(f"a model of size {CUSTOM!r} needs width, depth and heads")
    return ViTConfig(
        image_size=pair(image_size), patch_size=pair(patch_size), channels=channels,
        width=width, depth=depth, heads=heads, mlp_width=4 * width if mlp_width is None else mlp_width,
        activation=activation, layer_norm_eps=layer_norm_eps, dtype=dtype, attention=attention, remat=remat, unroll=unroll,
    )  # fmt: skip


# ---- parts


class Adapter(nnx.Module):
    """What LoRA adds to a linear layer: scale x a b, with `a` (inputs, rank) and `b` (rank, outputs); see lora.py."""

    def __init__(
        self, a: Shaped[Array, "*depth inputs rank"], b: Shaped[Array, "*depth rank outputs"], scale: float
    ) -> None:
        self.a, self.b, self.scale = nnx.Param(a), nnx.Param(b), scale

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return ops.matmul(ops.matmul(x, self.a[...]), self.b[...]) * self.scale


class Linear(nnx.Module):
    """y = x kernel + bias; xavier-uniform kernel, zero bias. An adapter is set by `lora.attach`."""

    adapter: Adapter | None = None

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = ops.linear(x, self.kernel[...], self.bias[...])
        return y if self.adapter is None else y + self.adapter(x)


class LayerNorm(nnx.Module):
    """See `ops.layer_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return ops.layer_norm(x, self.scale[...], self.bias[...], self.eps)


class Attention(nnx.Module):
    """Multi-head self-attention. The fused projection's columns are [q | k | v], heads in order within each.

    The reference draws xavier-uniform over the fused (width, 3 width) matrix; three separate matrices would be sqrt(2) too
    large.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "batch tokens width"], kind: str = "xla", segments: int = 1
    ) -> Float[Array, "batch tokens width"]:
        qkv = ops.matmul(x, self.qkv.kernel[...])  # its bias is added where heads are separated
        if self.qkv.adapter is not None:
            qkv = qkv + self.qkv.adapter(x)
        return self.proj(ATTENTION[kind](qkv, self.qkv.bias[...], self.heads, segments))


class MLP(nnx.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)
        self.approximate = ACTIVATIONS[activation]

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        fc1, fc2 = self.fc1, self.fc2
        if fc1.adapter is not None or fc2.adapter is not None:
            return fc2(ops.gelu(fc1(x), self.approximate))
        return ops.mlp(x, fc1.kernel[...], fc1.bias[...], fc2.kernel[...], fc2.bias[...], self.approximate)


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width, activation, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        kind: str = "xla",
        segments: int = 1,
        kept: Float[Array, "2 batch tokens_or_1 1"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """`kept` multiplies the two branches, see `drop_path`."""
        with jax.named_scope("attention"):
            x = x + _scaled(self.attn(self.norm1(x), kind, segments), None if kept is None else kept[0])
        with jax.named_scope("mlp"):
            return x + _scaled(self.mlp(self.norm2(x)), None if kept is None else kept[1])


def _scaled(x: Float[Array, "batch tokens width"], by: Float[Array, "batch tokens_or_1 1"] | None) -> Array:
    return x if by is None else (x.astype(jnp.float32) * by).astype(x.dtype)


def drop_path(draws: Float[Array, "batch depth 2"], rate: int | float) -> Float[Array, "batch depth 2"]:
    """What multiplies the two branches of each block and image under stochastic depth (Huang et al. 2016): 0 where it is dropped,
    else 1 / (1 - rate of the block), which keeps the mean. The rate goes linearly from 0 to that of the last block, as in timm.

    Args:
      draws: uniform on [0, 1).
      rate: of the last block, below 1.
    """
    rates = jnp.linspace(0.0, rate, draws.shape[1])[:, None]
    return (draws >= rates) / (1 - rates)


def stacked_blocks(
    depth: int, width: int, heads: int, mlp_width: int, activation: str, eps: float, *, rngs: nnx.Rngs
) -> Block:
    """`depth` blocks as one whose arrays have a leading dimension of `depth`."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(width, heads, mlp_width, activation, eps, rngs=rngs)

    return make(rngs)


def apply_blocks(
    blocks: Block,
    x: Float[Array, "batch tokens width"],
    config: ViTConfig,
    *,
    unroll: int,
    keep: Sequence[int] = (),
    kept: Float[Array, "batch depth 2"] | None = None,
) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "batch tokens width"]]]:
    """Runs stacked blocks one after the other.

    Args:
      config: its `attention` and `remat` apply.
      unroll: blocks per iteration; the whole depth leaves no loop.
      keep: numbers of the blocks (from 0) whose outputs are returned too.
      kept: what multiplies the branches, see `drop_path`.

    Returns:
      The last output, and those of `keep` in its order.
    """
    graph, stack = nnx.split(blocks)
    packed, segments = ops.pack_images(x) if config.attention == "pallas" else (x, 1)

    def block(x: Array, of_block: Any) -> Array:
        weights, kept = of_block
        return nnx.merge(graph, weights)(x, config.attention, segments, kept)

    if REMAT[config.remat] is not None:
        depth = stack.norm1.scale[...].shape[0]
        block = jax.checkpoint(block, policy=REMAT[config.remat], prevent_cse=unroll == depth)
    if kept is not None:
        by_row = jnp.moveaxis(kept, 0, 2).reshape(*kept.shape[1:], len(packed), segments, 1)
        # One number an image is broadcast where it is used; of several images in a row, each token needs its own.
        kept = by_row if segments == 1 else jnp.repeat(by_row, x.shape[1], axis=3)
    packed, outputs = ops.over_layers(block, packed, (stack, kept), unroll=unroll, keep=keep)
    return packed.reshape(x.shape), [one.reshape(x.shape) for one in outputs]


def position_table(width: int, grid: tuple[int, int]) -> Float[np.ndarray, "tokens width"]:
    """2-D sin-cos positions of facebookresearch/mae, a row of zeros for CLS first; computed in float64.

    The first half of the channels is a function of the column, the second of the row; in each half all sines come
    before all cosines, with frequencies 10000^(-4 i / width), i = 0 … width / 4 - 1.
    """
    frequency = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = (axis.reshape(-1, 1) * frequency for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def patchify(
    images: Float[Array, "batch rows columns channels"], patch_size: tuple[int, int]
) -> Float[Array, "batch patches values"]:
    """Patches row by row; within a patch row, column, channel (channel last)."""
    batch, height, width, channels = images.shape
    ph, pw = patch_size
    x = images.reshape(batch, height // ph, ph, width // pw, pw, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, ph * pw * channels)


def unpatchify(
    patches: Float[Array, "batch patches values"], config: ViTConfig
) -> Float[Array, "batch rows columns channels"]:
    """The inverse of `patchify`."""
    (rows, columns), (ph, pw) = config.grid, config.patch_size
    x = patches.reshape(patches.shape[0], rows, columns, ph, pw, config.channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape[0], *config.image_size, config.channels)


# ---- the model


class ViT(nnx.Module):
    """Images to tokens.

    Parameters: patch_embed (patch values, width), cls_token (1, 1, width), blocks (stacked over depth), norm.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch_embed = Linear(config.patch_values, config.width, rngs=rngs)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, config.width), jnp.float32))
        self.blocks = stacked_blocks(
            config.depth, config.width, config.heads, config.mlp_width,
            config.activation, config.layer_norm_eps, rngs=rngs,
        )  # fmt: skip
        self.norm = LayerNorm(config.width, config.layer_norm_eps)

    def embed(
        self,
        images: Float[Array, "batch rows columns channels"],
        chosen: Shaped[Array, "batch visible patches"] | None = None,
    ) -> Float[Array, "batch visible_or_patches width"]:
        """Patch embeddings with their positions, without CLS.

        Args:
          chosen: patches to embed, as `ops.selection` gives them; all in their order unless given.
        """
        config = self.config
        if images.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(f"images are {images.shape[1:]}, the model takes {(*config.image_size, config.channels)}")
        with jax.named_scope("patch_embed"):
            dtype = DTYPES[config.dtype]
            patches = patchify(images, config.patch_size).astype(dtype)
            positions = jnp.asarray(position_table(config.width, config.grid)[1:], dtype)
            if chosen is not None:
                patches, positions = ops.select(chosen, patches), ops.select(chosen, positions)
            return self.patch_embed(patches) + positions

    def encode(
        self,
        x: Float[Array, "batch patches width"],
        layers: Sequence[int] = (),
        kept: Float[Array, "batch depth 2"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "batch tokens width"]]]:
        """CLS before the given patch embeddings, all blocks, the final norm.

        Args:
          layers: blocks (from 0; negative ones count from the end) whose outputs, before any norm, are returned too.
          kept: what multiplies the branches of the blocks, see `drop_path`.
        """
        config = self.config
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, config.width))
        x = jnp.concatenate([cls, x], axis=1)  # the position of CLS is zero
        keep = [range(config.depth)[layer] for layer in layers]
        x, hidden = apply_blocks(self.blocks, x, config, unroll=config.unroll, keep=keep, kept=kept)
        with jax.named_scope("norm"):
            return self.norm(x), hidden

    def __call__(
        self, images: Float[Array, "batch rows columns channels"], kept: Float[Array, "batch depth 2"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Normalised images to tokens after the final norm, CLS first; `kept` is of `drop_path`."""
        with jax.named_scope("encoder"):
            return self.encode(self.embed(images), kept=kept)[0]


def init(config: ViTConfig, key: Key[Array, ""]) -> Params:
    """New parameters as a nested dict of float32 arrays."""
    return to_dict(ViT(config, rngs=nnx.Rngs(params=key)))


def bind(config: ViTConfig, params: Params) -> ViT:
    """The encoder with the given parameters.

    Raises:
      ValueError: the parameters belong to an encoder of another shape; the first tensors that differ are named.
    """
    return from_dict(lambda: ViT(config, rngs=nnx.Rngs(params=0)), params)


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """FLOPs of the matmuls of one block on one image: 2 tokens width (4 width + 2 mlp_width + 2 tokens)."""
    return 2 * tokens * width * (4 * width + 2 * mlp_width + 2 * tokens)


def flops(config: ViTConfig, patches: int | None = None) -> int:
    """FLOPs of the matmuls of one forward pass on one image; a multiply-add counts as two.

    Args:
      patches: patches that are embedded and pass the blocks; all of them unless given.
    """
    patches = config.patches if patches is None else patches
    embed = 2 * patches * config.patch_values * config.width
    return embed + config.depth * block_flops(1 + patches, config.width, config.mlp_width)
