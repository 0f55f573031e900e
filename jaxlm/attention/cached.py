"""A few new tokens attending to a cache and to each other: one softmax over both."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
        part = part_of_slots(spec, new, cached, near_keys, far_keys)
        return attend_parts(spec, new, [part])


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the keys that queries attend to.

    Attributes:
        seen: which of them each query sees.
        scores: attention logits, as `jaxlm.attention.reference.scores`.
        weighted: Σ p·v over them, from weights of R = G·T rows a kv head.
    """

    seen: Bool[Array, "B T S"]
    scores: Float[Array, "B N T S"]
    weighted: Callable[[Float[Array, "B K R S"]], Float[Array, "B K R H"]]


def part_of(spec: AttentionSpec, x: AttentionInputs) -> Part:
    """Keys and values as they are."""
    return Part(visible(spec, x), scores(spec, x), functools.partial(_weighted, x.v))


def part_of_slots(
    spec: AttentionSpec,
    new: AttentionInputs,
    cached: CachedLayer,
    near_keys: NearKeys | None,
    far_keys: FarKeys | None,
) -> Part:
    """What lies in slots, read where it lies."""
    # XLA folds the exchange of axes into the products.
    kept, v = (_of_layer(a, cached).swapaxes(1, 2) for a in (cached.keys, cached.values))
    at, segments = cached.positions, cached.segment_ids
    return part_of(spec, met(new, kept, v, at, segments, near_keys, far_keys))


def _of_layer(x: Float[Array, "L _ K _ H"], cached: CachedLayer) -> Float[Array, "B K S H"]:
    """Keys or values of one layer, row by row."""
    if cached.pages is None:
        return jax.lax.dynamic_index_in_dim(x, cached.layer, keepdims=False)
    head = jnp.arange(x.shape[2])[None, :, None]
    rows = x[cached.layer, cached.pages[:, None], head]  # [B, K, n, page, H]
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def met(
    new: AttentionInputs,
    kept: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    near_keys: NearKeys | None = None,
    far_keys: FarKeys | None = None,
) -> AttentionInputs:
    """The queries of `new` with other keys: those that a cache has kept, as they are met."""
    return dataclasses.replace(
        new,
        k=kept if near_keys is None else near_keys(kept, positions),
        v=v,
        k_far=None if far_keys is None else far_keys(kept, positions),
        tree=None,
        k_positions=positions,
        k_segment_ids=segment_ids,
    )


def attend_parts(
    spec: AttentionSpec, new: AttentionInputs, cached: Sequence[Part]
) -> Float[Array, "B T N H"]:
    """One softmax over parts of a cache and, after them, the new tokens; for every device. Nothing
    is concatenated but scores.
    """
    parts = [*cached, part_of(spec, new)]
    (B, T, N, H), K, sinks = new.q.shape, new.k.shape[2], new.sink_logits
    seen = jnp.concatenate([part.seen for part in parts], -1)[:, None]
    s = jnp.concatenate([part.scores for part in parts], -1)
    s = jnp.where(seen, s, HIDDEN)
    top = s.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, :, None, None])
    p = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[None, :, None, None] - top)
    p = (p / jnp.where(total == 0, 1.0, total)).astype(new.v.dtype)
    p = p.reshape(B, K, N // K * T, -1)
    ends = itertools.accumulate(part.seen.shape[-1] for part in parts[:-1])
    weights = jnp.split(p, list(ends), -1)
    out = functools.reduce(
        jnp.add, (part.weighted(w) for part, w in zip(parts, weights, strict=True))
    )
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(new.q.dtype)


def _weighted(v: Float[Array, "B S K H"], p: Float[Array, "B K R S"]) -> Float[Array, "B K R H"]:
    """Σ p·v over the keys. Values come first in what einsum makes of it, and XLA's CPU compiler
    then copies them turned, at ten times the cost of the product.
    """
    return jax.lax.dot_general(p, v.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1))))
