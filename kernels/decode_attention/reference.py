"""What `decode_attention` computes, written down plainly: the oracle of its tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.decode_attention.softmax import NOTHING


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring, queries: Queries, slots: Slots
) -> tuple[jax.Array, jax.Array]:
    """As `decode_attention`, in float32: out [B, N, T, H] and lse [B, N, T]."""
    N, S = q.shape[1], k.shape[2]
    k = jnp.repeat(k.astype(jnp.float32), N // k.shape[1], axis=1)
    v = jnp.repeat(v.astype(jnp.float32), N // v.shape[1], axis=1)
    s = jnp.einsum("bnth,bnsh->bnts", q.astype(jnp.float32), k) * scoring.scale
    if scoring.softcap is not None:
        s = scoring.softcap * jnp.tanh(s / scoring.softcap)
    if slots.bias is not None:
        s = s + slots.bias
    i, j = queries.positions[:, None, :, None], slots.positions[:, None, None, :]
    seen = (j >= 0) & (j <= i)
    if scoring.window is not None:
        seen &= (i - j < scoring.window) | (j < scoring.num_sinks)
    if slots.lengths is not None:
        seen &= jnp.arange(S)[None, None, None] < slots.lengths[:, None, None, None]
    if queries.segment_ids is not None and slots.segment_ids is not None:
        own, theirs = queries.segment_ids[:, None, :, None], slots.segment_ids[:, None, None, :]
        seen &= (own == theirs) & (theirs != 0)
    return softmax_over(jnp.where(seen, s, -jnp.inf), v)


def softmax_over(s: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores [B, N, T, S], -inf where hidden, and values [B, N, S, H] → out and lse."""
    top = jnp.maximum(s.max(-1, keepdims=True), NOTHING)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bnsh->bnth", p / jnp.where(total == 0, 1.0, total), v)
    lse = jnp.where(total == 0, NOTHING, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return out, lse[..., 0]
