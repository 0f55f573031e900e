"""A few new tokens attending to a cache and to each other: one softmax over both."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.decode import attend_decode, unsupported
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.layer_view import FarKeys, NearKeys
from jaxlm.attention.mask import AttentionMask
from jaxlm.attention.reference import HIDDEN, scores, visible


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotLayer:
    """A layer of a cache that has a slot for each token: see `jaxlm.attention.layer_view`.

    Attributes:
        cached: what lies in the slots.
        mask: what the cache keeps for each query, whatever still lies there; None: all. Static.
    """

    cached: CachedLayer
    mask: AttentionMask | None = dataclasses.field(default=None, metadata={"static": True})

    def attend(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None = None,
        far_keys: FarKeys | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of T new queries to [cache ‖ new tokens], in O(T·(S + T)) memory: T is small.

        On a TPU by the kernel for what it does, see `jaxlm.attention.decode.unsupported`.
        """
        cached = self.cached
        if self.mask is not None:
            spec = dataclasses.replace(spec, mask=spec.mask & self.mask)
        if near_keys is None and unsupported(spec, new, cached) is None:
            return attend_decode(spec, new, cached, far_keys)
        # XLA folds the exchange of axes into the products.
        kept, v = (_of_layer(a, cached).swapaxes(1, 2) for a in (cached.keys, cached.values))
        k = kept if near_keys is None else near_keys(kept, cached.positions)
        k_far = None if far_keys is None else far_keys(kept, cached.positions)
        where = {"k_positions": cached.positions, "k_segment_ids": cached.segment_ids}
        part = dataclasses.replace(new, k=k, v=v, k_far=k_far, tree=None, **where)
        return attend_materialized(spec, [part, new])


def _of_layer(x: Float[Array, "L _ K _ H"], cached: CachedLayer) -> Float[Array, "B K S H"]:
    """Keys or values of one layer, row by row."""
    if cached.pages is None:
        return jax.lax.dynamic_index_in_dim(x, cached.layer, keepdims=False)
    head = jnp.arange(x.shape[2])[None, :, None]
    rows = x[cached.layer, cached.pages[:, None], head]  # [B, K, n, page, H]
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def attend_materialized(
    spec: AttentionSpec, parts: Sequence[AttentionInputs]
) -> Float[Array, "B T N H"]:
    """One softmax over parts of the keys, the same queries in all; for every device. Keys and
    values are read where they lie, nothing is concatenated but scores.
    """
    q, sinks = parts[0].q, parts[0].sink_logits
    B, T, N, H = q.shape
    K = parts[0].k.shape[2]
    seen = jnp.concatenate([visible(spec, part) for part in parts], -1)[:, None]
    s = jnp.concatenate([scores(spec, part) for part in parts], -1)
    s = jnp.where(seen, s, HIDDEN)
    top = s.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, :, None, None])
    p = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[None, :, None, None] - top)
    p = (p / jnp.where(total == 0, 1.0, total)).astype(parts[0].v.dtype)
    p = p.reshape(B, K, N // K * T, -1)
    ends = itertools.accumulate(part.v.shape[1] for part in parts[:-1])
    weights = jnp.split(p, list(ends), -1)
    sums = [_weighted(w, part.v) for w, part in zip(weights, parts, strict=True)]
    out = functools.reduce(jnp.add, sums)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _weighted(p: Float[Array, "B K R S"], v: Float[Array, "B S K H"]) -> Float[Array, "B K R H"]:
    """Σ p·v over the keys. Values come first in what einsum makes of it, and XLA's CPU compiler
    then copies them turned, at ten times the cost of the product.
    """
    return jax.lax.dot_general(p, v.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1))))
