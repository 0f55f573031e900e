"""Our decode kernels as cases of launch.aot, in the shapes of launch.kernel_peers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels.decode_attention import decode_attention as attend_dense
from kernels.decode_attention import paged_decode_attention as attend_paged
from kernels.kv_quantize import Quantized, quantize_keys, quantize_values
from kernels.quantized_decode_attention import Zone
from kernels.quantized_decode_attention import quantized_decode_attention as attend_quantized
from launch.kernel_peers import Program, struct


def decode_attention(
    mesh: Mesh,
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    group: int = 1,
    queries: int = 1,
    dtype: str = "bfloat16",
) -> Program:
    """kernels.decode_attention against a full dense cache of `heads` kv heads."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        scale = head_dim**-0.5
        return attend_dense(q, k, v, q_positions=i, k_positions=j, scale=scale)[0]

    q = struct(mesh, batch, heads * group, queries, head_dim)
    cache = struct(mesh, batch, heads, capacity, head_dim, dtype=jnp.dtype(dtype))
    return attend, [q, cache, cache, *_positions(mesh, batch, queries, capacity)]


def paged_decode(
    mesh: Mesh, batch: int, capacity: int, heads: int, head_dim: int, page: int
) -> Program:
    """kernels.decode_attention against full pages."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, i: jax.Array, j: jax.Array
    ) -> jax.Array:
        scale = head_dim**-0.5
        return attend_paged(q, k, v, table, q_positions=i, k_positions=j, scale=scale)[0]

    q = struct(mesh, batch, heads, 1, head_dim)
    pool = struct(mesh, batch * capacity // page, heads, page, head_dim)
    table = struct(mesh, batch, capacity // page, dtype=jnp.int32)
    return attend, [q, pool, pool, table, *_positions(mesh, batch, 1, capacity)]


def _positions(mesh: Mesh, batch: int, queries: int, capacity: int) -> list[jax.ShapeDtypeStruct]:
    return [struct(mesh, batch, n, dtype=jnp.int32) for n in (queries, capacity)]


def kv_quantize(
    mesh: Mesh, batch: int, tokens: int, heads: int, head_dim: int, bits: int, group: int = 64
) -> Program:
    """kernels.kv_quantize of as many new keys and values."""

    def quantize(k: jax.Array, v: jax.Array) -> tuple[Quantized, Quantized]:
        return (
            quantize_keys(k, bits=bits, group=group),
            quantize_values(v, bits=bits, group=group),
        )

    return quantize, [struct(mesh, batch, heads, tokens, head_dim)] * 2


def quantized_decode_attention(
    mesh: Mesh,
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    bits: int,
    group: int = 64,
    queries: int = 1,
) -> Program:
    """kernels.quantized_decode_attention against a full cache of one precision."""

    def attend(q: jax.Array, *cache: jax.Array) -> jax.Array:
        k, k_scales, v, v_scales, i, j = cache
        keys, values = Quantized(k, k_scales, bits, group), Quantized(v, v_scales, bits, group)
        zones = [Zone(keys, values, j)]
        return attend_quantized(q, zones, q_positions=i, scale=head_dim**-0.5)[0]

    def integers(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return struct(mesh, batch, heads, *shape, dtype=dtype)

    if bits == 8:
        codes = integers(capacity, head_dim, dtype=jnp.int8)
    else:
        codes = integers(capacity * bits // 32, head_dim)
    scales = integers(capacity // group, head_dim), integers(head_dim // group, capacity)
    q = struct(mesh, batch, heads, queries, head_dim)
    return attend, [
        q,
        codes,
        scales[0],
        codes,
        scales[1],
        *_positions(mesh, batch, queries, capacity),
    ]
