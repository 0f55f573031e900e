"""Packed rows: which key blocks hold tokens of the segments of a query block."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def block_bounds(segment_ids: jax.Array, block_q: int, block_k: int) -> jax.Array:
    """First and one past the last key block that a query block's segments leave it.

    A segment is all tokens of a row with one id, wherever they stand; 0 is padding. O(T·log T).

    Args:
        segment_ids: int32 [batch, length], length a multiple of both blocks.

    Returns:
        int32 [batch, length / block_q, 2]; (0, 0) for a block of padding.
    """
    T = segment_ids.shape[1]

    def row(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = jnp.arange(T, dtype=jnp.int32)
        ids_sorted, slots_sorted = jax.lax.sort((ids, slots), num_keys=2)
        first = slots_sorted[jnp.searchsorted(ids_sorted, ids, side="left")]
        last = slots_sorted[jnp.searchsorted(ids_sorted, ids, side="right") - 1]
        real = ids != 0
        return jnp.where(real, first, T), jnp.where(real, last + 1, 0)

    first, end = jax.vmap(row)(segment_ids)
    first = first.reshape(first.shape[0], -1, block_q).min(-1) // block_k
    end = -(-end.reshape(end.shape[0], -1, block_q).max(-1) // block_k)
    return jnp.stack([jnp.minimum(first, end), end], -1).astype(jnp.int32)
