"""Quantize and pack: one read of the new keys or values, one write of their codes.

    grid (heads of the sequences, block of tokens)

A step has several heads where they are short: its fixed cost is that of copying some 300 tokens.
Minimum and maximum are taken down the rows of a tile, which are tokens for keys. Values are turned
first, [T, H] → [H, T]: their groups of channels are then rows too, and scales come out with time on
the lanes, which is how attention wants them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.kv_quantize.in_vmem import store
from kernels.kv_quantize.layout import (
    affine_from,
    bounds,
    codes_for,
    rows_of_codes,
    scale_and_minimum,
)


def body(bits: int, group: int, turned: bool, x_ref: Any, codes_ref: Any, affine_ref: Any) -> None:
    """Body of the grid step (heads, block)."""
    for head in range(x_ref.shape[0]):
        x = x_ref[head].astype(jnp.float32)
        x = x.T if turned else x
        grouped = x.reshape(x.shape[0] // group, group, x.shape[1])
        affine = affine_from(*bounds(grouped, 1), bits)
        scale, minimum = scale_and_minimum(affine)
        codes = codes_for(grouped, scale[:, None], minimum[:, None], bits)
        codes = codes.astype(jnp.float32).reshape(x.shape)
        codes_ref[head] = store(codes.T if turned else codes, bits)
        affine_ref[head] = affine


def call(
    x: jax.Array,
    bits: int,
    group: int,
    turned: bool,
    heads: int,
    block: int,
    cost: pl.CostEstimate,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of x [B, K, T, H], B·K a multiple of the heads of a step and T of the block
    of tokens.
    """
    B, K, T, H = x.shape
    N = B * K
    rows = rows_of_codes(block, bits)
    scales = (H // group, block) if turned else (block // group, H)
    all_scales = (H // group, T) if turned else (T // group, H)

    def tokens(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((heads, rows, H), lambda h, i: (h, i, 0))

    def place(h: Any, i: Any) -> Any:
        return (h, 0, i) if turned else (h, i, 0)

    codes, affine = pl.pallas_call(
        functools.partial(body, bits, group, turned),
        grid=(N // heads, T // block),
        in_specs=[tokens(block)],
        out_specs=[tokens(rows), pl.BlockSpec((heads, *scales), place)],
        out_shape=[
            jax.ShapeDtypeStruct(
                (N, rows_of_codes(T, bits), H), jnp.int8 if bits == 8 else jnp.int32
            ),
            jax.ShapeDtypeStruct((N, *all_scales), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        cost_estimate=cost,
        name="kv_quantize",
        interpret=interpret,
    )(x.reshape(N, T, H))
    return codes.reshape(B, K, -1, H), affine.reshape(B, K, *all_scales)
