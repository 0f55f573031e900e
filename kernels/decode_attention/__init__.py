"""Attention of 1 to 128 query tokens a sequence to a long KV cache, dense, ring or paged.

    cached = decode_attention(q, keys, values, Scoring(scale=…), Queries(…), Slots(…))
    new = attend_new(q, k, v, ancestors, scale=…)
    out, _ = merge([cached, new])

A ring is a dense cache whose slots hold the positions in another order: say so in `Slots`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.chip import SCALAR_BYTES, chip_or_target
from kernels.decode_attention import inputs
from kernels.decode_attention.blocks import Cut, cuts, state_bytes, vmem_bytes
from kernels.decode_attention.inputs import MOST_PARTS, MOST_TOKENS, bias_fits, table_fits
from kernels.decode_attention.kernel import Layout, call
from kernels.decode_attention.merge import merge, merge_splits
from kernels.decode_attention.new_tokens import attend_new
from kernels.decode_attention.reference import reference
from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.decode_attention.softmax import LANES

__all__ = [
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
    "table_fits",
]

# A copy of 1 MiB takes 1.3 µs on v5e; a grid step, ~0.35 µs beside its work.
BLOCK_BYTES = 1 << 20  # of keys, or of values, of one grid step
WORKED_OUT = 2 << 20  # bytes of scores and weights of a tile, and of what the compiler spills


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scoring: Scoring,
    queries: Queries,
    slots: Slots,
    *,
    k_rows: jax.Array | None = None,
    chip: str | None = None,
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
        chip: TPU generation, for the sizes of blocks; None: that which is traced for.
        interpret: for tests only.

    Returns:
        out [B, N, T, H] in q's dtype, and lse float32 [B, N, T], the log-sum-exp of the scores;
        zero and a huge negative number for a query that sees nothing.

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    _check(q, k, v, queries, slots)
    if k_rows is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k={k.shape}; allowed: q's B={q.shape[0]} sequences, or k_rows")
    if k_rows is not None:
        inputs.check_integers("k_rows", k_rows, q.shape[:1])
    layouts = dense_layouts(k, slots.lengths is not None)
    rows = None if k_rows is None else k_rows.astype(jnp.int32)
    return _run(scoring, layouts, q, k, v, rows, queries, slots, chip, interpret)


def paged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    scoring: Scoring,
    queries: Queries,
    slots: Slots,
    *,
    chip: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to pages of a common pool. As `decode_attention`, except for:

    Args:
        k, v: pools [P, K, page, H]; `page` a multiple of 16 that divides 128 or is a multiple
            of it.
        page_table: int32 [B, max_pages]: slot s of a sequence lies in page
            `page_table[b, s // page]`.
            Every entry is a page that exists, also those past the length. It fits scalar memory,
            see `table_fits`: 8 sequences of 32,121 pages, 64 of 3,961.
        slots: max_pages·page of each sequence.
    """
    if k.ndim != 4 or page_table.ndim != 2 or page_table.shape[1] == 0:
        raise ValueError(
            f"k={k.shape}, page_table={page_table.shape}; allowed: [P, K, page, H] and [B, pages]"
        )
    page, pages = k.shape[2], page_table.shape[1]
    inputs.check_integers("page_table", page_table, (q.shape[0], pages))
    _check(q, k, v, queries, slots, pages * page)
    if page % 16 or (LANES % page and page % LANES):
        raise ValueError(
            f"k={k.shape}; allowed: pages of 16, 32, 64 or a multiple of 128 tokens, not {page}"
        )
    if not table_fits(*page_table.shape):
        raise ValueError(
            f"page_table={page_table.shape}: {inputs.table_bytes(*page_table.shape)} bytes of "
            f"scalar memory; allowed: at most {SCALAR_BYTES}: fewer sequences a call, longer pages"
        )
    layouts = paged_layouts(k, pages, slots.lengths is not None)
    table = page_table.astype(jnp.int32)
    return _run(scoring, layouts, q, k, v, table, queries, slots, chip, interpret)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Queries,
    slots: Slots,
    num_slots: int | None = None,
) -> None:
    """`num_slots`: of a sequence; None: k's S."""
    inputs.check_shapes(q, k.shape, v.shape)
    inputs.check_cache_dtypes(k.dtype, v.dtype)
    slot_bytes = k.shape[1] * k.shape[3] * (k.dtype.itemsize + v.dtype.itemsize)
    inputs.check_slots(q, queries, slots, num_slots or k.shape[2], slot_bytes)


