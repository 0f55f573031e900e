"""Attention as it is written on paper: what the kernels must agree with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.flash_attention.call import HIDDEN


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    ahead: int | None = 0,
    window: int | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    factor: jax.Array | None = None,
    prefix: int | None = None,
    positions: jax.Array | None = None,
    sinks: Any = None,
    fire: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.flash_attention.flash_attention`, in O(T²) memory and float32."""
    B, N, T, _ = q.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // k.shape[1], axis=1) for x in (k, v))
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        s = scale * jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
        return s if softcap is None else softcap * jnp.tanh(s / softcap)

    s = scores(q, k)
    if factor is not None:
        s *= factor.astype(jnp.float32)[None, :, T - 1 + i - j]
    if bias is not None:
        s += bias.astype(jnp.float32)[None, :, T - 1 + i - j]
    if fire is not None:
        s += _network(fire, T - 1 + i - j)
    seen = jnp.ones((B, 1, T, T), bool)
    if positions is None:
        ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        positions = j - (ids[:, :, None] == ids[:, None, :]).argmax(-1)
    if ahead is not None:
        seen &= (j - i <= ahead)[None, None]
    if prefix is not None:
        seen |= (positions < prefix)[:, None, None, :]
    if window is not None:
        seen &= (i - j < window)[None, None]
    if sinks is not None:
        assert window is not None
        is_far = (i - j >= window)[None, None]
        seen |= is_far & (positions < sinks.num)[:, None, None, :]
        s = jnp.where(is_far, _far(scores, sinks, q, k), s)
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen &= (same & (segment_ids != 0)[:, :, None])[:, None]
    return softmax(s, seen, v)


def flash_attention_at(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_at: Any,
    k_at: Any,
    *,
    mask: Any,
    scale: float,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    ceiling: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.flash_attention.flash_attention_at`, in O(T·S) memory and float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    s = scale * jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    i, j = q_at.positions[:, None, :, None], k_at.positions[:, None, None, :]
    if slopes is not None:
        distance = i - j if ceiling is None else jnp.minimum(i - j, ceiling)
        s -= slopes[None, :, None, None] * distance.astype(jnp.float32)
    own = q_at.segment_ids[:, None, :, None]
    seen = mask.visible(i, j) & (own == k_at.segment_ids[:, None, None, :]) & (own != 0)
    return softmax(s, jnp.broadcast_to(seen, s.shape), v)


def softmax(s: jax.Array, seen: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of scores of the pairs that are seen: output, and log-sum-exp; 0 and HIDDEN where none is."""
    some = seen.any(-1)
    s = jnp.where(seen, s, HIDDEN)
    p = jnp.where(seen, jax.nn.softmax(s, axis=-1), 0.0)
    lse = jnp.where(some, jax.nn.logsumexp(s, axis=-1), HIDDEN)
    return jnp.einsum("bnts,bnsh->bnth", p, v, precision="highest"), lse


def _far(scores: Any, sinks: Any, q: jax.Array, k: jax.Array) -> jax.Array:
    """[batch, heads, length, length], all keys as if they were sinks out of the window."""
    q = q if sinks.q is None else sinks.q.astype(jnp.float32)
    if sinks.k is not None:
        k = jnp.repeat(sinks.k.astype(jnp.float32), q.shape[1] // sinks.k.shape[1], axis=1)
    s = scores(q, k)
    if sinks.factor is not None:
        s *= sinks.factor[None, :, None, None]
    return s if sinks.bias is None else s + sinks.bias[None, :, None, None]


def _network(fire: Any, entry: jax.Array) -> jax.Array:
    """[batch, heads, length, length] of each pair's entry in `fire.numerator`."""
    quotient = fire.numerator[entry][None] * fire.reciprocal[:, :, None]
    w_in, b_in = (x[None, None, None] for x in (fire.w_in, fire.b_in))
    units = jax.nn.relu(quotient[..., None] * w_in + b_in)
    added = jnp.einsum("btsw,nw->bnts", units, fire.w_out, precision="highest")
    return added + fire.b_out[None, :, None, None]
