"""Arithmetic that XLA needs help with, so that vit.py and mae.py can be read without knowing the compiler.

Differentiated automatically, matmuls, GELU and LayerNorm would keep float32 copies of their inputs, and each reduction of the
backward pass would be a program of its own. The functions with derivatives of their own keep their input, in its own type, and
compute the rest again. Gradients of weights are summed in float32 and rounded once to the type of the matmul, the type in which
they travel between devices.

Models do not depend on meshes or platforms. These functions ask for what they need: the mesh of `jax.set_mesh` in
`replicated`, `on_each_device` and `pack_images`; NVIDIA GPUs in `on_nvidia`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

# NumPy arrays too: those of a checkpoint.
Weights = Array | np.ndarray
Function = TypeVar("Function", bound=Callable[..., Any])

MATMUL = "matmul"  # checkpoint_name of what `matmul` and `linear` return; rematerialisation policies see no matmul inside them


# ---- devices


def on_nvidia() -> bool:
    """Whether JAX runs on NVIDIA GPUs. Decided when a program is traced: JAX refuses to trace cuDNN attention elsewhere."""
    return jax.default_backend() == "gpu" and jax.local_devices()[0].device_kind.startswith("NVIDIA")


def _mesh_axes() -> dict[str, int]:
    """Sizes of the mesh axes over which the compiler is to split the program being traced: those of jax.set_mesh without the
    ones that an enclosing shard_map has split already. Empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def replicated(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x, whole on every device of the mesh."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _mesh_axes() else x


def on_each_device(function: Function, split: int) -> Function:
    """`function` run by each device on its part of the batch, for Pallas kernels, which the compiler cannot split.

    Args:
      function: of `split` arrays with the batch first and one more that every device has whole; returns arrays with the batch
        first.
    """
    axes = tuple(_mesh_axes())
    if not axes:
        return function
    specs = (*[PartitionSpec(axes)] * split, PartitionSpec())
    return jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(axes), axis_names=set(axes), check_vma=False)


# ---- layers


def pack_images(x: Float[Array, "batch tokens width"]) -> tuple[Float[Array, "rows packed_tokens width"], int]:
    """Joins the tokens of several images in one row of the batch so that they fill tiles of 8 rows: 4 x 50 tokens do, 50 do not.

    Returns:
      The packed tokens, and how many images a row holds: 1 on NVIDIA GPUs, which have no such tiles, where the images do not
      divide a device's share of the batch, or where attention over the joined tokens would cost more than the padding saved.
    """
    batch, tokens, width = x.shape
    images = 8 // math.gcd(8, tokens)
    share = batch // math.prod(_mesh_axes().values())
    if on_nvidia() or images * tokens > 512 or share % images:
        images = 1
    return x.reshape(batch // images, images * tokens, width), images


def over_layers(
    layer: Callable[[Array, PyTree], Array],
    x: Float[Array, "batch tokens width"],
    params: PyTree,
    *,
    unroll: int,
    keep: Sequence[int] = (),
) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "batch tokens width"]]]:
    """Applies a layer with one set of parameters after the other.

    Args:
      layer: (x, parameters of one layer) -> x.
      params: arrays with a leading dimension of depth.
      unroll: layers per iteration of a scan; the depth leaves no loop.
      keep: numbers of the layers (from 0) whose outputs are returned too; they too leave no loop.

    Returns:
      The last output, and those of `keep` in its order.
    """
    leaves, tree = jax.tree.flatten(params)
    depth = leaves[0].shape[0]
    if unroll != depth and not keep:
        return jax.lax.scan(lambda x, params: (layer(x, params), None), x, params, unroll=unroll)[0], []
    # lax.split, unlike indexing, has a concatenation as its transpose: gradients are stacked in one pass.
    parts = zip(*(jax.lax.split(leaf, [1] * depth) for leaf in leaves), strict=True)
    outputs = []
    for part in parts:
        x = layer(x, jax.tree.unflatten(tree, [leaf[0] for leaf in part]))
        outputs.append(x)
    return x, [outputs[number] for number in keep]


# ---- matmul