def dense_layouts(k: jax.Array, ragged: bool) -> Iterator[Layout]:
    """Blocks of one head, of about BLOCK_BYTES, and smaller ones."""
    S, H = k.shape[2:]
    most = BLOCK_BYTES // (max(H, LANES) * k.dtype.itemsize)
    block = max(LANES, min(most, -(-S // LANES) * LANES))
    # A last block that is full spares all others the test where the array ends.
    block = next((n for n in range(block, block // 2, -LANES) if S % n == 0), block)
    yield Layout(S, block, 1, 1, 1, 1, ragged)
    while block > LANES:
        block = block // 2 // LANES * LANES or LANES
        yield Layout(S, block, 1, 1, 1, 1, ragged)


def paged_layouts(k: jax.Array, pages: int, ragged: bool) -> Iterator[Layout]:
    """Blocks of several pages, or of a part of one, with all, or at most 8, of their heads; then
    smaller ones, then those of fewer heads.
    """
    _, K, page, H = k.shape
    least = max(1, LANES // page)  # pages of a block of LANES tokens
    for heads in (n for n in range(8, 0, -1) if K % n == 0):
        most = BLOCK_BYTES // (heads * max(H, LANES) * k.dtype.itemsize)
        parts = max(least, min(MOST_PARTS, most // page) // least * least)
        while parts > least:
            yield _pages(pages, page, parts, 1, heads, ragged)
            parts = parts // 2 // least * least or least
        for blocks in (n for n in range(1, max(1, page // LANES) + 1) if page // LANES % n == 0):
            yield _pages(pages, page, least, blocks, heads, ragged)


def _pages(pages: int, page: int, parts: int, blocks: int, heads: int, ragged: bool) -> Layout:
    block = parts * page // blocks
    num_slots = -(-pages // parts) * parts * page
    return Layout(num_slots, block, parts, blocks, heads, 1, ragged)


def fit(
    layouts: Iterable[Layout], q: jax.Array, k: jax.Array, biased: bool, limit: int
) -> tuple[Layout, Cut]:
    """The first layout, and the coarsest cut, that fit into `limit` bytes of VMEM.

    Raises:
        ValueError: none does.
    """
    B, N, T, _ = q.shape
    K = k.shape[1]
    for layout in layouts:
        for cut in cuts(K // layout.heads, N // K * T):
            splits = _splits(B * cut.pieces, layout.num_blocks)
            fitting = dataclasses.replace(layout, splits=splits)
            if step_bytes(fitting, cut, q, k, biased) <= limit:
                return fitting, cut
    raise ValueError(f"q={q.shape}, k={k.shape}; allowed: what fits {limit} bytes of VMEM")


def step_bytes(layout: Layout, cut: Cut, q: jax.Array, k: jax.Array, biased: bool) -> int:
    """Of VMEM that a call takes."""
    H, n = q.shape[3], layout.heads
    heads = k.shape[1] // cut.heads
    width = -(-H // LANES) * LANES
    cached = 2 * n * layout.block * width * k.dtype.itemsize
    described = 8 * layout.block * 4
    bias = n * cut.piece_rows * layout.block * 4 if biased else 0
    # Keys and values of a block, where they are put together or converted; and scores.
    worked_out = 2 * layout.block * width * q.dtype.itemsize + WORKED_OUT
    state = state_bytes(cut, heads, H, q.dtype.itemsize, layout.splits)
    return 2 * (cached + described + bias) + worked_out + state


def _splits(pieces: int, blocks: int) -> int:
    """Two cores share what is independent; of an odd number one gets a piece more."""
    return 2 if pieces % 2 and pieces < 8 and blocks > 1 else 1


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
    layouts: Iterable[Layout],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    queries: Queries,
    slots: Slots,
    chip: str | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    limit = vmem_bytes(chip_or_target(chip))
    layout, cut = fit(layouts, q, k, slots.bias is not None, limit)
    N, T = q.shape[1:3]
    K, R, number = k.shape[1], cut.all_rows, layout.num_blocks * layout.block
    if table is not None and table.ndim == 2:
        # Pages that make up the last block: any page will do, its keys have no position.
        missing = layout.num_slots // k.shape[2] - table.shape[1]
        table = jnp.pad(table, ((0, 0), (0, missing)))
    num_blocks = None
    if slots.lengths is not None:
        num_blocks = inputs.blocks_in_use(slots.lengths, layout.num_slots, layout.block)
    out, lse = call(
        scoring,
        layout,
        cut,
        num_blocks,
        table,
        inputs.describe_rows(queries, N // K, R),
        inputs.describe_keys(slots, number),
        inputs.pack_rows(q, K, R),
        None if slots.bias is None else inputs.pack_bias(slots.bias, K, R, number),
        k,
        v,
        cost_estimate(q, k, v, slots),
        limit,
        interpret,
    )
    out, lse = merge_splits(out, lse, N, T)
    return out.astype(q.dtype), lse
