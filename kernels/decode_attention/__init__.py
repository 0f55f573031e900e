"""Attention of 1 to 128 query tokens a sequence to a long KV cache, dense, ring or paged.

    cached = decode_attention(q, keys, values, q_positions=…, k_positions=…, scale=…)
    new = attend_new(q, k, v, ancestors, scale=…)
    out, _ = merge([cached, new])

A ring is a dense cache whose slots hold the positions in another order: say so in `k_positions`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.decode_attention import inputs
from kernels.decode_attention.inputs import MOST_ROWS, MOST_TOKENS
from kernels.decode_attention.kernel import Layout, call
from kernels.decode_attention.merge import merge, merge_splits
from kernels.decode_attention.new_tokens import attend_new
from kernels.decode_attention.reference import reference
from kernels.decode_attention.scoring import Scoring
from kernels.decode_attention.softmax import LANES

__all__ = [
    "MOST_ROWS",
    "MOST_TOKENS",
    "attend_new",
    "cost_estimate",
    "decode_attention",
    "merge",
    "paged_decode_attention",
    "reference",
]

# A copy of 1 MiB takes 1.3 µs on v5e; a grid step, ~0.35 µs beside its work.
BLOCK_BYTES = 1 << 20  # of keys, or of values, of one grid step


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    scale: float,
    k_rows: jax.Array | None = None,
    lengths: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a dense cache, or to a ring.

    A query sees a slot if the slot's position is not above its own, not -1, the slot lies below
    `lengths`, segments are equal and not 0, and the position is one of the last `window` or below
    `num_sinks`. Slots that no query sees must hold finite numbers.

    Args:
        q: bfloat16 or float32 [B, N, T, H], T <= 128.
        k, v: [B, K, S, H], N a multiple of K; bfloat16, float32 or float8_e4m3fn: what is not of
            q's dtype is converted in VMEM. With `k_rows` [any, K, S, H].
        q_positions: int [B, T].
        k_positions: int [B, S], -1 where a slot is empty.
        scale: multiplies q·k.
        k_rows: int [B], the row of k and v that a sequence reads, such as its own in one layer of
            [layers·B, K, S, H]: a layer cut out of that would be copied first.
        lengths: int [B], slots in use; blocks past it are not fetched. None: all, and then the
            grid is static, so that the compiler can state its cost.
        q_segment_ids, k_segment_ids: int [B, T] and [B, S], or neither.
        window, num_sinks: by position, see above.
        softcap: scores become softcap·tanh(scores / softcap), before ALiBi.
        slopes: ALiBi, [N]: scores fall by slope·(q position − k position).
        interpret: for tests only.

    Returns:
        out [B, N, T, H] in q's dtype, and lse float32 [B, N, T], the log-sum-exp of the scores;
        zero and a huge negative number for a query that sees nothing.

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    inputs.check_shapes(q, k.shape, v.shape, window, num_sinks)
    inputs.check_cache_dtype(k.dtype)
    inputs.check_lengths(q, lengths)
    if k_rows is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k={k.shape}; allowed: q's B={q.shape[0]} sequences, or k_rows")
    scoring = Scoring(
        scale, softcap, window, num_sinks, q_segment_ids is not None, slopes is not None
    )
    layout = dense_layout(q.shape[0], k, lengths is not None)
    visibility = (q_positions, k_positions, lengths, q_segment_ids, k_segment_ids)
    rows = None if k_rows is None else k_rows.astype(jnp.int32)
    return _run(scoring, layout, q, k, v, rows, *visibility, slopes, interpret)


def paged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    scale: float,
    lengths: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to pages of a common pool. As `decode_attention`, except for:

    Args:
        k, v: pools [P, K, page, H]; `page` a multiple of 16 that divides 128 or is a multiple
            of it.
        page_table: int32 [B, max_pages]: slot s of a sequence lies in page
            `page_table[b, s // page]`.
            Every entry is a page that exists, also those past the length.
        k_positions, k_segment_ids: [B, max_pages·page].
    """
    inputs.check_shapes(q, k.shape, v.shape, window, num_sinks)
    inputs.check_cache_dtype(k.dtype)
    inputs.check_lengths(q, lengths)
    page = k.shape[2]
    if page % 16 or (LANES % page and page % LANES):
        raise ValueError(
            f"k={k.shape}; allowed: pages of 16, 32, 64 or a multiple of 128 tokens, not {page}"
        )
    slots = page_table.shape[1] * page
    if k_positions.shape != (q.shape[0], slots):
        raise ValueError(f"k_positions={k_positions.shape}; allowed: {(q.shape[0], slots)}")
    scoring = Scoring(
        scale, softcap, window, num_sinks, q_segment_ids is not None, slopes is not None
    )
    layout = paged_layout(k, q.shape[0], page_table.shape[1], lengths is not None)
    pages = layout.num_blocks * layout.parts
    # Pages that make up the last block: any page will do, its keys have no position.
    table = jnp.pad(page_table.astype(jnp.int32), ((0, 0), (0, pages - page_table.shape[1])))
    visibility = (q_positions, k_positions, lengths, q_segment_ids, k_segment_ids)
    return _run(scoring, layout, q, k, v, table, *visibility, slopes, interpret)


