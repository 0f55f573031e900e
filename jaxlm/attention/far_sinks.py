"""Kept sinks out of the window, where a far key is met in another rotation than a near one: a few
keys, gathered from the cache for each query.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention import mask as masks
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.layer_view import FarKeys
from jaxlm.attention.on_mesh import on_mesh
from jaxlm.attention.reference import attend_reference


def attend_far_sinks(
    spec: AttentionSpec,
    new: AttentionInputs,
    cached: CachedLayer,
    window: int,
    num_sinks: int,
    far_keys: FarKeys,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of T new queries to the cached tokens of their own document whose position is below
    `num_sinks` and that are `window` or farther away; each position is in one slot of a document.

    Args:
        spec: the static description, but for the mask.
        new: the queries.
        cached: the cache.
        window, num_sinks: see above.
        far_keys: how they are met at the ceiling, by `new.q_far`.

    Returns:
        As `attend_reference`.
    """
    B, T, N, H = new.q.shape
    row, heads = ("batch",), ("batch", "kv_heads")
    cache = (None, *heads) if cached.pages is None else (None, None, "kv_heads")
    gather = on_mesh(
        _gather,
        {"batch": B, "kv_heads": new.k.shape[2]},
        [cache, cache, (), row, row],
        [heads] * 2,
    )
    slots, held = _slots(new, cached, num_sinks)
    gathered = gather(cached.keys, cached.values, cached.layer, cached.pages, slots.reshape(B, -1))
    k, v = (a.swapaxes(1, 2) for a in gathered)
    positions = jnp.broadcast_to(jnp.arange(num_sinks)[None, None], (B, T, num_sinks))
    far = held & (new.q_positions[..., None] - positions >= window)
    positions = positions.reshape(B, -1)
    q_far, k_far = new.q_far, far_keys(k, positions)
    assert q_far is not None
    assert k_far is not None

    def each(x: Array) -> Array:
        """[B, T·n, …] → [B·T, n, …]: each query is a row of its own, with sinks of its own."""
        return x.reshape(B * T, -1, *x.shape[2:])

    out, lse = attend_reference(
        dataclasses.replace(spec, mask=masks.full()),
        AttentionInputs(
            q=each(new.q),
            k=each(k),
            v=each(v),
            q_positions=each(new.q_positions),
            k_positions=each(positions),
            q_segment_ids=jnp.ones((B * T, 1), jnp.int32),
            k_segment_ids=far.reshape(B * T, -1).astype(jnp.int32),
            head_parameters=new.head_parameters,
            q_far=each(q_far),
            k_far=each(k_far),
        ),
    )
    return out.reshape(B, T, N, H), lse.reshape(B, T, N)


def _slots(
    new: AttentionInputs, cached: CachedLayer, num_sinks: int
) -> tuple[Int[Array, "B T n"], Bool[Array, "B T n"]]:
    """Where each query's document has its first tokens, and whether they are in the cache."""
    own = cached.segment_ids[:, None] == new.q_segment_ids[:, :, None]
    own &= new.q_segment_ids[:, :, None] != 0
    first = cached.positions[:, None] == jnp.arange(num_sinks)[None, :, None]
    found = own[:, :, None] & first[:, None]
    return found.argmax(-1), found.any(-1)


def _gather(
    keys: Float[Array, "L _ K _ H"],
    values: Float[Array, "L _ K _ H"],
    layer: Int[Array, ""],
    pages: Int[Array, "B _"] | None,
    slots: Int[Array, "B n"],
) -> tuple[Float[Array, "B K n H"], Float[Array, "B K n H"]]:
    """One device's rows and heads. A head's key alone is one stretch of memory: gathered by all
    heads, the whole cache would be copied into another order first.
    """
    if pages is None:
        row = jnp.arange(keys.shape[1])[:, None]
    else:
        page = keys.shape[3]
        row, slots = jnp.take_along_axis(pages, slots // page, 1), slots % page
    head = jnp.arange(keys.shape[2])
    at = layer, row[:, None], head[None, :, None], slots[:, None]
    return keys[at], values[at]
