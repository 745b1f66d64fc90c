"""Self-attention from the fused projection [q | k | v], two ways with the same result.

`by_compiler` is written in array operations, for any device. `by_kernel` is one Pallas kernel a pass for TPUs: it reads an
image's projection once and keeps the weights, tokens x tokens for every head, on the chip; nothing of that size travels
to memory, in neither direction, and no head is copied to a place of its own. The backward pass computes the weights again.
On NVIDIA GPUs cuDNN's flash attention takes its place.

The same image may hold several segments of tokens one after the other, which do not see one another: 4 x 50 tokens fill
the chip's tiles of 8 x 128 values, 50 do not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

ROWS = 256  # queries at a time: 256 x 1025 weights in float32 are 1 MiB
VMEM_BYTES = 64 * 2**20  # of the 128 MiB (v5e, v6e) that a kernel may use; 1025 tokens of width 512 take 25 MiB
NOT_SEEN = -1e30


def by_compiler(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """softmax(q k^T / sqrt(d)) v in each head and segment, `bias` added to [q | k | v]; the softmax is float32."""
    batch, tokens, columns = qkv.shape
    width = columns // 3
    qkv = qkv + bias.astype(qkv.dtype)
    qkv = qkv.reshape(batch * segments, tokens // segments, 3, heads, width // heads)
    q, k, v = (qkv[:, :, part] for part in range(3))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(qkv.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width)


def by_kernel(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """As `by_compiler`: by the kernel where the program is lowered for a TPU, by cuDNN for bfloat16 where JAX runs on an
    NVIDIA GPU, in array operations elsewhere."""
    if on_nvidia() and qkv.dtype == jnp.bfloat16:
        return by_cudnn(qkv, bias, heads, segments)
    return _by_kernel(qkv, bias, heads, segments)


def on_nvidia() -> bool:
    """Whether JAX's own devices are NVIDIA GPUs. What is chosen by this is chosen when a program is traced: JAX refuses to trace
    cuDNN's attention where there is no cuDNN."""
    return jax.default_backend() == "gpu" and jax.local_devices()[0].device_kind.startswith("NVIDIA")