def _gathered(weights: Float[Weights, "inputs outputs"], dtype: DTypeLike) -> Float[Array, "inputs outputs"]:
    """Weights in the type of the matmul, whole on every device.

    Left alone, the partitioner may split the matmul over the dimension in which the weights are split, and move the activations
    of the whole batch twice a layer.
    """
    return replicated(jnp.asarray(weights, dtype))


def _sum_rows(x: Float[Array, "*rows width"]) -> Float[Array, " width"]:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def _weight_gradient(
    x: Float[Array, "*rows inputs"], g: Float[Array, "*rows outputs"]
) -> Float[Array, "inputs outputs"]:
    rows = tuple(range(x.ndim - 1))

    def direct(x: Array, g: Array) -> Array:
        return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))

    def transposed(x: Array, g: Array) -> Array:
        return jax.lax.optimization_barrier(direct(g, x)).T

    if g.shape[-1] < x.shape[-1]:
        # On a CPU, XLA transposes the first operand and computes what it is fused with (a GELU) in transposed order, one value
        # at a time. The narrower operand costs less.
        return jax.lax.platform_dependent(x, g, cpu=transposed, default=direct).astype(jnp.float32)
    return direct(x, g).astype(jnp.float32)


def matmul(x: Float[Array, "*rows inputs"], weights: Float[Weights, "inputs outputs"]) -> Float[Array, "*rows outputs"]:
    """x weights, in the type of x. Activations stay where they are; weights that are split over devices are gathered, in the
    backward pass anew."""
    return checkpoint_name(_matmul(x, weights), MATMUL)


@jax.custom_vjp
def _matmul(x: Array, weights: Weights) -> Array:
    return x @ _gathered(weights, x.dtype)


def _matmul_backward(saved: tuple[Array, Weights], g: Array) -> tuple[Array, Array]:
    x, weights = saved
    return g @ _gathered(weights, x.dtype).T, _weight_gradient(x, g)


_matmul.defvjp(lambda x, weights: (_matmul(x, weights), (x, weights)), _matmul_backward)


def linear(
    x: Float[Array, "*rows inputs"], weights: Float[Weights, "inputs outputs"], bias: Float[Weights, " outputs"]
) -> Float[Array, "*rows outputs"]:
    """x weights + bias, in the type of x; weights as in `matmul`."""
    return checkpoint_name(_linear(x, weights, bias), MATMUL)


@jax.custom_vjp
def _linear(x: Array, weights: Weights, bias: Weights) -> Array:
    return x @ _gathered(weights, x.dtype) + bias.astype(x.dtype)


def _linear_backward(saved: tuple[Array, Weights], g: Array) -> tuple[Array, Array, Array]:
    return *_matmul_backward(saved, g), _sum_rows(g)


_linear.defvjp(lambda x, weights, bias: (_linear(x, weights, bias), (x, weights)), _linear_backward)


# ---- MLP


