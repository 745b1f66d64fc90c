"""Self-attention from the fused projection [q | k | v], in three ways with the same result.

`xla_attention` is written in array operations, for any device. `pallas_attention` is one Pallas kernel a pass for TPUs: it
reads an image's projection once and keeps the attention probabilities, tokens x tokens for each head, in VMEM; nothing of that
size travels to memory in either direction, and no head is copied. The backward pass computes the probabilities again.
`cudnn_attention` is cuDNN's flash attention for NVIDIA GPUs.

A row of the batch may hold several segments of tokens that do not attend to one another (see `ops.pack_images`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from curia_jax.models import ops

ROWS = 256  # queries at a time: 256 x 1025 probabilities in float32 are 1 MiB
VMEM_BYTES = 64 * 2**20  # of 128 MiB (v5e, v6e) that a Pallas kernel may use; 1025 tokens of width 512 take 25 MiB
MASKED = -1e30  # logit of a key in another segment


def xla_attention(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """softmax(q k^T / sqrt(d)) v of each head and segment, with float32 softmax.

    Args:
      bias: added to [q | k | v].
    """
    batch, tokens, columns = qkv.shape
    width = columns // 3
    qkv = qkv + bias.astype(qkv.dtype)
    qkv = qkv.reshape(batch * segments, tokens // segments, 3, heads, width // heads)
    q, k, v = (qkv[:, :, part] for part in range(3))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(qkv.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v).reshape(batch, tokens, width)


def pallas_attention(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """As `xla_attention`: the Pallas kernel in programs for TPUs, cuDNN for bfloat16 on NVIDIA GPUs, else `xla_attention`."""
    if ops.on_nvidia() and qkv.dtype == jnp.bfloat16:
        return cudnn_attention(qkv, bias, heads, segments)
    return _pallas_attention(qkv, bias, heads, segments)


def cudnn_attention(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"], heads: int, segments: int = 1
) -> Float[Array, "batch tokens width"]:
    """As `xla_attention`, by cuDNN's flash attention: bfloat16, on NVIDIA GPUs from Ampere on."""
    batch, tokens, columns = qkv.shape
    size = tokens // segments
    qkv = (qkv + bias.astype(qkv.dtype)).reshape(batch * segments, size, 3, heads, columns // 3 // heads)
    # JAX takes even numbers of tokens only. A padding token is masked as a key, and its own result is dropped.
    odd = size % 2
    q, k, v = (jnp.pad(qkv[:, :, part], ((0, 0), (0, odd), (0, 0), (0, 0))) for part in range(3))
    lengths = jnp.full(batch * segments, size, jnp.int32) if odd else None
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :size].reshape(batch, tokens, columns // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pallas_attention(qkv: Array, bias: Array, heads: int, segments: int) -> Array:
    return _forward(qkv, bias, heads, segments)[0]


def _forward(qkv: Array, bias: Array, heads: int, segments: int) -> tuple[Array, tuple[Array, Array]]:
    settings = {"heads": heads, "segments": segments}
    pallas = ops.on_each_device(functools.partial(pallas_forward, **settings), split=1)
    xla = functools.partial(xla_attention, **settings)
    return jax.lax.platform_dependent(qkv, bias, tpu=pallas, default=xla), (qkv, bias)


def _backward(heads: int, segments: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    settings = {"heads": heads, "segments": segments}

    def pallas(g: Array, qkv: Array, bias: Array) -> tuple[Array, Array]:
        on_each = ops.on_each_device(functools.partial(pallas_backward, **settings), split=2)
        dqkv, dbias = on_each(g, qkv, bias)
        return dqkv, jnp.sum(dbias, axis=(0, 1))

    def xla(g: Array, qkv: Array, bias: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(xla_attention, **settings), qkv, bias)[1](g)

    return jax.lax.platform_dependent(g, *saved, tpu=pallas, default=xla)


_pallas_attention.defvjp(_forward, _backward)


# ---- the Pallas kernels


def pallas_forward(
    qkv: Float[Array, "batch tokens three_widths"], bias: Float[Array, " three_widths"],
    *, heads: int, segments: int = 1, interpret: bool = False,
) -> Float[Array, "batch tokens width"]:  # fmt: skip
    """The forward pass; `interpret` runs it on any device, slowly."""
    batch, tokens, columns = qkv.shape
    body = functools.partial(_forward_body, heads=heads, segments=segments)
    out = jax.ShapeDtypeStruct((batch, tokens, columns // 3), qkv.dtype)
    return _call(body, (qkv,), bias, out, "attention_forward", interpret)


def pallas_backward(
    g: Float[Array, "batch tokens width"], qkv: Float[Array, "batch tokens three_widths"],
    bias: Float[Array, " three_widths"], *, heads: int, segments: int = 1, interpret: bool = False,
) -> tuple[Float[Array, "batch tokens three_widths"], Float[Array, "batch 1 three_widths"]]:  # fmt: skip
    """From the gradient `g` of the result to those of [q | k | v] and, for each row of the batch, of the bias."""
    body = functools.partial(_backward_body, heads=heads, segments=segments)
    dbias = jax.ShapeDtypeStruct((qkv.shape[0], 1, qkv.shape[2]), jnp.float32)
    out = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), dbias
    return _call(body, (g, qkv), bias, out, "attention_backward", interpret)


def _call(
    body: Callable[..., None], inputs: tuple[Array, ...], bias: Array, out: Any, name: str, interpret: bool
) -> Any:
    def image(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
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
    same = _same_segment(tokens, segments)
    for head in range(heads):
        (q, k, v), columns = _head(qkv, bias, head, heads)
        for rows in _chunks(tokens):
            probabilities = _probabilities(q[rows], k, None if same is None else same[rows])
            out[0, rows, columns[0]] = _dot(probabilities.astype(v.dtype), v, 1, 0).astype(out.dtype)


def _backward_body(g: Any, qkv: Any, bias: Any, out: Any, out_bias: Any, *, heads: int, segments: int) -> None:
    tokens, width = g.shape[1:]
    scale = (width // heads) ** -0.5
    same = _same_segment(tokens, segments)
    for head in range(heads):
        (q, k, v), columns = _head(qkv, bias, head, heads)
        g_head = g[0, :, columns[0]]
        dk = dv = jnp.zeros((tokens, width // heads), jnp.float32)
        dbias = jnp.zeros((1, width // heads), jnp.float32)
        for rows in _chunks(tokens):
            p = _probabilities(q[rows], k, None if same is None else same[rows])
            dv += _dot(p.astype(g_head.dtype), g_head[rows], 0, 0)
            dp = _dot(g_head[rows], v, 1, 1)
            dlogits = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * scale
            dlogits = dlogits.astype(q.dtype)
            dk += _dot(dlogits, q[rows], 0, 0)
            dq = _dot(dlogits, k, 1, 0)
            dbias += jnp.sum(dq, axis=0, keepdims=True)
            out[0, rows, columns[0]] = dq.astype(out.dtype)
        out_bias[0, :, columns[0]] = dbias
        for gradient, place in ((dk, columns[1]), (dv, columns[2])):
            out[0, :, place] = gradient.astype(out.dtype)
            out_bias[0, :, place] = jnp.sum(gradient, axis=0, keepdims=True)


def _head(qkv: Any, bias: Any, head: int, heads: int) -> tuple[list[Array], list[slice]]:
    """q, k and v of a head, bias added, and their columns."""
    width = qkv.shape[2] // 3
    size = width // heads
    columns = [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]
    return [(qkv[0, :, one].astype(jnp.float32) + bias[:, one]).astype(qkv.dtype) for one in columns], columns


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]


def _probabilities(q: Array, k: Array, same: Array | None) -> Array:
    """softmax(q k^T / sqrt(d)), float32."""
    logits = _dot(q, k, 1, 1) * q.shape[1] ** -0.5
    if same is not None:
        logits = jnp.where(same, logits, MASKED)
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=1, keepdims=True)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contracts axis `axis_a` of a with `axis_b` of b, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _same_segment(tokens: int, segments: int) -> Array | None:
    """True where a query (row) and a key (column) are in the same segment; None for a single segment."""
    if segments == 1:
        return None
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
    size = tokens // segments
    same = jnp.zeros((tokens, tokens), bool)
    for first in range(0, tokens, size):
        same |= (row >= first) & (row < first + size) & (column >= first) & (column < first + size)
    return same