def by_cudnn(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """As `by_compiler`, by cuDNN's flash attention: bfloat16, on NVIDIA GPUs from Ampere on."""
    batch, tokens, columns = qkv.shape
    size = tokens // segments
    qkv = (qkv + bias.astype(qkv.dtype)).reshape(batch * segments, size, 3, heads, columns // 3 // heads)
    # JAX takes even numbers of tokens alone. The one that is added nobody sees, and its own result is dropped.
    odd = size % 2
    q, k, v = (jnp.pad(qkv[:, :, part], ((0, 0), (0, odd), (0, 0), (0, 0))) for part in range(3))
    seen = jnp.full(batch * segments, size, jnp.int32) if odd else None
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=seen, implementation="cudnn")
    return out[:, :size].reshape(batch, tokens, columns // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_kernel(qkv: Array, bias: Array, heads: int, segments: int) -> Array:
    return _forward(qkv, bias, heads, segments)[0]


def _forward(qkv: Array, bias: Array, heads: int, segments: int) -> tuple[Array, Any]:
    settings = {"heads": heads, "segments": segments}
    kernel = _on_each_device(functools.partial(kernel_forward, **settings), arrays=1)
    rule = functools.partial(by_compiler, **settings)
    return jax.lax.platform_dependent(qkv, bias, tpu=kernel, default=rule), (qkv, bias)


def _backward(heads: int, segments: int, kept: Any, g: Array) -> tuple[Array, Array]:
    settings = {"heads": heads, "segments": segments}

    def kernel(g: Array, qkv: Array, bias: Array) -> tuple[Array, Array]:
        on_each = _on_each_device(functools.partial(kernel_backward, **settings), arrays=2)
        gradient, of_bias = on_each(g, qkv, bias)
        return gradient, jnp.sum(of_bias, axis=(0, 1))

    def rule(g: Array, qkv: Array, bias: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(by_compiler, **settings), qkv, bias)[1](g)

    return jax.lax.platform_dependent(g, *kept, tpu=kernel, default=rule)


_by_kernel.defvjp(_forward, _backward)


def _on_each_device(kernel: Callable[..., Any], arrays: int) -> Callable[..., Any]:
    """A kernel knows nothing of meshes: each device runs it on its part of the batch (see `mesh_axes`).

    Args:
      arrays: arguments that are split, before one that is not.
    """
    axes = tuple(mesh_axes())
    if not axes:
        return kernel
    specs = (*[PartitionSpec(axes)] * arrays, PartitionSpec())
    return jax.shard_map(kernel, in_specs=specs, out_specs=PartitionSpec(axes), axis_names=set(axes), check_vma=False)


# ---- the kernels


def kernel_forward(qkv: Array, bias: Array, *, heads: int, segments: int = 1, interpret: bool = False) -> Array:
    """The forward pass; `interpret` runs it on any device, slowly."""
    batch, tokens, columns = qkv.shape
    body = functools.partial(_forward_body, heads=heads, segments=segments)
    out = jax.ShapeDtypeStruct((batch, tokens, columns // 3), qkv.dtype)
    return _call(body, (qkv,), bias, out, "attention_forward", interpret)


def kernel_backward(
    g: Array, qkv: Array, bias: Array, *, heads: int, segments: int = 1, interpret: bool = False
) -> tuple[Array, Array]:
    """From the gradient of the result to those of [q | k | v] and, for each image, of the bias: (batch, 1, columns)."""
    body = functools.partial(_backward_body, heads=heads, segments=segments)
    of_bias = jax.ShapeDtypeStruct((qkv.shape[0], 1, qkv.shape[2]), jnp.float32)
    out = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), of_bias
    return _call(body, (g, qkv), bias, out, "attention_backward", interpret)


def _call(
    body: Callable[..., None], inputs: tuple[Array, ...], bias: Array, out: Any, name: str, interpret: bool
) -> Any:
    def image(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda number: (number, 0, 0))

    return pl.pallas_call(
        body,
        grid=inputs[0].shape[:1],
        in_specs=[*map(image, inputs), pl.BlockSpec((1, bias.size), lambda number: (0, 0))],
        out_specs=jax.tree.map(image, out),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        name=name,
        interpret=interpret,
    )(*inputs, bias[None])


def _forward_body(qkv: Any, bias: Any, out: Any, *, heads: int, segments: int) -> None:
    tokens, width = out.shape[1:]
    seen = _seen(tokens, segments)
    for head in range(heads):
        (q, k, v), columns = _head(qkv, bias, head, heads)
        for rows in _chunks(tokens):
            weights = _weights(q[rows], k, None if seen is None else seen[rows])
            out[0, rows, columns[0]] = _product(weights.astype(v.dtype), v, 1, 0).astype(out.dtype)


def _backward_body(g: Any, qkv: Any, bias: Any, out: Any, out_bias: Any, *, heads: int, segments: int) -> None:
    tokens, width = g.shape[1:]
    scale = (width // heads) ** -0.5
    seen = _seen(tokens, segments)
    for head in range(heads):
        (q, k, v), columns = _head(qkv, bias, head, heads)
        g_head = g[0, :, columns[0]]
        dk = dv = jnp.zeros((tokens, width // heads), jnp.float32)
        dbias = jnp.zeros((1, width // heads), jnp.float32)
        for rows in _chunks(tokens):
            weights = _weights(q[rows], k, None if seen is None else seen[rows])
            dv += _product(weights.astype(g_head.dtype), g_head[rows], 0, 0)
            dweights = _product(g_head[rows], v, 1, 1)
            dlogits = weights * (dweights - jnp.sum(weights * dweights, axis=1, keepdims=True)) * scale
            dlogits = dlogits.astype(q.dtype)
            dk += _product(dlogits, q[rows], 0, 0)
            dq = _product(dlogits, k, 1, 0)
            dbias += jnp.sum(dq, axis=0, keepdims=True)
            out[0, rows, columns[0]] = dq.astype(out.dtype)
        out_bias[0, :, columns[0]] = dbias
        for gradient, place in ((dk, columns[1]), (dv, columns[2])):
            out[0, :, place] = gradient.astype(out.dtype)
            out_bias[0, :, place] = jnp.sum(gradient, axis=0, keepdims=True)


def _head(qkv: Any, bias: Any, head: int, heads: int) -> tuple[list[Array], list[slice]]:
    """q, k and v of a head, with their bias, and their columns."""
    width = qkv.shape[2] // 3
    size = width // heads
    columns = [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]
    return [(qkv[0, :, one].astype(jnp.float32) + bias[:, one]).astype(qkv.dtype) for one in columns], columns


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]


def _weights(q: Array, k: Array, seen: Array | None) -> Array:
    """softmax(q k^T / sqrt(d)), float32."""
    logits = _product(q, k, 1, 1) * q.shape[1] ** -0.5
    if seen is not None:
        logits = jnp.where(seen, logits, NOT_SEEN)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Sums over dimension `of_a` of a and `of_b` of b, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _seen(tokens: int, segments: int) -> Array | None:
    """True where a query (row) and a key (column) are of the same segment; None where there is but one segment."""
    if segments == 1:
        return None
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
    size = tokens // segments
    same = jnp.zeros((tokens, tokens), bool)
    for first in range(0, tokens, size):
        same |= (row >= first) & (row < first + size) & (column >= first) & (column < first + size)
    return same


# ---- the mesh


def mesh_axes() -> dict[str, int]:
    """Sizes of the mesh axes over which the compiler is to split what is traced now, by name: those of jax.set_mesh, less what a
    shard_map around it has split already. None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}
