"""A few new tokens attending to a cache and to each other: one softmax over both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.decode import attend_decode, unsupported
from jaxlm.attention.far_sinks import FarKeys
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.reference import HIDDEN, scores, visible

# Kept keys [B, S, K, H] and their positions [B, S] → as they are met.
NearKeys = Callable[[Array, Array], Array]


def attend_cached(
    spec: AttentionSpec,
    new: AttentionInputs,
    cached: CachedLayer,
    near_keys: NearKeys | None = None,
    far_keys: FarKeys | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to [cache ‖ new tokens], in O(T·(S + T)) memory: T is small.

    On a TPU by the kernel for what it does, see `jaxlm.attention.decode.unsupported`.

    Args:
        spec: the static description.
        new: the new tokens attending to each other.
        cached: the cache.
        near_keys: how the cache's keys are met; None: as they are kept.
        far_keys: how they are met at the distance ceiling, if that is otherwise: needed where
            `new` has `q_far`.

    Returns:
        [batch, length, heads, head_dim] in q's dtype.
    """
    if cached.mask is not None:
        spec = dataclasses.replace(spec, mask=spec.mask & cached.mask)
    if near_keys is None and unsupported(spec, new, cached) is None:
        return attend_decode(spec, new, cached, far_keys)
    # XLA folds the exchange of axes into the products.
    kept, v = (
        jax.lax.dynamic_index_in_dim(a, cached.layer, keepdims=False).swapaxes(1, 2)
        for a in (cached.keys, cached.values)
    )
    k = kept if near_keys is None else near_keys(kept, cached.positions)
    k_far = None if far_keys is None else far_keys(kept, cached.positions)
    where = {"k_positions": cached.positions, "k_segment_ids": cached.segment_ids}
    return attend_materialized(
        spec, new, dataclasses.replace(new, k=k, v=v, k_far=k_far, tree=None, **where)
    )


def attend_materialized(
    spec: AttentionSpec, new: AttentionInputs, cached: AttentionInputs
) -> Float[Array, "B T N H"]:
    """The form for every device: keys and values of the cache are read where they lie, nothing is
    concatenated but scores.
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
    p = p.reshape(B, K, N // K * T, -1)
    out = _weighted(p[..., :S], cached.v) + _weighted(p[..., S:], new.v)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(new.q.dtype)


def _weighted(p: Float[Array, "B K R S"], v: Float[Array, "B S K H"]) -> Float[Array, "B K R H"]:
    """Σ p·v over the keys. Values come first in what einsum makes of it, and XLA's CPU compiler
    then copies them turned, at ten times the cost of the product.
    """
    return jax.lax.dot_general(p, v.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1))))
