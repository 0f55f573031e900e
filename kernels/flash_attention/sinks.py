"""The first tokens of a document, seen from any distance: a tile of their own for each query block.

    keys     s s s . . . . . . . . [— window —]
             └ sinks ┘                     ▲ query block

Only the document of a block's first query can have sinks out of the window: the others begin in the
block, which is no longer than the window. So one tile of gathered keys a block is enough, whatever
is packed in a row, and the cost of long rows grows with length · (window + sinks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.call import LANES, SUBLANES
from kernels.flash_attention.segments import starts

NOWHERE = 1 << 30  # a slot after all queries


class SinkRows(NamedTuple):
    """Which slots are the sinks of each query block, and whose.

    Attributes:
        slots: int32 [batch, blocks, sinks], sinks a multiple of 128, NOWHERE where there is none;
            one block where the row is one document: it serves all.
        segments: int32 [batch, blocks], the segment of the block's first query; 0: padding. None
            where the row is one document.
    """

    slots: jax.Array
    segments: jax.Array | None


def _numbers(num_sinks: int) -> jax.Array:
    """0, 1, 2, … in whole vectors, [1, 1, sinks]."""
    return jnp.arange(-(-num_sinks // LANES) * LANES, dtype=jnp.int32)[None, None]


def first_tokens(batch: int, num_sinks: int) -> SinkRows:
    """Of rows that are one document."""
    n = _numbers(num_sinks)
    slots = jnp.broadcast_to(jnp.where(n < num_sinks, n, NOWHERE), (batch, 1, n.size))
    return SinkRows(slots, None)


def find_sinks(
    segment_ids: jax.Array, positions: jax.Array, num_sinks: int, block_q: int
) -> SinkRows:
    """Of rows in which a segment's tokens stand one after the other.

    Args:
        segment_ids: int32 [batch, length], whole blocks; 0 is padding.
        positions: int32 [batch, length], in the segment: it may begin in the middle of a document.
        num_sinks: positions below it are sinks.
        block_q: queries of a block.
    """
    T = segment_ids.shape[1]
    start = starts(segment_ids)[:, ::block_q]
    segments = segment_ids[:, ::block_q]
    first = jnp.take_along_axis(positions, start, axis=1)
    n = _numbers(num_sinks)
    at = start[:, :, None] + n
    real = (n < num_sinks - first[:, :, None]) & (at < T) & (segments != 0)[:, :, None]
    return SinkRows(jnp.where(real, at, NOWHERE), segments)


def gather(x: jax.Array, sinks: SinkRows) -> jax.Array:
    """[batch, kv_heads, length, head_dim] → [batch, kv_heads, blocks, sinks, head_dim]; anything
    finite where there is no sink.
    """
    slots = sinks.slots
    if sinks.segments is None:  # the first tokens: no gather, whose cost compilers cannot tell
        x = x[:, :, : slots.shape[2]]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, slots.shape[2] - x.shape[2]), (0, 0)))
        return x[:, :, None]
    return jax.vmap(lambda row, at: row[:, at])(x, jnp.minimum(slots, x.shape[2] - 1))


def scatter(parts: jax.Array, sinks: SinkRows, length: int) -> jax.Array:
    """The transpose of `gather`, float32: all blocks' gradients, summed at the sinks' slots."""
    K, H = parts.shape[1], parts.shape[4]
    if sinks.segments is None:
        whole = parts.sum(2)[:, :, :length]
        return jnp.pad(whole, ((0, 0), (0, 0), (0, length - whole.shape[2]), (0, 0)))

    def row(part: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.zeros((K, length, H), jnp.float32).at[:, at].add(part, mode="drop")

    return jax.vmap(row)(parts, sinks.slots)


def block_number(sinks: SinkRows, i: Any) -> Any:
    """Which block of `sinks` is query block i's."""
    return 0 if sinks.segments is None else i


def as_rows(sinks: SinkRows) -> jax.Array:
    """int32 [batch, blocks, SUBLANES, sinks]: row 0 the slots, row 1 the segment, if any."""
    rows = sinks.slots[:, :, None]
    if sinks.segments is not None:
        segments = jnp.broadcast_to(sinks.segments[:, :, None], sinks.slots.shape)
        rows = jnp.stack([sinks.slots, segments], axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, SUBLANES - rows.shape[2]), (0, 0)))
