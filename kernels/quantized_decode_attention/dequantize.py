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

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode_attention.kernel import NN, NT, dot
from kernels.decode_attention.softmax import LANES, fold
from kernels.kv_quantize.in_vmem import load, offset
from kernels.kv_quantize.layout import scale_and_minimum


def dots(q: jax.Array, words: jax.Array, affine: jax.Array, bits: int, group: int) -> jax.Array:
    """q·k̂, float32 [R, W].

    Args:
        q: [R, H].
        words: the codes of W tokens, a multiple of 128.
        affine: int32 [W/group, H].
    """
    codes = load(words, bits).astype(q.dtype)
    scale, minimum = scale_and_minimum(affine)
    wide = q.astype(jnp.float32)
    groups = LANES // group
    results = []
    for chunk in range(codes.shape[0] // LANES):
        queries, rest = [], []
        for g in range(chunk * groups, (chunk + 1) * groups):
            queries.append((wide * scale[g : g + 1]).astype(q.dtype))
            lost = queries[-1].astype(jnp.float32) * offset(bits)
            rest.append((wide * minimum[g : g + 1] - lost).sum(1, keepdims=True))
        keys = codes[chunk * LANES : (chunk + 1) * LANES]
        stacked = dot(jnp.concatenate(queries), keys, NT)
        results.append(own_columns(split(stacked, groups), rest, group))
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
    factors, rest = [], []
    for g in range(affine.shape[0]):
        factors.append((p * scale[g : g + 1]).astype(dtype))
        lost = factors[-1].astype(jnp.float32) * offset(bits)
        rest.append(fold(p * minimum[g : g + 1] - lost).sum(1, keepdims=True))
    stacked = dot(jnp.concatenate(factors), codes, NN)
    return own_columns(split(stacked, len(factors)), rest, group)


def split(x: jax.Array, count: int) -> list[jax.Array]:
    """[count·R, ·] → count arrays [R, ·]."""
    R = x.shape[0] // count
    return [x[i * R : (i + 1) * R] for i in range(count)]


def own_columns(parts: Sequence[jax.Array], rest: Sequence[jax.Array], group: int) -> jax.Array:
    """Columns g·group … of part g, plus rest g [R, 1]."""
    column = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    result = parts[-1] + rest[-1]
    for g in reversed(range(len(parts) - 1)):
        result = jnp.where(column < (g + 1) * group, parts[g] + rest[g], result)
    return result
