"""Zones of several precisions, one after the other through VMEM, under one softmax.

    grid (piece of the queries of a sequence, split, block, kv heads)

    blocks   ┌────────┬────────┬────────┬────────┬────────┬────────┐
             │ full   │ 8 bits │ 4 bits │ 4 bits │ 2 bits │ 2 bits │
             └────────┴────────┴────────┴────────┴────────┴────────┘
    zone 4-bit's block      0        0        0        1        1        1

Which zone a step is in is known from its number. Each zone's arrays have their own place in the
pipeline; outside of its steps a zone stays at its first or last block, which is not fetched again.
If lengths are data, the last block is the last one in use.
Rows, heads and the softmax are those of `kernels.decode_attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.decode_attention.blocks import Cut
from kernels.decode_attention.call import call_kernel
from kernels.decode_attention.kernel import NN, NT, dot, each_tile_of_rows
from kernels.decode_attention.scoring import Scoring
from kernels.decode_attention.softmax import finish, start, weigh, wide
from kernels.kv_quantize.layout import rows_of_codes
from kernels.quantized_decode_attention.dequantize import dots, weighed

PLAIN_TILES = 2  # of a block, whose code is not a loop's


@dataclasses.dataclass(frozen=True)
class Plan:
    """One zone, cut.

    Attributes:
        bits: of a code; None: keys and values are numbers.
        scaled: whether these have a scale per token.
        key_group, value_group: numbers that share a scale.
        run: tokens whose products with the queries are one matmul, for quantized keys.
        block: tokens of a grid step.
        tile: tokens whose scores exist at one time, a divisor of the block.
        first, count: blocks of all zones before it, and of its own.
        biased: whether a bias is read beside the keys.
    """

    bits: int | None
    scaled: bool
    key_group: int
    value_group: int
    run: int
    block: int
    tile: int
    first: int
    count: int
    biased: bool

    @property
    def num_arrays(self) -> int:
        """That are fetched for it: positions, keys and values, their scales, and a bias."""
        return (3 if self.bits is None and not self.scaled else 5) + self.biased

    @property
    def looped(self) -> bool:
        """Whether its tiles are turns of a loop: several, whose scales begin with a register."""
        return self.block // self.tile > PLAIN_TILES and self.tile % (8 * self.key_group) == 0

    @property
    def copies(self) -> int:
        """Pairs of tiles whose spills the compiler keeps apart."""
        return 1 if self.looped else -(-self.block // self.tile // PLAIN_TILES)


Part = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]


def numbers(plan: Plan, t: Any, dtype: Any, k: Any, v: Any) -> Part:
    """Of tile t as it is: queries → q·k, weights → p·v, by matmuls of dtype."""
    at = _range(t, plan.tile)
    return (
        lambda q: dot(q, k[at].astype(dtype), NT),
        lambda p: dot(p.astype(dtype), v[at].astype(dtype), NN),
    )


def scaled(plan: Plan, t: Any, dtype: Any, k: Any, k_scale: Any, v: Any, v_scale: Any) -> Part:
    """The same of numbers with a scale per token, which is that of a column of scores."""
    at = _range(t, plan.tile)
    score, combine = numbers(plan, t, dtype, k, v)
    return lambda q: score(q) * k_scale[:, at], lambda p: combine(p * v_scale[:, at])


def codes(plan: Plan, t: Any, dtype: Any, *refs: Any) -> Part:
    """The same of quantized ones."""
    bits = plan.bits or 8
    k, k_affine, v, v_affine = refs
    rows = _range(t, rows_of_codes(plan.tile, bits))
    groups, tokens = _range(t, plan.tile // plan.key_group), _range(t, plan.tile)
    return (
        lambda q: dots(q, k[rows], k_affine[groups], bits, plan.key_group, plan.run),
        lambda p: weighed(p, v[rows], v_affine[:, tokens], bits, plan.value_group, dtype),
    )


def _range(t: Any, length: int) -> Any:
    if isinstance(t, int):
        return slice(t * length, (t + 1) * length)
    return pl.ds(pl.multiple_of(t * length, length), length)


def each_tile_of_keys(plan: Plan, step: Callable[[Any], None]) -> None:
    """Plain code for few, which are scheduled together; a loop for more, so that what the compiler
    spills is that of one turn.
    """
    count = plan.block // plan.tile
    if plan.looped:
        pl.loop(0, count)(step)
        return
    for t in range(count):
        step(t)


def body(
    scoring: Scoring,
    plans: Sequence[Plan],
    cut: Cut,
    blocks_per_split: int,
    ragged: bool,
    num_scalars: int,
    *all_refs: Any,
) -> None:
    """Body of the grid step (piece, split s, block j, head h of the piece)."""
    scalars, refs = all_refs[:num_scalars], list(all_refs[num_scalars:])
    rows_ref, q_ref = refs[:2]
    cached, (out_ref, lse_ref, top_ref, total_ref, acc_ref) = refs[2:-5], refs[-5:]
    piece, s, j, head = (pl.program_id(axis) for axis in range(4))
    b = piece // cut.pieces
    block = s * blocks_per_split + j
    top, total, acc = (ref.at[head] for ref in (top_ref, total_ref, acc_ref))

    @pl.when(j == 0)
    def _() -> None:
        start(top, total)
        acc[...] = jnp.zeros_like(acc)

    def attend(plan: Plan, t: Any, keys_ref: Any, *arrays: Any) -> None:
        """Tile t of a block, against all rows."""
        bias_ref, arrays = (arrays[-1], arrays[:-1]) if plan.biased else (None, arrays)
        part = codes if plan.bits is not None else scaled if plan.scaled else numbers
        score, combine = part(plan, t, q_ref.dtype, *arrays)
        tokens = _range(t, plan.tile)

        def rows(at: Any) -> None:
            bias = None if bias_ref is None else bias_ref[at, tokens]
            scores = scoring(score(q_ref[head, at]), rows_ref[at], keys_ref[:, tokens], bias)
            p, shrink = weigh(top, total, at, scores)
            values = combine(p)
            acc[at] = acc[at] * wide(shrink, values.shape[1]) + values

        each_tile_of_rows(cut, rows)

    for z, plan in enumerate(plans):
        arrays, cached = cached[: plan.num_arrays], cached[plan.num_arrays :]
        count = scalars[0][z, b] if ragged else plan.count

        @pl.when((plan.first <= block) & (block < plan.first + count))
        def _(plan: Plan = plan, arrays: Any = arrays) -> None:
            each_tile_of_keys(plan, lambda t: attend(plan, t, *arrays))

    @pl.when(j == blocks_per_split - 1)
    def _() -> None:
        factor, lse_ref[head] = finish(top[...], total[...])
        out_ref[head] = (acc[...] * factor).astype(out_ref.dtype)


def specs(
    z: int,
    plan: Plan,
    blocks_per_split: int,
    ragged: bool,
    elsewhere: bool,
    description: int,
    R: int,
    H: int,
) -> list[pl.BlockSpec]:
    """Of the arrays of zone z, whose keys are described by one number or two, for pieces
    of R rows; whether the blocks in use are data, the first scalars, and a sequence's row of keys
    and values is, the last ones.
    """

    def row(b: Any, scalars: Any) -> Any:
        return scalars[-1][b] if elsewhere else b

    def at(b: Any, s: Any, j: Any, scalars: Any) -> Any:
        last = jnp.maximum(scalars[0][z, b], 1) - 1 if ragged else plan.count - 1
        return jnp.clip(s * blocks_per_split + j - plan.first, 0, last)

    def down(rows: int) -> pl.BlockSpec:
        shape = (None, None, rows, H)
        return pl.BlockSpec(shape, lambda b, s, j, h, r, *p: (row(b, p), h, at(b, s, j, p), 0))

    def across(rows: int) -> pl.BlockSpec:
        shape = (None, None, rows, plan.block)
        return pl.BlockSpec(shape, lambda b, s, j, h, r, *p: (row(b, p), h, 0, at(b, s, j, p)))

    shape = (None, description, plan.block)
    keys = pl.BlockSpec(shape, lambda b, s, j, h, r, *p: (b, 0, at(b, s, j, p)))
    tile = (None, None, R, plan.block)
    beside = pl.BlockSpec(tile, lambda b, s, j, h, r, *p: (b, h, r, at(b, s, j, p)))
    bias = [beside] if plan.biased else []
    if plan.scaled:
        return [keys, *[down(plan.block), across(1)] * 2, *bias]
    if plan.bits is None:
        return [keys, down(plan.block), down(plan.block), *bias]
    packed = down(rows_of_codes(plan.block, plan.bits))
    return [
        *(keys, packed, down(plan.block // plan.key_group)),
        *(packed, across(H // plan.value_group), *bias),
    ]


def call(
    scoring: Scoring,
    plans: Sequence[Plan],
    cut: Cut,
    splits: int,
    used: jax.Array | None,
    k_rows: jax.Array | None,
    rows: jax.Array,
    q: jax.Array,
    zones: Sequence[Sequence[jax.Array]],
    cost: pl.CostEstimate,
    vmem_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention within each split.

    Args:
        used: int32 [zones, B], blocks in use of each; None: all.
        k_rows: int32 [B], of keys and values, whose own B below is any number then; None: a
            sequence's own.
        rows: int32 [B, R, 1 or 2], see `Scoring`.
        q: [B, K, R, H].
        zones: of each, int32 [B, 1 or 2, S] that describe its keys; then keys and values
            [B, K, S, H], or codes or numbers and scales of keys and the same of values; and if it
            has one the bias, float32 [B, K, R, S].

    Returns:
        out [splits, B, K, R, H] in q's dtype (float32 if there are several splits), and
        lse float32 [splits, B, K, R].
    """
    K, _, H = q.shape[1:]
    blocks_per_split = -(-sum(plan.count for plan in plans) // splits)

    scalars = [x for x in (used, k_rows) if x is not None]
    ragged, elsewhere = used is not None, k_rows is not None
    cached = [
        (spec, array)
        for z, (plan, arrays) in enumerate(zip(plans, zones, strict=True))
        for spec, array in zip(
            specs(
                *(z, plan, blocks_per_split, ragged, elsewhere),
                *(rows.shape[2], cut.piece_rows, H),
            ),
            arrays,
            strict=True,
        )
    ]
    return call_kernel(
        functools.partial(body, scoring, plans, cut, blocks_per_split, ragged, len(scalars)),
        "quantized_decode_attention",
        cut,
        (splits, blocks_per_split, K),
        scalars,
        rows,
        q,
        cached,
        cost,
        vmem_bytes,
        interpret,
    )
