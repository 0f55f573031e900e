"""A few new tokens attending to a cache and to each other: one softmax over both."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import HIDDEN, scores, visible


def attend_cached(
    spec: AttentionSpec, new: AttentionInputs, cached: AttentionInputs
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to [cache ‖ new tokens], in O(T·(S + T)) memory: T is small.

    Keys and values of the cache are read where they lie: nothing is concatenated but scores.

    Args:
        spec: the static description.
        new: the new tokens attending to each other.
        cached: the same queries attending to the cache, [batch, capacity, kv_heads, head_dim].

    Returns:
        [batch, length, heads, head_dim] in q's dtype.
    """
    B, T, N, H = new.q.shape
    K, S = new.k.shape[2], cached.k.shape[1]
    seen = jnp.concatenate([visible(spec, cached), visible(spec, new)], -1)[:, None]
    s = jnp.concatenate([scores(spec, cached), scores(spec, new)], -1)
    s = jnp.where(seen, s, HIDDEN)
    top = s.max(-1, keepdims=True)
    if new.sink_logits is not None:
        top = jnp.maximum(top, new.sink_logits[None, :, None, None])
    p = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = p.sum(-1, keepdims=True)
    if new.sink_logits is not None:
        total += jnp.exp(new.sink_logits[None, :, None, None] - top)
    p = (p / jnp.where(total == 0, 1.0, total)).astype(new.v.dtype)
    p = p.reshape(B, K, N // K, T, -1)
    out = jnp.einsum("bkgts,bskh->btkgh", p[..., :S], cached.v)
    out += jnp.einsum("bkgts,bskh->btkgh", p[..., S:], new.v)
    return out.reshape(B, T, N, H).astype(new.q.dtype)
