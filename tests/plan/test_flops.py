"""FLOPs of traced programs."""

import jax
import jax.numpy as jnp

from curia_jax.models import attention
from curia_jax.plan import flops


def test_flops_of_matmuls_loops_and_rematerialisation_are_exact():
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def layer(x, weight):
        return jnp.sin(x @ weight)

    def loss(w, a, body):
        return jnp.sum(jax.lax.scan(lambda x, k: (body(x, k), None), a, w)[0])

    one = 2 * 8 * 16 * 16
    forward = jax.jit(lambda w, a: loss(w, a, layer)).trace(w, a)
    assert flops.hardware_flops(forward) == (5 * one, 0)
    plain = jax.jit(lambda w, a: jax.grad(loss)(w, a, layer)).trace(w, a)
    assert flops.hardware_flops(plain) == (3 * 5 * one, 0)
    again = jax.jit(lambda w, a: jax.grad(loss)(w, a, jax.checkpoint(layer))).trace(w, a)
    assert flops.hardware_flops(again) == (4 * 5 * one, 0)


def test_flops_of_batched_matmuls():
    q = jax.ShapeDtypeStruct((2, 7, 3, 4), jnp.float32)
    traced = jax.jit(lambda q: jnp.einsum("bqhd,bkhd->bhqk", q, q)).trace(q)
    assert flops.hardware_flops(traced) == (2 * 2 * 3 * 7 * 7 * 4, 0)


def test_flops_of_pallas_kernel_count_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = x[...] @ x[...]

    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, grid=(4,), in_specs=[spec], out_specs=spec, out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32)
    )
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((32, 8), jnp.float32))
    count = 4 * 2 * 8 * 8 * 8
    assert flops.hardware_flops(traced) == (count, count)
    assert flops.pallas_flops(traced) == {((32, 8),): count}


def test_flops_are_those_of_the_program_for_a_tpu():
    """Both passes of attention are Pallas kernels there; elsewhere the backward pass has six matmuls instead of five."""
    qkv, bias = jax.ShapeDtypeStruct((2, 17, 3 * 32), jnp.bfloat16), jax.ShapeDtypeStruct((3 * 32,), jnp.float32)
    traced = jax.jit(jax.grad(lambda qkv, bias: jnp.sum(attention.pallas_attention(qkv, bias, 4)))).trace(qkv, bias)
    one = 2 * 2 * 17 * 17 * 32  # q k^T, over all heads
    assert flops.hardware_flops(traced) == (7 * one, 7 * one)
    assert flops.pallas_flops(traced) == {((2, 17, 32),): 2 * one, ((2, 17, 96), (2, 1, 96)): 5 * one}