def gelu(x: Float[Array, "*rows width"], approximate: bool) -> Float[Array, "*rows width"]:
    """x Phi(x), or with tanh in place of the error function (Hendrycks and Gimpel 2016); computed in float32."""
    if approximate and x.dtype == jnp.bfloat16 and on_nvidia():
        # XLA recognises this form and leaves it to cuBLAS, which computes it in float32 as it writes the matmul.
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
    """erfc(-x / sqrt 2), which keeps small results exact; on a CPU, where XLA takes more than twice as long for it,
    1 + erf(x / sqrt 2), as PyTorch computes it."""
    scale = math.sqrt(0.5)
    return jax.lax.platform_dependent(
        x, cpu=lambda x: 1 + jax.lax.erf(x * scale), default=lambda x: jax.lax.erfc(-x * scale)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def mlp(
    x: Float[Array, "*rows inputs"],
    weights1: Float[Weights, "inputs hidden"],
    bias1: Float[Weights, " hidden"],
    weights2: Float[Weights, "hidden outputs"],
    bias2: Float[Weights, " outputs"],
    approximate: bool,
) -> Float[Array, "*rows outputs"]:
    """gelu(x weights1 + bias1) weights2 + bias2. Saved for the backward pass: x and the input of the gelu."""
    return linear(gelu(linear(x, weights1, bias1), approximate), weights2, bias2)


def _mlp_forward(
    x: Array, weights1: Weights, bias1: Weights, weights2: Weights, bias2: Weights, approximate: bool
) -> tuple[Array, tuple[Array, Weights, Array, Weights]]:
    hidden = linear(x, weights1, bias1)
    return linear(gelu(hidden, approximate), weights2, bias2), (x, weights1, hidden, weights2)


def _mlp_backward(
    approximate: bool, saved: tuple[Array, Weights, Array, Weights], g: Array
) -> tuple[Array, Array, Array, Array, Array]:
    x, weights1, hidden, weights2 = saved
    slope = gelu_slope(hidden, approximate)
    dhidden = ((g @ _gathered(weights2, x.dtype).T).astype(jnp.float32) * slope).astype(x.dtype)
    return (
        dhidden @ _gathered(weights1, x.dtype).T, _weight_gradient(x, dhidden), _sum_rows(dhidden),
        _weight_gradient(gelu(hidden, approximate), g), _sum_rows(g),
    )  # fmt: skip


mlp.defvjp(_mlp_forward, _mlp_backward)


# ---- LayerNorm


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rows width"], scale: Float[Weights, " width"], bias: Float[Weights, " width"], eps: float
) -> Float[Array, "*rows width"]:
    """LayerNorm with float32 statistics and the two-pass variance; the result has the type of x."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(
    x: Array, scale: Weights, bias: Weights, eps: float
) -> tuple[Array, tuple[Array, Weights, Array, Array]]:
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    y = y - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * inverse * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(
    eps: float, saved: tuple[Array, Weights, Array, Array], g: Array
) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = saved

    def widened(x: Array, mean: Array, inverse: Array, g: Array) -> tuple[Array, Array]:
        return (x.astype(jnp.float32) - mean) * inverse, g.astype(jnp.float32)

    normed, g_wide = widened(x, mean, inverse, g)
    h = g_wide * scale
    h = h - jnp.mean(h, axis=-1, keepdims=True) - normed * jnp.mean(h * normed, axis=-1, keepdims=True)
    dx = (inverse * h).astype(x.dtype)
    if on_nvidia():
        # XLA cannot sum rows and columns in one pass there. It would store the float32 products of the first for the second;
        # reading x and g again moves a third of that.
        normed, g_wide = widened(*jax.lax.optimization_barrier((x, mean, inverse, g)))
    return dx, _sum_rows(g_wide * normed), _sum_rows(g_wide)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


# ---- choosing tokens: matmuls with one-hot rows, at which a TPU is quicker than at sorts, gathers and scatters


def ranks(noise: Float[Array, "batch patches"]) -> Int[Array, "batch patches"]:
    """The place of each patch in the stable ascending order of its image: argsort(argsort(noise)), by counting pairs."""
    number = jnp.arange(noise.shape[1])
    mine, other = noise[:, :, None], noise[:, None, :]
    before = (other < mine) | ((other == mine) & (number[None, :] < number[:, None]))
    return jnp.sum(before, axis=2, dtype=jnp.int32)


def selection(
    rank: Int[Array, "batch candidates"], count: int, dtype: DTypeLike
) -> Shaped[Array, "batch count candidates"]:
    """One-hot rows for `select` and `put_back`: row r has its 1 at the candidate of rank r, for r = 0 … count - 1."""
    return (rank[:, None, :] == jnp.arange(count)[None, :, None]).astype(dtype)


def select(
    chosen: Shaped[Array, "batch count candidates"], x: Shaped[Array, "*batch candidates width"]
) -> Shaped[Array, "batch count width"]:
    """The candidates in the order of their rank, bit by bit; `x` may be the same for all images, without a batch dimension."""
    return jnp.einsum("bcn,nw->bcw" if x.ndim == 2 else "bcn,bnw->bcw", chosen, x, precision=_exact(x.dtype))


def put_back(
    chosen: Shaped[Array, "batch count candidates"], x: Shaped[Array, "batch count width"]
) -> Shaped[Array, "batch candidates width"]:
    """The inverse of `select`: each selected row at its candidate's place, bit by bit, and zeros elsewhere."""
    return jnp.einsum("bcn,bcw->bnw", chosen, x, precision=_exact(x.dtype))


def _exact(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Precision at which a matmul with one-hot rows only moves values of this type, on any device."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
