"""Our decode kernels as cases of launch.aot, in the shapes of launch.kernel_peers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels.decode_attention import Queries, Scoring, Slots
from kernels.decode_attention import decode_attention as attend_dense
from kernels.decode_attention import paged_decode_attention as attend_paged
from kernels.kv_quantize import Quantized, Scaled, quantize_keys, quantize_values
from kernels.kv_quantize.layout import rows_of_codes
from kernels.quantized_decode_attention import Zone
from kernels.quantized_decode_attention import quantized_decode_attention as attend_quantized
from launch.kernel_peers import Program, struct


def decode_attention(
    mesh: Mesh,
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    query_heads: int | None = None,
    queries: int = 1,
    dtype: str = "bfloat16",
    query_dtype: str = "bfloat16",
    ragged: bool = False,
    biased: bool = False,
) -> Program:
    """kernels.decode_attention against a dense cache of `heads` kv heads: full, or as full as
    lengths say, which are data; with a bias or without.
    """
    more = _more(mesh, (batch, query_heads or heads, queries, capacity), ragged, biased)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array, j: jax.Array, *rest: jax.Array
    ) -> jax.Array:
        slots = Slots(j, **dict(zip(more, rest, strict=True)))
        return attend_dense(q, k, v, Scoring(head_dim**-0.5), Queries(i), slots)[0]

    q = struct(mesh, batch, query_heads or heads, queries, head_dim, dtype=query_dtype)
    cache = struct(mesh, batch, heads, capacity, head_dim, dtype=jnp.dtype(dtype))
    return attend, [q, cache, cache, *_positions(mesh, batch, queries, capacity), *more.values()]


def paged_decode(
    mesh: Mesh,
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    page: int,
    query_heads: int | None = None,
    dtype: str = "bfloat16",
    query_dtype: str = "bfloat16",
) -> Program:
    """kernels.decode_attention against full pages."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, i: jax.Array, j: jax.Array
    ) -> jax.Array:
        return attend_paged(q, k, v, table, Scoring(head_dim**-0.5), Queries(i), Slots(j))[0]

    q = struct(mesh, batch, query_heads or heads, 1, head_dim, dtype=query_dtype)
    pool = struct(mesh, batch * capacity // page, heads, page, head_dim, dtype=dtype)
    table = struct(mesh, batch, capacity // page, dtype=jnp.int32)
    return attend, [q, pool, pool, table, *_positions(mesh, batch, 1, capacity)]


def _positions(mesh: Mesh, batch: int, queries: int, capacity: int) -> list[jax.ShapeDtypeStruct]:
    return [struct(mesh, batch, n, dtype=jnp.int32) for n in (queries, capacity)]


def _more(
    mesh: Mesh, shape: tuple[int, ...], ragged: bool, biased: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """What else is known of slots, for scores of this shape."""
    more = {}
    if ragged:
        more["lengths"] = struct(mesh, shape[0], dtype=jnp.int32)
    if biased:
        more["bias"] = struct(mesh, *shape, dtype=jnp.float32)
    return more


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


def scaled_decode_attention(
    mesh: Mesh, batch: int, capacity: int, heads: int, head_dim: int
) -> Program:
    """kernels.quantized_decode_attention against float8 with a scale per token."""

    def attend(q: jax.Array, k: Any, k_scale: Any, v: Any, v_scale: Any, *at: Any) -> jax.Array:
        zone = Zone(Scaled(k, k_scale), Scaled(v, v_scale), Slots(at[1]))
        return attend_quantized(q, [zone], Scoring(head_dim**-0.5), Queries(at[0]))[0]

    numbers = struct(mesh, batch, heads, capacity, head_dim, dtype="float8_e4m3fn")
    scale = struct(mesh, batch, heads, capacity, dtype="float32")
    return attend, [
        struct(mesh, batch, heads, 1, head_dim),
        *[numbers, scale] * 2,
        *_positions(mesh, batch, 1, capacity),
    ]


def quantized_decode_attention(
    mesh: Mesh,
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    bits: int,
    group: int = 64,
    query_heads: int | None = None,
    queries: int = 1,
    query_dtype: str = "bfloat16",
    ragged: bool = False,
    biased: bool = False,
) -> Program:
    """kernels.quantized_decode_attention against a cache of one precision: full, or as full as
    lengths say, which are data; with a bias or without.
    """
    more = _more(mesh, (batch, query_heads or heads, queries, capacity), ragged, biased)

    def attend(q: jax.Array, *cache: jax.Array) -> jax.Array:
        k, k_scales, v, v_scales, i, j, *rest = cache
        keys, values = Quantized(k, k_scales, bits, group), Quantized(v, v_scales, bits, group)
        zone = Zone(keys, values, Slots(j, **dict(zip(more, rest, strict=True))))
        return attend_quantized(q, [zone], Scoring(head_dim**-0.5), Queries(i))[0]

    def integers(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return struct(mesh, batch, *shape, dtype=dtype)

    rows, dtype = rows_of_codes(capacity, bits), jnp.int8 if bits == 8 else jnp.int32
    codes = integers(heads, rows, head_dim, dtype=dtype)
    return attend, [
        struct(mesh, batch, query_heads or heads, queries, head_dim, dtype=query_dtype),
        *(codes, integers(heads, capacity // group, head_dim)),
        *(codes, integers(heads, head_dim // group, capacity)),
        *_positions(mesh, batch, queries, capacity),
        *more.values(),
    ]
