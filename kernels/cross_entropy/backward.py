"""Backward kernel: gradients of the matrix and the bias, from logits worked out once more.

    grid (vocabulary block j, row block i)

Each vocabulary block's gradient, [D, vocab] float32, stays in VMEM while all rows pass by. The
log-sum-exp is known from the forward kernel, so a tile's gradient needs no other tile:

    d = ((g_nll + g_lse)·p − g_nll·[target])·slope        d_matrix = hiddenᵀ d      d_bias = Σ d
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.cross_entropy.call import Call, columns

ROWS = (((0,), (0,)), ((), ()))


def kernel(call: Call, *refs: Any) -> None:
    """Body of the grid step (vocabulary block j, row block i)."""
    h, matrix, bias, targets, lse, g_nll, g_lse, d_matrix, d_bias, acc, acc_bias = refs
    j, i, n = pl.program_id(0), pl.program_id(1), call.blocks

    @pl.when(i == 0)
    def start() -> None:
        acc[...] = jnp.zeros_like(acc)
        acc_bias[...] = jnp.zeros_like(acc_bias)

    def block(last: bool) -> None:
        w = call.read(matrix, last)
        for row in range(0, n.rows, n.tile):
            at = pl.ds(row, n.tile)
            x = h[at]
            s = call.logits(x, w, bias[...], last)
            p = jnp.exp(s - lse[at])
            hit = columns(s) == targets[at] - j * n.vocab
            d = (g_nll[at] + g_lse[at]) * p - jnp.where(hit, g_nll[at], 0.0)
            d = d * call.slope(s)
            acc_bias[...] += d.sum(0, keepdims=True)
            d = d.astype(x.dtype)
            sides = (x, d) if call.vocab_axis == 1 else (d, x)
            acc[...] += call.dot(*sides, ROWS)

    if call.tail:
        pl.when(j < call.num_vocab_blocks - 1)(lambda: block(False))
        pl.when(j == call.num_vocab_blocks - 1)(lambda: block(True))
    else:
        block(False)

    @pl.when(i == pl.num_programs(1) - 1)
    def finish() -> None:
        d_matrix[...] = acc[...].astype(d_matrix.dtype)
        d_bias[...] = acc_bias[...]
