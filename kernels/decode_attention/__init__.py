"""Attention of 1 to 128 query tokens a sequence to a long KV cache, dense, ring or paged.

    cached = decode_attention(q, keys, values, Scoring(scale=…), Queries(…), Slots(…))
    new = attend_new(q, k, v, ancestors, scale=…)
    out, _ = merge([cached, new])

A ring is a dense cache whose slots hold the positions in another order: say so in `Slots`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.decode_attention import inputs
from kernels.decode_attention.inputs import MOST_ROWS, MOST_TOKENS, bias_fits
from kernels.decode_attention.kernel import Layout, call
from kernels.decode_attention.merge import merge, merge_splits
from kernels.decode_attention.new_tokens import attend_new
from kernels.decode_attention.reference import reference
from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.decode_attention.softmax import LANES

__all__ = [
    "MOST_ROWS",
    "MOST_TOKENS",
    "Queries",
    "Scoring",
    "Slots",
    "attend_new",
    "bias_fits",
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
    scoring: Scoring,
    queries: Queries,
    slots: Slots,
    *,
    k_rows: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a dense cache, or to a ring. Slots that no query sees must hold finite numbers.

    Args:
        q: bfloat16 or float32 [B, N, T, H], T <= 128.
        k, v: [B, K, S, H], N a multiple of K; bfloat16, float32 or float8_e4m3fn: what is not of
            q's dtype is converted in VMEM. With `k_rows` [any, K, S, H].
        scoring: which slots are seen, and what becomes of q·k.
        queries, slots: what is known of them.
        k_rows: int [B], the row of k and v that a sequence reads, such as its own in one layer of
            [layers·B, K, S, H]: a layer cut out of that would be copied first.
        interpret: for tests only.

    Returns:
        out [B, N, T, H] in q's dtype, and lse float32 [B, N, T], the log-sum-exp of the scores;
        zero and a huge negative number for a query that sees nothing.

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    _check(q, k, v, queries, slots, k.shape[2])
    if k_rows is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k={k.shape}; allowed: q's B={q.shape[0]} sequences, or k_rows")
    layout = dense_layout(q.shape[0], k, slots.lengths is not None)
    rows = None if k_rows is None else k_rows.astype(jnp.int32)
    return _run(scoring, layout, q, k, v, rows, queries, slots, interpret)


def paged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    scoring: Scoring,
    queries: Queries,
    slots: Slots,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to pages of a common pool. As `decode_attention`, except for:

    Args:
        k, v: pools [P, K, page, H]; `page` a multiple of 16 that divides 128 or is a multiple
            of it.
        page_table: int32 [B, max_pages]: slot s of a sequence lies in page
            `page_table[b, s // page]`.
            Every entry is a page that exists, also those past the length.
        slots: max_pages·page of each sequence.
    """
    page = k.shape[2]
    _check(q, k, v, queries, slots, page_table.shape[1] * page)
    if page % 16 or (LANES % page and page % LANES):
        raise ValueError(
            f"k={k.shape}; allowed: pages of 16, 32, 64 or a multiple of 128 tokens, not {page}"
        )
    layout = paged_layout(k, q.shape[0], page_table.shape[1], slots.lengths is not None)
    pages = layout.num_blocks * layout.parts
    # Pages that make up the last block: any page will do, its keys have no position.
    table = jnp.pad(page_table.astype(jnp.int32), ((0, 0), (0, pages - page_table.shape[1])))
    return _run(scoring, layout, q, k, v, table, queries, slots, interpret)


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Queries, slots: Slots, S: int
) -> None:
    inputs.check_shapes(q, k.shape, v.shape)
    inputs.check_cache_dtype(k.dtype)
    slot_bytes = k.shape[1] * k.shape[3] * (k.dtype.itemsize + v.dtype.itemsize)
    inputs.check_slots(q, queries, slots, S, slot_bytes)


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


def cost_estimate(q: jax.Array, k: jax.Array, v: jax.Array, slots: Slots) -> pl.CostEstimate:
    """With every slot in use; k and v may be pools."""
    B, N, T, H = q.shape
    K, S = k.shape[1], slots.positions.shape[1]
    cache = B * K * S * H * (k.dtype.itemsize + v.dtype.itemsize)
    cache += 0 if slots.bias is None else slots.bias.nbytes
    return pl.CostEstimate(
        flops=4 * B * N * T * S * H,
        transcendentals=B * N * T * S,
        bytes_accessed=cache + 4 * B * S + 2 * q.size * q.dtype.itemsize + 4 * B * N * T,
    )


def _run(
    scoring: Scoring,
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    queries: Queries,
    slots: Slots,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    N, T = q.shape[1:3]
    K, number = k.shape[1], layout.num_blocks * layout.block
    rows = inputs.pack_rows(q, K)
    num_blocks = None
    if slots.lengths is not None:
        num_blocks = (slots.lengths.astype(jnp.int32) + layout.block - 1) // layout.block
        # A length past the cache must not be read.
        num_blocks = jnp.minimum(num_blocks, layout.num_blocks)
    out, lse = call(
        scoring,
        layout,
        num_blocks,
        table,
        inputs.describe_rows(queries, N // K, rows.shape[2]),
        inputs.describe_keys(slots, number),
        rows,
        None if slots.bias is None else inputs.pack_bias(slots.bias, K, number),
        k,
        v,
        cost_estimate(q, k, v, slots),
        interpret,
    )
    out, lse = merge_splits(out, lse, N, T)
    return out.astype(q.dtype), lse
