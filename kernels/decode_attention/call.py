"""How a decode kernel is called: one grid, and the state of a softmax that stays in VMEM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.decode_attention.softmax import LANES

COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=48 << 20,  # the most rows take 37 MiB; less than any chip but v4 has
)


def call_kernel(
    body: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    scalars: Sequence[jax.Array],
    rows: jax.Array,
    q: jax.Array,
    cached: Sequence[tuple[pl.BlockSpec, jax.Array]],
    cost: pl.CostEstimate,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention within each split, by a grid (sequence, split, block of keys, kv heads).

    Args:
        body: of references: scalars; rows and q; what is cached; out and lse; largest score, sum
            and weighed values so far, float32 [K, R, ·].
        grid: splits, blocks of each, and steps for all heads.
        scalars: prefetched; index maps get them after the grid's indices.
        rows: int32 [B, R, 1 or 2], see `Scoring`.
        q: [B, K, R, H].

    Returns:
        out [splits, B, K, R, H] in q's dtype (float32 if there are several splits), and
        lse float32 [splits, B, K, R].
    """
    B, K, R, H = q.shape
    splits = grid[0]
    inputs = [
        (pl.BlockSpec((None, R, rows.shape[2]), lambda b, *_: (b, 0, 0)), rows),
        (pl.BlockSpec((None, K, R, H), lambda b, *_: (b, 0, 0, 0)), q),
        *cached,
    ]

    def result(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, K, R, width), lambda b, s, *_: (s, b, 0, 0, 0))

    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, *grid),
            in_specs=[spec for spec, _ in inputs],
            out_specs=[result(H), result(LANES)],
            scratch_shapes=[pltpu.VMEM((K, R, width), jnp.float32) for width in (LANES, LANES, H)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((splits, B, K, R, H), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, B, K, R, LANES), jnp.float32),
        ],
        compiler_params=COMPILER_PARAMS,
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*scalars, *(array for _, array in inputs))
    return out, lse[..., 0]
