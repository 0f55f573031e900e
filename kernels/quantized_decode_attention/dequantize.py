"""Scores and values of codes, without ever multiplying a key or a value by its scale.

What comes from VMEM is x̃ = code + offset, so x̂ = scale·x̃ + minimum − scale·offset.
Keys: a channel's scale is the same over a group of tokens, so it goes into the query instead.

    q·k̂ = Σ_h (q_h·scale_h)·k̃_h + Σ_h q_h·minimum_h − (q_h·scale_h)·offset

Values: a token's scale is the same over a group of channels, so it goes into the weights instead.

    out_h = Σ_t (p_t·scale_t)·ṽ_th + Σ_t p_t·minimum_t − (p_t·scale_t)·offset

There is one such query [R, H], or one such weight [R, W], a group. It is rounded for the matmul,
and rounded it is multiplied by the offset too: so the offset, above all codes, adds no error.

The groups' queries are more rows of one matmul with the codes; of its result, each group keeps its
own columns.

Letters: R rows, W tokens of a tile, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode_attention.kernel import NN, NT, dot
from kernels.decode_attention.softmax import LANES, fold
from kernels.kv_quantize.in_vmem import load, offset
from kernels.kv_quantize.layout import UPPER, scale_and_minimum


def dots(
    q: jax.Array, words: jax.Array, affine: jax.Array, bits: int, group: int, tokens: int
) -> jax.Array:
    """q·k̂, float32 [R, W].

    Args:
        q: [R, H].
        words: the codes of W tokens, a multiple of 128.
        affine: int32 [W/group, H].
        tokens: of one matmul, a multiple of 128 that divides W.
    """
    codes = load(words, bits).astype(q.dtype)
    scale, minimum = scale_and_minimum(affine)
    wide, R = q.astype(jnp.float32), q.shape[0]
    groups, results = LANES // group, []
    for start in range(0, codes.shape[0], tokens):
        of = slice(start // group, (start + tokens) // group)
        queries = rounded(times(wide, scale[of]), q.dtype)
        rest = (times(wide, minimum[of]) - queries * offset(bits)).sum(1, keepdims=True)
        stacked = dot(queries.astype(q.dtype), codes[start : start + tokens], NT)
        for column, row in zip(
            range(0, tokens, LANES), range(0, rest.shape[0], groups * R), strict=True
        ):
            at = slice(row, row + groups * R)
            part = stacked[at, column : column + LANES] + rest[at]
            results.append(own_columns(part, groups, group))
    return jnp.concatenate(results, 1)


def weighed(
    p: jax.Array, words: jax.Array, affine: jax.Array, bits: int, group: int, dtype: Any
) -> jax.Array:
    """p·v̂, float32 [R, H], by a matmul of dtype.

    Args:
        p: weights, float32 [R, W].
        words: the codes of W tokens.
        affine: int32 [H/group, W].
    """
    codes = load(words, bits).astype(dtype)
    scale, minimum = scale_and_minimum(affine)
    factors = times(p, scale).astype(dtype)
    lost = fold(factors.astype(jnp.float32)) * offset(bits)
    rest = (fold(times(p, minimum)) - lost).sum(1, keepdims=True)
    return own_columns(dot(factors, codes, NN) + rest, affine.shape[0], group)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 numbers that dtype has. By integers: a conversion there and back XLA leaves out where
    it can, in interpret mode, and then the offset would meet other numbers than the codes do.
    """
    if dtype == jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + (1 << 15)
    return jax.lax.bitcast_convert_type(bits & UPPER, jnp.float32)


def times(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [R, W] times each of `rows` [G, W], one after the other: float32 [G·R, W]."""
    return jnp.concatenate([x * rows[g : g + 1] for g in range(rows.shape[0])])


def own_columns(stacked: jax.Array, count: int, group: int) -> jax.Array:
    """[count·R, ·] → [R, ·]: columns g·group … of the g-th R rows."""
    R = stacked.shape[0] // count
    parts = [stacked[g * R : (g + 1) * R] for g in range(count)]
    column = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    result = parts[-1]
    for g in reversed(range(count - 1)):
        result = jnp.where(column < (g + 1) * group, parts[g], result)
    return result
