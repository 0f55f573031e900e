"""Positions as data: tokens that stand anywhere, and what a mask of positions hides of them.

A key block is hidden from a query block, seen whole, or tested pair by pair. What it is follows
from the least and the largest position and segment of each, outside of the kernels: a list that is
there before a kernel starts, and the kernels' loop leaves out what is hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

HIDDEN_BLOCK, PARTLY, WHOLE = 0, 1, 2
FAR_OFF = 1 << 29  # beyond all positions; differences of such fit int32
PER_WORD = 16  # states: scalar memory is a mebibyte


class Mask(Protocol):
    """Which positions see which, as `jaxlm.attention.mask.AttentionMask` says it: hashable, and of
    jnp or Python numbers.
    """

    def visible(self, i: Any, j: Any) -> Any:
        """Whether queries at positions i see keys at positions j."""

    def touches(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """False only if no pair of these ranges is visible."""

    def covers(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """True only if all pairs of these ranges are visible."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a call does with positions.

    Attributes:
        mask: of positions.
        ceiling: distances above it count as it; None: none do.
    """

    mask: Mask
    ceiling: int | None


class At(NamedTuple):
    """Where tokens are: int32 [batch, length] each; segment 0 is padding."""

    positions: jax.Array
    segment_ids: jax.Array


class Places(NamedTuple):
    """Of one call.

    Attributes:
        q, k: int32 [B, T] and [B, S], positions.
        words: int32 [words], the state of each pair of blocks, see `in_words`.
        slopes: float32 [N] in base 2, or None.
    """

    q: jax.Array
    k: jax.Array
    words: jax.Array
    slopes: jax.Array | None


def states(mask: Mask, q: At, k: At, block_q: int, block_k: int) -> jax.Array:
    """What each query block sees of each key block: int32 [B, T / block_q, S / block_k]."""
    i, j = _ranges(q, block_q, 2), _ranges(k, block_k, 1)
    at = i.positions + j.positions
    (q_least, q_most), (k_least, k_most) = i.segment_ids, j.segment_ids
    touches = mask.touches(*at) & (q_least <= k_most) & (k_least <= q_most)
    one = (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    covers = mask.covers(*at) & one & i.all_real & j.all_real
    return jnp.where(touches & covers, WHOLE, jnp.where(touches, PARTLY, HIDDEN_BLOCK))


class _Ranges(NamedTuple):
    positions: tuple[jax.Array, jax.Array]
    segment_ids: tuple[jax.Array, jax.Array]
    all_real: jax.Array


def _ranges(tokens: At, block: int, axis: int) -> _Ranges:
    """Least and most of each block's tokens that are no padding; `axis` is added to the result."""
    real = tokens.segment_ids != 0

    def reduce(x: jax.Array, over: Callable[..., jax.Array]) -> jax.Array:
        return jnp.expand_dims(over(x.reshape(x.shape[0], -1, block), 2), axis)

    def ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = reduce(jnp.where(real, x, FAR_OFF), jnp.min)
        return least, reduce(jnp.where(real, x, -FAR_OFF), jnp.max)

    return _Ranges(ends(tokens.positions), ends(tokens.segment_ids), reduce(real, jnp.all))


def bounds(state: jax.Array) -> jax.Array:
    """First and one past the last key block that is not hidden: int32 [B, T / block_q, 2], (0, 0)
    where all are.
    """
    number = jnp.arange(state.shape[2], dtype=jnp.int32)
    seen = state != HIDDEN_BLOCK
    end = jnp.where(seen, number + 1, 0).max(2)
    return jnp.stack([jnp.where(seen, number, end[:, :, None]).min(2), end], 2)


def in_words(state: jax.Array) -> jax.Array:
    """States of a query block fill whole words, from the lowest bits on; words in one row: scalar
    memory has no room for a short last axis.
    """
    *lead, blocks = state.shape
    x = jnp.pad(state, [(0, 0)] * len(lead) + [(0, -blocks % PER_WORD)])
    shifts = jnp.arange(0, 2 * PER_WORD, 2, dtype=jnp.int32)
    words = jnp.left_shift(x.reshape(-1, PER_WORD), shifts[None])
    return words.sum(1, dtype=jnp.int32)  # no two have a bit in common


def _state(call: Any, words: Any, b: Any, i: Any, kb: Any) -> Any:
    """Of query block i of row b and key block kb."""
    per_block = -(-call.band.num_blocks_k // PER_WORD)
    word = words[(b * call.num_blocks + i) * per_block + jax.lax.div(kb, PER_WORD)]
    shift = 2 * jax.lax.rem(kb, PER_WORD)
    return jnp.right_shift(word, shift) & 3


def visit(
    call: Any, x: dict[str, Any], b: Any, i: Any, j: Any, work: Callable[[list[Any]], None]
) -> None:
    """As `Call.visit`, of query block i of row b and stretch j."""
    n = call.blocks
    low = j * n.blocks_per_stretch

    def block(kb: Any, _: Any) -> None:
        found = _state(call, x["states"], b, i, kb)
        for state, offset in ((PARTLY, 0), (WHOLE, None)):

            @pl.when(found == state)
            def tiles(offset: int | None = offset) -> None:
                work(
                    [
                        (rows, (kb - low) * n.block_k + keys, offset)
                        for rows in range(0, n.block_q, n.tile_q)
                        for keys in range(0, n.block_k, n.tile_k)
                    ]
                )

    first, end = _bounds(call, x, b, i)
    first, end = jnp.maximum(first, low), jnp.minimum(end, low + n.blocks_per_stretch)
    jax.lax.fori_loop(first, end, block, None)


def stretches(call: Any, refs: dict[str, Any], b: Any, i: Any) -> tuple[Any, Any]:
    """First and last stretch of which query block i of row b sees something."""
    per = call.blocks.blocks_per_stretch
    first, end = _bounds(call, refs, b, i)
    return jax.lax.div(first, per), jax.lax.div(jnp.maximum(end - 1, 0), per)


def _bounds(call: Any, refs: dict[str, Any], b: Any, i: Any) -> tuple[Any, Any]:
    """`bounds` of query block i of row b."""
    at = 2 * (b * call.num_blocks + i)
    return refs["bounds"][at], refs["bounds"][at + 1]


def penalty(rule: Rule, slope: Any, i: jax.Array, j: jax.Array) -> jax.Array:
    """slope·distance of a tile of positions, float32."""
    distance = i - j
    if rule.ceiling is not None:
        distance = jnp.minimum(distance, rule.ceiling)
    return slope * distance.astype(jnp.float32)
