"""How a decode kernel is called: one grid, and the state of a softmax that stays in VMEM.

    grid (piece of the queries of a sequence, split, block of keys, kv heads)

An index map of what is cached gets (sequence, split, block, heads, piece of rows, *scalars): which
heads these are of all follows from the piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.decode_attention.blocks import Cut
from kernels.decode_attention.softmax import LANES


def call_kernel(
    body: Callable[..., None],
    name: str,
    cut: Cut,
    grid: tuple[int, int, int],
    scalars: Sequence[jax.Array],
    rows: jax.Array,
    q: jax.Array,
    cached: Sequence[tuple[pl.BlockSpec, jax.Array]],
    cost: pl.CostEstimate,
    vmem_bytes: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention within each split.

    Args:
        body: of references: scalars; rows and q; what is cached; out and lse; largest score, sum
            and weighed values so far, float32 [heads, rows, ·] of a piece.
        cut: the queries into pieces.
        grid: splits, blocks of each, and steps for all heads.
        scalars: prefetched; index maps get them after the grid's indices.
        rows: int32 [B, R, 1 or 2], see `Scoring`.
        q: [B, K, R, H].

    Returns:
        out [splits, B, K, R, H] in q's dtype (float32 if there are several splits), and
        lse float32 [splits, B, K, R].
    """
    B, K, R, H = q.shape
    splits, blocks, steps = grid[0], grid[1], grid[2] // cut.heads
    piece = (K // cut.heads, cut.piece_rows)
    in_specs = [
        pl.BlockSpec((None, piece[1], rows.shape[2]), lambda i, *_: (*cut.of(i)[::2], 0)),
        pl.BlockSpec((None, *piece, H), lambda i, *_: (*cut.of(i), 0)),
        *(_placed(spec, cut, steps) for spec, _ in cached),
    ]
    out_specs = [
        pl.BlockSpec((None, None, *piece, width), lambda i, s, *_: (s, *cut.of(i), 0))
        for width in (H, LANES)
    ]
    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B * cut.pieces, splits, blocks, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((*piece, w), jnp.float32) for w in (LANES, LANES, H)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, K, R, H), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, B, K, R, LANES), jnp.float32),
        ],
        compiler_params=_params(vmem_bytes),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*scalars, rows, q, *(array for _, array in cached))
    return out, lse[..., 0]


def _params(vmem_bytes: int) -> pltpu.CompilerParams:
    """A piece and a split have results of their own; blocks and heads go on with a state."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=vmem_bytes,
    )


def _placed(spec: pl.BlockSpec, cut: Cut, steps: int) -> pl.BlockSpec:
    """Of what is cached, by the kernel's grid."""
    whole = spec.index_map
    assert whole is not None

    def index(i: Any, s: Any, j: Any, h: Any, *scalars: Any) -> Any:
        b, piece, r = cut.of(i)
        return whole(b, s, j, piece * steps + h, r, *scalars)

    return pl.BlockSpec(spec.block_shape, index)
