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
    heads, piece_rows = K // cut.heads, cut.piece_rows

    def of(i: Any) -> tuple[Any, Any, Any]:
        """Sequence, piece of the heads and piece of the rows."""
        return i // cut.pieces, i % cut.pieces // cut.rows, i % cut.rows

    def placed(spec: pl.BlockSpec) -> pl.BlockSpec:
        whole = spec.index_map
        assert whole is not None

        def index(i: Any, s: Any, j: Any, h: Any, *scalars: Any) -> Any:
            b, piece, r = of(i)
            return whole(b, s, j, piece * steps + h, r, *scalars)

        return pl.BlockSpec(spec.block_shape, index)

    def result(width: int) -> pl.BlockSpec:
        shape = (None, None, heads, piece_rows, width)
        return pl.BlockSpec(shape, lambda i, s, *_: (s, *of(i), 0))

    described = (None, piece_rows, rows.shape[2])
    inputs = [
        (pl.BlockSpec(described, lambda i, *_: (of(i)[0], of(i)[2], 0)), rows),
        (pl.BlockSpec((None, heads, piece_rows, H), lambda i, *_: (*of(i), 0)), q),
        *((placed(spec), array) for spec, array in cached),
    ]

    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B * cut.pieces, splits, blocks, steps),
            in_specs=[spec for spec, _ in inputs],
            out_specs=[result(H), result(LANES)],
            scratch_shapes=[
                pltpu.VMEM((heads, piece_rows, width), jnp.float32) for width in (LANES, LANES, H)
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, K, R, H), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, B, K, R, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*scalars, *(array for _, array in inputs))
    return out, lse[..., 0]
