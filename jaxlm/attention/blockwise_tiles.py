"""The tiles of blockwise attention: arrays cut into blocks, and which tiles to visit.

Letters: B batch, C head groups, P kv heads per group, G query heads per kv head, R = G·block_q
rows, I query blocks, J key blocks, L length in whole blocks, n heads of a group, H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.mask import Interval

FARTHEST = 2**30  # beyond any position, and a difference of two still fits int32


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The largest tile. Its scores, rows·keys float32, stay in a core's L2 cache, and it is large
    enough that XLA's CPU matrix product takes all cores: below about 512 × 256 it takes one.

    Attributes:
        queries: tokens of a query block.
        keys: tokens of a key block.
        rows: query tokens of all heads of a tile together.
    """

    queries: int = 512
    keys: int = 256
    rows: int = 512


DEFAULT_BLOCKS = Blocks()
SHORTEST = 128  # query block, however many heads share a kv head


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static: how one call is cut. block_q and block_k tokens, `group` kv heads a tile."""

    block_q: int
    block_k: int
    group: int
    groups: int


def choose_tiling(x: AttentionInputs, blocks: Blocks) -> Tiling:
    """Shorter query blocks where many query heads share a kv head, then as many heads as fit."""
    T, S, K = x.q.shape[1], x.k.shape[1], x.k.shape[2]
    heads = x.q.shape[2] // K
    # A power of two, not fewer rows: other blocks leave more of a length to padding, and of key
    # blocks to the mask.
    shared = 1 << (-(-blocks.rows // heads) - 1).bit_length()
    block_q = min(blocks.queries, max(shared, SHORTEST), -(-T // 8) * 8)
    block_k = min(blocks.keys, -(-S // 8) * 8)
    rows = heads * block_q
    fits = [p for p in range(1, K + 1) if K % p == 0 and p * rows <= blocks.rows]
    group = max(fits, default=1)
    return Tiling(block_q, block_k, group, K // group)


def _pad(x: Shaped[Array, "B T ..."], block: int) -> Array:
    """Zeros up to whole blocks; segment 0 is padding, so padded slots are hidden."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def to_rows(x: Shaped[Array, "B T N H"], tiling: Tiling, block: int) -> Shaped[Array, "BC L n H"]:
    """A row for each group of heads, padded to whole blocks; no copy where one group holds all."""
    x = _pad(x, block)
    B, T, N, H = x.shape
    x = x.reshape(B, T, tiling.groups, N // tiling.groups, H).swapaxes(1, 2)
    return x.reshape(B * tiling.groups, T, -1, H)


def from_rows(x: Shaped[Array, "BC L n H"], tiling: Tiling, length: int) -> Array:
    """The inverse of `to_rows`, cut to `length`."""
    _, T, n, H = x.shape
    x = x.reshape(-1, tiling.groups, T, n, H).swapaxes(1, 2)
    return x.reshape(x.shape[0], T, -1, H)[:, :length]


def to_blocks(x: Shaped[Array, "L n H"], tiling: Tiling, block: int) -> Shaped[Array, "I P R H"]:
    """One row, cut into contiguous blocks, heads outside: R = n / P · block."""
    T, _, H = x.shape
    x = x.reshape(T // block, block, tiling.group, -1, H).transpose(0, 2, 3, 1, 4)
    return x.reshape(T // block, tiling.group, -1, H)


def from_blocks(x: Shaped[Array, "I P R H"], block: int) -> Shaped[Array, "L n H"]:
    """The inverse of `to_blocks`."""
    blocks, P, R, H = x.shape
    x = x.reshape(blocks, P, R // block, block, H).transpose(0, 3, 1, 2, 4)
    return x.reshape(blocks * block, -1, H)


class Tokens(NamedTuple):
    """Who the tokens of one side are, block by block."""

    positions: Int[Array, "*B I block"]
    segments: Int[Array, "*B I block"]


def split_tokens(positions: Int[Array, "B T"], segments: Int[Array, "B T"], block: int) -> Tokens:
    """Cuts positions and segment ids into blocks."""
    cut = (_pad(a, block).reshape(a.shape[0], -1, block) for a in (positions, segments))
    return Tokens(*cut)


class Extent(NamedTuple):
    """Smallest and largest slot, position and segment id of each block's tokens, padding apart."""

    slot: tuple[Array, Array]
    position: tuple[Array, Array]
    segment: tuple[Array, Array]


def extents(tokens: Tokens) -> Extent:
    """A block of padding alone gets an empty extent, which touches nothing."""
    shape = tokens.positions.shape
    slots = jnp.arange(shape[1] * shape[2], dtype=jnp.int32).reshape(1, *shape[1:])

    def ends(x: Array) -> tuple[Array, Array]:
        low = jnp.where(tokens.segments != 0, x, FARTHEST).min(-1)
        return low, jnp.where(tokens.segments != 0, x, -FARTHEST).max(-1)

    return Extent(
        ends(jnp.broadcast_to(slots, shape)), ends(tokens.positions), ends(tokens.segments)
    )


def touched(spec: AttentionSpec, q: Extent, k: Extent) -> Bool[Array, "B I J"]:
    """The tiles in which a visible pair may be; False is certain. Extents broadcast to [B, I, J].

    Where q and k are the same tokens, slots tell distances within a segment, whichever other
    documents lie in the same blocks; positions tell where a document starts.
    """
    shared = (q.segment[0] <= k.segment[1]) & (k.segment[0] <= q.segment[1])
    seen = jnp.zeros(shared.shape, bool)
    for interval in spec.mask.intervals:
        near = interval.touches(*q.position, *k.position)
        if spec.aligned:
            by_distance = Interval(ahead=interval.ahead, window=interval.window)
            near = near & by_distance.touches(*q.slot, *k.slot)
        seen = seen | near
    return seen & shared


class Visits(NamedTuple):
    """For each query block, the key blocks to visit: the first `num` of `order`."""

    order: Int[Array, "*B I J"]
    num: Int[Array, "*B I"]


def _visits(table: Bool[Array, "B I J"]) -> Visits:
    return Visits(jnp.argsort(~table, axis=-1, stable=True), table.sum(-1, dtype=jnp.int32))


def plan(spec: AttentionSpec, q_tokens: Tokens, k_tokens: Tokens, far: bool) -> tuple[Visits, ...]:
    """The tiles of the near pass and, if `far`, of the far pass.

    A tile on both sides of the ceiling is in both.
    """
    q = jax.tree.map(lambda a: a[:, :, None], extents(q_tokens))
    k = jax.tree.map(lambda a: a[:, None, :], extents(k_tokens))
    table = touched(spec, q, k)
    if not far:
        return (_visits(table),)
    low, high = q.position[0] - k.position[1], q.position[1] - k.position[0]
    if spec.aligned:
        low = jnp.maximum(low, q.slot[0] - k.slot[1])
        high = jnp.minimum(high, q.slot[1] - k.slot[0])
    return _visits(table & (low < spec.ceiling)), _visits(table & (high >= spec.ceiling))


def has_far_pass(spec: AttentionSpec, x: AttentionInputs) -> bool:
    """Whether pairs at the distance ceiling have queries and keys of their own."""
    return spec.ceiling is not None and x.q_far is not None


def count_tiles(
    spec: AttentionSpec, x: AttentionInputs, blocks: Blocks = DEFAULT_BLOCKS
) -> Int[Array, ""]:
    """How many (row, query block, key block) tiles `attend_blockwise` executes for these inputs."""
    tiling = choose_tiling(x, blocks)
    q = split_tokens(x.q_positions, x.q_segment_ids, tiling.block_q)
    k = split_tokens(x.k_positions, x.k_segment_ids, tiling.block_k)
    passes = plan(spec, q, k, has_far_pass(spec, x))
    return jnp.stack([visits.num.sum() for visits in passes]).sum()
