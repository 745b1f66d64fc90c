"""Vision transformer (Dosovitskiy et al. 2021) as the MAE reference builds it: pre-norm blocks, fixed 2-D positions.

NNX modules hold the parameters; around them everything is a nested dict of arrays and pure functions:

  params = vit.init(config, key)                  nested dict, float32
  tokens = vit.bind(config, params)(images)       pure in params and images

Blocks are stacked over depth in one set of arrays, so that one tree serves the scanned and the unrolled program.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from curia_jax.models import attention

# Width, depth and heads; Ti, S: Touvron et al. 2021 (DeiT); B, L, H: Dosovitskiy et al. 2021.
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}

PRODUCT = "product"  # what `product` and `linear` return, for the policies below: they see no products inside them
# What the backward pass may reuse instead of computing again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
ACTIVATIONS = {"gelu": False, "gelu_tanh": True}  # value of jax.nn.gelu's `approximate`
ATTENTION = {"xla": attention.by_compiler, "kernel": attention.by_kernel}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides the shapes and the arithmetic of an encoder.

    Attributes:
      image_size, patch_size: (height, width) in px.
      mlp_width: hidden width of the MLP.
      activation: "gelu" (exact, erf) or "gelu_tanh".
      dtype: of matrix products and the residual stream; parameters, LayerNorm statistics and softmax are float32.
      attention: a key of ATTENTION: "xla" for any device, "kernel" for TPUs and NVIDIA GPUs.
      remat: a key of REMAT.
      unroll: blocks per iteration of the scan over depth; `depth` leaves no loop.

    Raises:
      ValueError: sizes that do not fit together, or a name that does not exist.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        counts = {"channels": self.channels, "width": self.width, "depth": self.depth, "heads": self.heads}
        sizes = {"image_size": min(self.image_size), "patch_size": min(self.patch_size), "mlp_width": self.mlp_width}
        for name, value in {**counts, **sizes}.items():
            if value < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        if any(n % p for n, p in zip(self.image_size, self.patch_size, strict=True)):
            # Halves go down: (n - 1) / p is less than its nearest integer plus a half.
            sides = zip(self.image_size, self.patch_size, strict=True)
            nearest = tuple(max(1, round((n - 0.5) / p)) * p for n, p in sides)
            raise ValueError(
                f"image size {self.image_size} is no multiple of the patch size {self.patch_size}; "
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
            good = ", ".join(str(n) for n in range(1, self.depth + 1) if self.depth % n == 0)
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


def check_width(name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises ValueError unless `heads` divides `width`, and 4, which sin-cos positions need, does too."""
    if width % heads or width % 4:
        good = width + next(n for n in range(1, 4 * heads + 1) if not (width + n) % heads and not (width + n) % 4)
        raise ValueError(
            f"{name} {width} has to be a multiple of 4 and of {heads_name} ({heads}); the next that is: {good}"
        )


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A side of a square, or (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def config(
    size: str = "B",
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | Sequence[int] = 16,
    channels: int = 1,
    **fields: Any,
) -> ViTConfig:
    """A named size, any field of ViTConfig changed by name; `mlp_width` is 4 x width unless given.

    Raises:
      ValueError: an unknown size, or what ViTConfig raises.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; it may be {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    fields = {"width": width, "depth": depth, "heads": heads, **fields}
    fields.setdefault("mlp_width", 4 * fields["width"])
    return ViTConfig(image_size=pair(image_size), patch_size=pair(patch_size), channels=channels, **fields)


# ---- arithmetic with derivatives of its own
#
# Derived automatically, these keep float32 copies of what they pass through, and the reductions of a backward pass are
# programs of their own. Each of these keeps its input, in its own type, and computes the rest again.
# Kernels' gradients are float32 after a sum in float32, rounded once to the type of the product, in which they travel.

# Of the host too: a checkpoint comes in NumPy arrays.
Weights = Array | np.ndarray


def _gathered(kernel: Float[Weights, "inputs outputs"], dtype: Any) -> Float[Array, "inputs outputs"]:
    """A kernel in the type of its product, whole on every device, in which form it travels.

    Left alone, the partitioner may split the product over the dimension in which the kernel is split, and move the
    activations of the whole batch twice a layer.
    """
    kernel = jnp.asarray(kernel, dtype)
    if not attention.mesh_axes():
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec())


def _sum_rows(x: Float[Array, "*rows width"]) -> Float[Array, " width"]:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def _kernel_gradient(
    x: Float[Array, "*rows inputs"], g: Float[Array, "*rows outputs"]
) -> Float[Array, "inputs outputs"]:
    rows = tuple(range(x.ndim - 1))

    def sum_of_products(x: Array, g: Array) -> Array:
        return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))

    def transposed(x: Array, g: Array) -> Array:
        return jax.lax.optimization_barrier(sum_of_products(g, x)).T

    if g.shape[-1] < x.shape[-1]:
        # XLA on a CPU transposes the first factor, and computes what it is made of, a GELU say, in that order, one value at
        # a time. The narrower is made of less.
        return jax.lax.platform_dependent(x, g, cpu=transposed, default=sum_of_products).astype(jnp.float32)
    return sum_of_products(x, g).astype(jnp.float32)


def product(x: Float[Array, "*rows inputs"], kernel: Float[Weights, "inputs outputs"]) -> Float[Array, "*rows outputs"]:
    """x kernel in the type of x. Activations stay where they are; a kernel that is split over devices is gathered, in the
    backward pass anew."""
    return checkpoint_name(_product(x, kernel), PRODUCT)


@jax.custom_vjp
def _product(x: Array, kernel: Weights) -> Array:
    return x @ _gathered(kernel, x.dtype)


def _product_backward(kept: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return g @ _gathered(kernel, x.dtype).T, _kernel_gradient(x, g)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def linear(
    x: Float[Array, "*rows inputs"], kernel: Float[Weights, "inputs outputs"], bias: Float[Weights, " outputs"]
) -> Float[Array, "*rows outputs"]:
    """x kernel + bias in the type of x; the kernel as in `product`."""
    return checkpoint_name(_linear(x, kernel, bias), PRODUCT)


@jax.custom_vjp
def _linear(x: Array, kernel: Weights, bias: Weights) -> Array:
    return x @ _gathered(kernel, x.dtype) + bias.astype(x.dtype)


def _linear_backward(kept: Any, g: Array) -> tuple[Array, Array, Array]:
    return *_product_backward(kept, g), _sum_rows(g)


_linear.defvjp(lambda x, kernel, bias: (_linear(x, kernel, bias), (x, kernel)), _linear_backward)


def gelu(x: Float[Array, "*rows width"], approximate: bool) -> Float[Array, "*rows width"]:
    """x Phi(x), or with tanh in place of the error function (Hendrycks and Gimpel 2016); computed in float32."""
    if approximate and x.dtype == jnp.bfloat16 and attention.on_nvidia():
        # In this form XLA knows it and leaves it to cuBLAS, which computes it in float32 as it writes the product.
        return jax.nn.gelu(x, approximate=True)
    y = x.astype(jnp.float32)
    return (jax.nn.gelu(y, approximate=True) if approximate else 0.5 * y * _twice_phi(y)).astype(x.dtype)


def gelu_slope(x: Float[Array, "*rows width"], approximate: bool) -> Float[Array, "*rows width"]:
    """Derivative of `gelu`, float32."""
    x = x.astype(jnp.float32)
    if approximate:
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        t = jnp.tanh(scale * x * (1 + cubic * square))
        return 0.5 * (1 + t) + 0.5 * scale * x * (1 - t * t) * (1 + 3 * cubic * square)
    return 0.5 * _twice_phi(x) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _twice_phi(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """erfc(-x / sqrt 2), which keeps small results exact; on a CPU, where that takes XLA more than twice as long, 1 + erf(x /
    sqrt 2), as PyTorch computes it."""
    scale = math.sqrt(0.5)
    return jax.lax.platform_dependent(
        x, cpu=lambda x: 1 + jax.lax.erf(x * scale), default=lambda x: jax.lax.erfc(-x * scale)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def mlp(
    x: Float[Array, "*rows inputs"],
    kernel1: Float[Weights, "inputs hidden"],
    bias1: Float[Weights, " hidden"],
    kernel2: Float[Weights, "hidden outputs"],
    bias2: Float[Weights, " outputs"],
    approximate: bool,
) -> Float[Array, "*rows outputs"]:
    """gelu(x kernel1 + bias1) kernel2 + bias2. Kept for the backward pass: x and what goes into the gelu."""
    return linear(gelu(linear(x, kernel1, bias1), approximate), kernel2, bias2)


def _mlp_forward(
    x: Array, kernel1: Weights, bias1: Weights, kernel2: Weights, bias2: Weights, approximate: bool
) -> tuple[Array, Any]:
    hidden = linear(x, kernel1, bias1)
    return linear(gelu(hidden, approximate), kernel2, bias2), (x, kernel1, hidden, kernel2)


def _mlp_backward(approximate: bool, kept: Any, g: Array) -> tuple[Array, ...]:
    x, kernel1, hidden, kernel2 = kept
    slope = gelu_slope(hidden, approximate)
    dhidden = ((g @ _gathered(kernel2, x.dtype).T).astype(jnp.float32) * slope).astype(x.dtype)
    return (
        dhidden @ _gathered(kernel1, x.dtype).T, _kernel_gradient(x, dhidden), _sum_rows(dhidden),
        _kernel_gradient(gelu(hidden, approximate), g), _sum_rows(g),
    )  # fmt: skip


mlp.defvjp(_mlp_forward, _mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rows width"], scale: Float[Weights, " width"], bias: Float[Weights, " width"], eps: float
) -> Float[Array, "*rows width"]:
    """Statistics in float32, by the two-pass variance; the result has the type of the input."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: Array, scale: Weights, bias: Weights, eps: float) -> tuple[Array, Any]:
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    y = y - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * inverse * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(eps: float, kept: Any, g: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = kept

    def wide(x: Array, mean: Array, inverse: Array, g: Array) -> tuple[Array, Array]:
        return (x.astype(jnp.float32) - mean) * inverse, g.astype(jnp.float32)

    normed, g_wide = wide(x, mean, inverse, g)
    h = g_wide * scale
    h = h - jnp.mean(h, axis=-1, keepdims=True) - normed * jnp.mean(h * normed, axis=-1, keepdims=True)
    dx = (inverse * h).astype(x.dtype)
    if attention.on_nvidia():
        # XLA cannot sum rows and columns in one pass there. It would store the float32 products of the first for the second;
        # to read x and g again moves a third of that.
        normed, g_wide = wide(*jax.lax.optimization_barrier((x, mean, inverse, g)))
    return dx, _sum_rows(g_wide * normed), _sum_rows(g_wide)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


# ---- parameters


class Linear(nnx.Module):
    """y = x kernel + bias; xavier-uniform kernel, zero bias."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return linear(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """See `layer_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class Attention(nnx.Module):
    """Multi-head self-attention. The fused kernel's columns are [q | k | v], heads in order within each.

    xavier-uniform over the fused (width, 3 width) matrix is what the reference draws; three separate matrices would be
    sqrt(2) too large.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "batch tokens width"], kind: str = "xla", segments: int = 1
    ) -> Float[Array, "batch tokens width"]:
        # Without its bias, which is added, and whose gradient is summed up, where the heads are taken apart.
        qkv = product(x, self.qkv.kernel[...])
        return self.proj(ATTENTION[kind](qkv, self.qkv.bias[...], self.heads, segments))


class MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)
        self.approximate = ACTIVATIONS[activation]

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        fc1, fc2 = self.fc1, self.fc2
        return mlp(x, fc1.kernel[...], fc1.bias[...], fc2.kernel[...], fc2.bias[...], self.approximate)


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width, activation, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], kind: str = "xla", segments: int = 1
    ) -> Float[Array, "batch tokens width"]:
        with jax.named_scope("attention"):
            x = x + self.attn(self.norm1(x), kind, segments)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))


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
    blocks: Block, x: Float[Array, "batch tokens width"], config: ViTConfig, *, unroll: int, keep: Sequence[int] = ()
) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "batch tokens width"]]]:
    """Runs stacked blocks one after the other.

    Args:
      config: its `attention` and `remat` apply.
      unroll: blocks per iteration; the whole depth leaves no loop.
      keep: numbers of the blocks (from 0) whose outputs are wanted too.

    Returns:
      The last output, and the wanted ones in the order of `keep`.
    """
    graph, stack = nnx.split(blocks)
    depth = jax.tree.leaves(stack)[0].shape[0]
    shape = x.shape
    segments = _images_together(shape[0], shape[1]) if config.attention == "kernel" else 1
    x = x.reshape(shape[0] // segments, segments * shape[1], shape[2])

    def run(x: Array, params: Any) -> Array:
        return nnx.merge(graph, params)(x, config.attention, segments)

    if REMAT[config.remat] is not None:
        run = jax.checkpoint(run, policy=REMAT[config.remat], prevent_cse=unroll == depth)

    if unroll == depth or keep:
        # lax.split, unlike indexing, has a concatenation as its transpose: gradients are stacked in one pass.
        leaves, tree = jax.tree.flatten(stack)
        parts = zip(*(jax.lax.split(leaf, [1] * depth) for leaf in leaves), strict=True)
        outputs = []
        for layer in parts:
            x = run(x, jax.tree.unflatten(tree, [leaf[0] for leaf in layer]))
            outputs.append(x)
        return x.reshape(shape), [outputs[number].reshape(shape) for number in keep]
    x, _ = jax.lax.scan(lambda x, params: (run(x, params), None), x, stack, unroll=unroll)
    return x.reshape(shape), []


def _images_together(batch: int, tokens: int) -> int:
    """Images that go through the blocks as one, so that their tokens fill tiles of 8 rows: 4 of 50 tokens.

    1 where they do not divide a device's share of the batch, or where attention over all of them would cost more than the
    rows that are saved.
    """
    if attention.on_nvidia():
        return 1  # it has no such tiles
    images = 8 // math.gcd(8, tokens)
    share = batch // math.prod(attention.mesh_axes().values())
    return images if images * tokens <= 512 and share % images == 0 else 1


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


def exact(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Precision at which a product with ones and zeros only moves values of this type, on any device."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def unpatchify(
    patches: Float[Array, "batch patches values"], config: ViTConfig
) -> Float[Array, "batch rows columns channels"]:
    """The inverse of `patchify`."""
    (rows, columns), (ph, pw) = config.grid, config.patch_size
    x = patches.reshape(patches.shape[0], rows, columns, ph, pw, config.channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape[0], *config.image_size, config.channels)


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
        chosen: Float[Array, "batch visible patches"] | None = None,
    ) -> Float[Array, "batch visible_or_patches width"]:
        """Patch embeddings with their positions, without CLS.

        Args:
          chosen: rows of zeros with a single 1, at the patch that is wanted; every patch, in its order, unless given.
        """
        config = self.config
        if images.shape[1:] != (*config.image_size, config.channels):
            raise ValueError(f"images are {images.shape[1:]}, the model takes {(*config.image_size, config.channels)}")
        with jax.named_scope("patch_embed"):
            dtype = DTYPES[config.dtype]
            patches = patchify(images, config.patch_size).astype(dtype)
            positions = position_table(config.width, config.grid)[1:].astype(dtype)
            if chosen is not None:
                patches = jnp.einsum("bvp,bpx->bvx", chosen, patches, precision=exact(dtype))
                positions = jnp.einsum("bvp,pw->bvw", chosen, positions, precision=exact(dtype))
            return self.patch_embed(patches) + positions

    def encode(
        self, x: Float[Array, "batch patches width"], layers: Sequence[int] = ()
    ) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "batch tokens width"]]]:
        """CLS before the given patch embeddings, all blocks, the final norm.

        Args:
          layers: blocks (from 0; negative ones count from the end) whose outputs, before any norm, are wanted too.
        """
        config = self.config
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, config.width))
        x = jnp.concatenate([cls, x], axis=1)  # the position of CLS is zero
        keep = [range(config.depth)[layer] for layer in layers]
        x, hidden = apply_blocks(self.blocks, x, config, unroll=config.unroll, keep=keep)
        with jax.named_scope("norm"):
            return self.norm(x), hidden

    def __call__(self, images: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch tokens width"]:
        """Normalised images to tokens after the final norm, CLS first."""
        with jax.named_scope("encoder"):
            return self.encode(self.embed(images))[0]


def init(config: ViTConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New parameters as a nested dict of float32 arrays."""
    return to_dict(ViT(config, rngs=nnx.Rngs(params=key)))


def bind(config: ViTConfig, params: Mapping[str, Any]) -> ViT:
    """The encoder with the given parameters.

    Raises:
      ValueError: the parameters belong to an encoder of another shape; the first tensors that differ are named.
    """
    return from_dict(lambda: ViT(config, rngs=nnx.Rngs(params=0)), params)


Module = TypeVar("Module", bound=nnx.Module)


def to_dict(module: nnx.Module) -> dict[str, Any]:
    """Parameters of a module as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def from_dict(make: Callable[[], Module], params: Mapping[str, Any]) -> Module:
    """The module that `make()` builds, with `params` in place of its own; nothing is computed for its own.

    Raises:
      ValueError: the trees or shapes differ.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    wanted = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))
    found = jax.tree.map(jnp.shape, params)
    if wanted != found:
        raise ValueError(f"parameters do not fit the model: {_difference(wanted, found)}")
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    a, b = flat(wanted), flat(found)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    lines = [f"{name} is {b.get(name, 'missing')}, wanted {a.get(name, 'nothing')}" for name in names]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """FLOPs of the matrix products of one block on one image: 2 tokens width (4 width + 2 mlp_width + 2 tokens)."""
    return 2 * tokens * width * (4 * width + 2 * mlp_width + 2 * tokens)


def flops(config: ViTConfig, patches: int | None = None) -> int:
    """FLOPs of the matrix products of one forward pass on one image; a multiply-add counts as two.

    Args:
      patches: patches that are embedded and pass the blocks; all of them unless given.
    """
    patches = config.patches if patches is None else patches
    embed = 2 * patches * config.patch_values * config.width
    return embed + config.depth * block_flops(1 + patches, config.width, config.mlp_width)
