"""Small programs to compile for absent TPUs."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from launch.kernel_peers import struct


def matmul(mesh, size):
    return jnp.matmul, [struct(mesh, size, size)] * 2


def copy(mesh, blocks, block=512):
    def kernel(x, y):
        y[...] = x[...]

    shape = (blocks * block, 2048)
    nbytes = 2 * 2 * math.prod(shape)
    cost = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=nbytes)
    spec = pl.BlockSpec((block, shape[1]), lambda i: (i, 0))
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        grid=(blocks,),
        in_specs=[spec],
        out_specs=spec,
        name="copy_rows",
        cost_estimate=cost,
    )
    return run, [struct(mesh, *shape)]


def products(mesh, heads):
    def kernel(x, w, y):
        y[0] = jnp.dot(x[0], w[0], preferred_element_type=jnp.float32).astype(y.dtype)

    rows = pl.BlockSpec((1, 512, 512), lambda head, i: (head, i, 0))
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((heads, 4096, 512), jnp.bfloat16),
        grid=(heads, 8),
        in_specs=[rows, pl.BlockSpec((1, 512, 512), lambda head, i: (head, 0, 0))],
        out_specs=rows,
        name="products",
    )
    return run, [struct(mesh, heads, 4096, 512), struct(mesh, heads, 512, 512)]


def refused(mesh):
    raise ValueError("length=7; allowed: multiples of 8")