def dense_layout(batch: int, k: jax.Array, ragged: bool) -> Layout:
    """Blocks of one head, of about BLOCK_BYTES."""
    S, H = k.shape[2:]
    most = BLOCK_BYTES // (max(H, LANES) * k.dtype.itemsize)
    block = max(LANES, min(most, -(-S // LANES) * LANES))
    # A last block that is full spares all others the test where the array ends.
    block = next((n for n in range(block, block // 2, -LANES) if S % n == 0), block)
    return Layout(S, block, 1, 1, _splits(batch, -(-S // block)), ragged)


def paged_layout(k: jax.Array, batch: int, pages: int, ragged: bool) -> Layout:
    """Blocks of several pages with all, or at most 8, of their heads."""
    _, K, page, H = k.shape
    heads = max(n for n in range(1, 9) if K % n == 0)
    most = BLOCK_BYTES // (heads * page * max(H, LANES) * k.dtype.itemsize)
    least = max(1, LANES // page)
    parts = max(least, min(8, most) // least * least)
    num_blocks = -(-pages // parts)
    block = parts * page
    return Layout(num_blocks * block, block, parts, heads, _splits(batch, num_blocks), ragged)


def _splits(batch: int, blocks: int) -> int:
    """Two cores share what is independent; of an odd number one gets a sequence more."""
    return 2 if batch % 2 and batch < 8 and blocks > 1 else 1


def cost_estimate(q: jax.Array, k: jax.Array, v: jax.Array, slots: int) -> pl.CostEstimate:
    """With every slot in use; k and v may be pools."""
    B, N, T, H = q.shape
    K = k.shape[1]
    cache = B * K * slots * H * (k.dtype.itemsize + v.dtype.itemsize)
    return pl.CostEstimate(
        flops=4 * B * N * T * slots * H,
        transcendentals=B * N * T * slots,
        bytes_accessed=cache + 4 * B * slots + 2 * q.size * q.dtype.itemsize + 4 * B * N * T,
    )


def _run(
    scoring: Scoring,
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    q_positions: jax.Array,
    k_positions: jax.Array,
    lengths: jax.Array | None,
    q_segment_ids: jax.Array | None,
    k_segment_ids: jax.Array | None,
    slopes: jax.Array | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    N, T = q.shape[1:3]
    K = k.shape[1]
    rows = inputs.pack_rows(q, K)
    R = rows.shape[2]
    num_blocks = None
    if lengths is not None:
        num_blocks = (lengths.astype(jnp.int32) + layout.block - 1) // layout.block
        # A length past the cache must not be read.
        num_blocks = jnp.minimum(num_blocks, layout.num_blocks)
    out, lse = call(
        scoring,
        layout,
        num_blocks,
        table,
        inputs.describe_rows(q_positions, q_segment_ids, N // K, R),
        inputs.describe_keys(k_positions, k_segment_ids, lengths, layout.num_blocks * layout.block),
        rows,
        None if slopes is None else inputs.describe_slopes(slopes, K, T, R),
        k,
        v,
        cost_estimate(q, k, v, k_positions.shape[1]),
        interpret,
    )
    out, lse = merge_splits(out, lse, N, T)
    return out.astype(q.dtype), lse
