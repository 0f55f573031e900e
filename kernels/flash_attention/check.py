"""What the kernels take, and errors that say so."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.fire import Fire
from kernels.flash_attention.places import At

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
SHORTEST_WINDOW = 128  # beside sinks: no block is shorter


class Sinks(NamedTuple):
    """The first tokens of each segment, seen from any distance: Λ-attention (LM-Infinite, arXiv
    2308.16137, section 4) and streaming with attention sinks.

    Attributes:
        num: positions below it are sinks.
        q: [batch, heads, length, head_dim], queries as they meet a sink out of the window, that is
            at a distance of `window` or more; None: as ever.
        k: [batch, kv_heads, length, head_dim], keys as they are met there; None: as ever.
        bias: [heads], added to capped scores there; None: 0.
        factor: [heads], multiplies them before that, without a gradient; None: 1.
    """

    num: int
    q: jax.Array | None = None
    k: jax.Array | None = None
    bias: jax.Array | None = None
    factor: jax.Array | None = None


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    part: bool = False,
) -> None:
    """Of the arrays that every call has; `part`: whether the queries are a stretch of the tokens.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    T = q.shape[2]
    S = k.shape[2] if part else T
    if part and (T % 128 or T > S):
        raise ValueError(
            f"first_query with {T} queries of {S} tokens; allowed: a multiple of 128, no more than "
            "the tokens"
        )
    _check_heads(q, k, v, S)
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None and array.shape != (q.shape[0], S):
            raise ValueError(f"{name} of shape {array.shape}; allowed: {(q.shape[0], S)}")


def check_places(
    q: jax.Array, k: jax.Array, v: jax.Array, q_at: At, k_at: At, slopes: jax.Array | None
) -> None:
    """Of `flash_attention_at`.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    B, N = q.shape[:2]
    _check_heads(q, k, v, k.shape[2])
    for side, at, length in (("q_at", q_at, q.shape[2]), ("k_at", k_at, k.shape[2])):
        for name, array in zip(At._fields, at, strict=True):
            if array.shape != (B, length) or array.dtype != jnp.int32:
                raise ValueError(
                    f"{side}.{name}: {array.dtype} of shape {array.shape}; allowed: int32 of shape "
                    f"{(B, length)}"
                )
    if slopes is not None and slopes.shape != (N,):
        raise ValueError(f"slopes of shape {slopes.shape}; allowed: {(N,)}")


def _check_heads(q: jax.Array, k: jax.Array, v: jax.Array, S: int) -> None:
    B, N, _, H = q.shape
    if k.shape != v.shape or k.shape[::2] != (B, S) or k.shape[3] != H or N % k.shape[1]:
        raise ValueError(
            f"q, k, v of shapes {q.shape}, {k.shape}, {v.shape}; allowed: [batch, heads, length, "
            "head_dim] and twice [batch, kv_heads, length, head_dim], heads a multiple of kv_heads"
        )
    if H not in HEAD_DIMS:
        raise ValueError(f"head_dim={H}; allowed: {', '.join(map(str, HEAD_DIMS))}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; allowed: all bfloat16 or all float32"
        )


def check_options(
    q: jax.Array,
    k: jax.Array,
    ahead: int | None,
    window: int | None,
    bias: jax.Array | None,
    factor: jax.Array | None,
    prefix: int | None,
    sinks: Sinks | None,
    fire: Fire | None,
) -> None:
    """Of a pattern, and of what changes scores.

    Raises:
        ValueError: patterns that do not go together, or a shape that is not theirs.
    """
    N, S = q.shape[1], k.shape[2]
    for name, vectors in (("bias", bias), ("factor", factor)):
        if vectors is not None and vectors.shape != (N, 2 * S - 1):
            raise ValueError(f"{name} of shape {vectors.shape}; allowed: {(N, 2 * S - 1)}")
    if prefix is not None and (ahead != 0 or window is not None or prefix < 0):
        raise ValueError(
            f"prefix={prefix} with ahead={ahead}, window={window}; allowed: an integer >= 0 with "
            "ahead=0 and no window"
        )
    if fire is not None:
        _check_fire(q, k, fire, sinks)
    if sinks is None:
        return
    if window is None or window < SHORTEST_WINDOW or ahead is None:
        raise ValueError(
            f"sinks with window={window}, ahead={ahead}; allowed: a window of at least "
            f"{SHORTEST_WINDOW} and an integer"
        )
    if not 1 <= sinks.num <= window:
        raise ValueError(f"sinks.num={sinks.num}; allowed: from 1 to the window's {window}")
    for name, shape in {"q": q.shape, "k": k.shape, "bias": (N,), "factor": (N,)}.items():
        array = getattr(sinks, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"sinks.{name} of shape {array.shape}; allowed: {shape}")
        if name in ("q", "k") and array is not None and array.dtype != q.dtype:
            raise ValueError(f"sinks.{name} of {array.dtype}; allowed: {q.dtype}, as q")


def _check_fire(q: jax.Array, k: jax.Array, fire: Fire, sinks: Sinks | None) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError("fire with first_query; allowed: one of them")
    if sinks is not None:
        raise ValueError("fire with sinks; allowed: one of them, sinks need distances alone")
    B, N, T, _ = q.shape
    width = fire.w_in.shape[-1:]
    shapes = ((2 * T - 1,), (B, T), width, width, (N, *width), (N,))
    for name, array, shape in zip(Fire._fields, fire, shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"fire.{name} of shape {array.shape}; allowed: {shape}")
