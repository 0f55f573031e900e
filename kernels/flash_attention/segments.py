"""Packed rows: which key blocks hold tokens of the segments of a query block."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slots_of(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, length]: 0, 1, 2, … in each row."""
    return jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)


def starts(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, length]: the slot of the first token of each token's segment, in rows in which
    a segment's tokens stand one after the other.
    """
    changes = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(changes, slots_of(segment_ids), 0), axis=1)


def count_up(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, length]: positions from 0 in each such segment."""
    return slots_of(segment_ids) - starts(segment_ids)


def block_bounds(
    segment_ids: jax.Array, open_ends: jax.Array | None, block_q: int, block_k: int
) -> jax.Array:
    """First and one past the last key block that a query block's segments leave it, and one past
    the last block before their largest `open_ends`.

    A segment is all tokens of a row with one id, wherever they stand; 0 is padding. O(T·log T).

    Args:
        segment_ids: int32 [batch, length], length a multiple of both blocks.
        open_ends: int32 [batch, length], slots; None: 0.

    Returns:
        int32 [batch, length / block_q, 3]; (0, 0, ·) for a block of padding.
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

    def last(x: jax.Array) -> jax.Array:
        return -(-x.reshape(x.shape[0], -1, block_q).max(-1) // block_k)

    end = last(end)
    opened = jnp.zeros_like(end) if open_ends is None else last(open_ends)
    return jnp.stack([jnp.minimum(first, end), end, opened], -1).astype(jnp.int32)
