"""A few queries a sequence against a long cache: keys and values stream through VMEM once.

    grid (piece of the queries of a sequence, split, block of keys, kv heads)

    rows of one matmul          blocks of keys of one kv head
    ┌────────────────────┐     ┌──────────┬──────────┬──────────┬──────────┐
    │ G query heads × T  │  ×  │ computed │ fetched  │          │          │
    └────────────────────┘     └──────────┴──────────┴──────────┴──────────┘
                                └───── split 0 ─────┘ └───── split 1 ─────┘

The time is that of reading the cache from HBM. So K and V are never repeated: the query heads of a
group and its T tokens are rows of one matmul. A block is one stretch of memory, as long as a copy
needs to be to run at full speed. Heads are the innermost axis, each with a softmax of its own in
VMEM, so that the positions of a block are fetched once for all of them. A split has its own
softmax too, merged by log-sum-exp: two cores then have work when there are few sequences.

Pages are blocks like any other: the page table, prefetched as scalars, says where each lies. A page
holds all heads, so a step takes several of them; and several small pages: the pool is then passed
several times, each with its own place in the table, and the pipeline fetches them at once.

Letters: B sequences, K kv heads, R rows (G·T, padded), S key slots, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.decode_attention.blocks import Cut
from kernels.decode_attention.call import call_kernel
from kernels.decode_attention.scoring import Scoring
from kernels.decode_attention.softmax import LANES, finish, start, weigh, wide
from kernels.precision import product

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
MOST_SCORES = 1 << 15  # of a tile: they fill 32 of the 64 vector registers


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a cache is cut.

    Attributes:
        num_slots: S.
        block: keys of a grid step.
        parts: arrays that make a block, 1 or the pages in it.
        page_blocks: blocks that make a page, 1 where a block is of whole pages.
        heads: kv heads of a grid step; more than one only if they lie side by side.
        splits: independent ranges of blocks.
        ragged: whether the blocks in use are data.
    """

    num_slots: int
    block: int
    parts: int
    page_blocks: int
    heads: int
    splits: int
    ragged: bool

    @property
    def num_blocks(self) -> int:
        """Of all splits."""
        return -(-self.num_slots // self.block)

    @property
    def blocks_per_split(self) -> int:
        """The last split may have fewer."""
        return -(-self.num_blocks // self.splits)

    def held(self, b: Any, s: Any, j: Any, scalars: Any) -> Any:
        """The block to hold at a step: an unused one is not fetched, its predecessor stays."""
        block = s * self.blocks_per_split + j
        if self.ragged:
            return jnp.maximum(jnp.minimum(block, scalars[0][b] - 1), 0)
        return jnp.minimum(block, self.num_blocks - 1) if self.splits > 1 else block


def dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    """In float32 whatever the operands are; float32 operands are not rounded."""
    full, once = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    return product(a, b, dims, full if a.dtype == jnp.float32 else once)


def each_tile_of_rows(cut: Cut, step: Callable[[Any], None]) -> None:
    """A loop, of which the compiler has one turn in VMEM; a single tile is plain code."""
    if cut.tiles == 1:
        step(slice(0, cut.tile))
        return

    @pl.loop(0, cut.tiles)
    def _(t: Any) -> None:
        step(pl.ds(pl.multiple_of(t * cut.tile, cut.tile), cut.tile))


def tiles_of_keys(rows: int, keys: int) -> list[slice]:
    """Of a block: so many that the scores of a tile live in registers."""
    tile = min(keys, max(LANES, MOST_SCORES // rows // LANES * LANES))
    return [slice(key, min(key + tile, keys)) for key in range(0, keys, tile)]


def body(scoring: Scoring, layout: Layout, cut: Cut, num_scalars: int, *all_refs: Any) -> None:
    """Body of the grid step (piece, split s, block j, heads h of the piece)."""
    scalars, refs = all_refs[:num_scalars], list(all_refs[num_scalars:])
    (rows_ref, q_ref, keys_ref), cached = refs[:3], refs[3:-5]
    out_ref, lse_ref, top_ref, total_ref, acc_ref = refs[-5:]
    bias_ref = cached.pop() if len(cached) > 2 * layout.parts else None
    k_refs, v_refs = cached[: layout.parts], cached[layout.parts :]
    piece, s, j, h = (pl.program_id(axis) for axis in range(4))
    b = piece // cut.pieces
    block = s * layout.blocks_per_split + j
    heads = [(i, h * layout.heads + i) for i in range(layout.heads)]

    @pl.when(j == 0)
    def _() -> None:
        for _, head in heads:
            start(top_ref.at[head], total_ref.at[head])
            acc_ref[head] = jnp.zeros(acc_ref.shape[1:], jnp.float32)

    def attend(i: int, head: Any) -> None:
        def rows(at: Any) -> None:
            k = jnp.concatenate([part[i] for part in k_refs]).astype(q_ref.dtype)
            v = jnp.concatenate([part[i] for part in v_refs]).astype(q_ref.dtype)
            if layout.num_slots % layout.block:
                # What lies past the array is not a number, perhaps, and zero times that isn't zero.
                slot = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) + block * layout.block
                v = jnp.where(slot < layout.num_slots, v, jnp.zeros_like(v))
            for keys in tiles_of_keys(cut.tile, layout.block):
                dots = dot(q_ref[head, at], k[keys], NT)
                bias = None if bias_ref is None else bias_ref[i, at, keys]
                scores = scoring(dots, rows_ref[at], keys_ref[:, keys], bias)
                p, shrink = weigh(top_ref.at[head], total_ref.at[head], at, scores)
                values = dot(p.astype(v.dtype), v[keys], NN)
                acc_ref[head, at] = acc_ref[head, at] * wide(shrink, values.shape[1]) + values

        each_tile_of_rows(cut, rows)

    def step() -> None:
        for i, head in heads:
            attend(i, head)

    if layout.ragged:
        pl.when(block < scalars[0][b])(step)
    elif layout.num_blocks % layout.splits:
        pl.when(block < layout.num_blocks)(step)
    else:
        step()

    @pl.when(j == layout.blocks_per_split - 1)
    def _() -> None:
        for _, head in heads:
            factor, lse_ref[head] = finish(top_ref[head], total_ref[head])
            out_ref[head] = (acc_ref[head] * factor).astype(out_ref.dtype)


def _cached(
    layout: Layout, table: jax.Array | None, k: jax.Array, v: jax.Array
) -> list[tuple[pl.BlockSpec, jax.Array]]:
    """Keys, then values, each in as many parts as a block has pages."""

    def spec(part: int) -> pl.BlockSpec:
        def index(b: Any, s: Any, j: Any, h: Any, r: Any, *scalars: Any) -> Any:
            block = layout.held(b, s, j, scalars)
            if table is None:
                return b, h, block, 0
            if table.ndim == 1:
                return scalars[-1][b], h, block, 0
            page, at = block * layout.parts + part, 0
            if layout.page_blocks > 1:
                page, at = page // layout.page_blocks, page % layout.page_blocks
            return scalars[-1][b, page], h, at, 0

        shape = (None, layout.heads, layout.block // layout.parts, k.shape[-1])
        return pl.BlockSpec(shape, index)

    return [(spec(part), x) for x in (k, v) for part in range(layout.parts)]


def call(
    scoring: Scoring,
    layout: Layout,
    cut: Cut,
    num_blocks: jax.Array | None,
    table: jax.Array | None,
    rows: jax.Array,
    keys: jax.Array,
    q: jax.Array,
    bias: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    cost: pl.CostEstimate,
    vmem_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention within each split.

    Args:
        num_blocks: int32 [B], blocks in use, if the layout is ragged.
        table: int32 [B, pages] for pools of pages; int32 [B], the row of k and v of each sequence;
            or None: b is in row b.
        rows, keys: int32 [B, R, 1 or 2] and [B, 1 or 2, blocks·block], see `Scoring`.
        q, bias: [B, K, R, H], and float32 [B, K, R, blocks·block] or None.
        k, v: [rows, K, S, H], or pools [P, K, page, H].

    Returns:
        out [splits, B, K, R, H] in q's dtype (float32 if there are several splits), and
        lse float32 [splits, B, K, R].
    """
    n = layout.heads
    scalars = [x for x in (num_blocks, table) if x is not None]
    shape = (None, keys.shape[1], layout.block)
    described = pl.BlockSpec(shape, lambda b, s, j, h, r, *p: (b, 0, layout.held(b, s, j, p)))
    arrays = [(described, keys), *_cached(layout, table, k, v)]
    if bias is not None:
        tile = (None, n, cut.piece_rows, layout.block)
        beside = pl.BlockSpec(tile, lambda b, s, j, h, r, *p: (b, h, r, layout.held(b, s, j, p)))
        arrays.append((beside, bias))
    return call_kernel(
        functools.partial(body, scoring, layout, cut, len(scalars)),
        "decode_attention",
        cut,
        (layout.splits, layout.blocks_per_split, q.shape[1] // n),
        scalars,
        rows,
        q,
        arrays,
        cost,
        vmem_bytes,
        interpret,
    )
