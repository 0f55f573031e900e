"""Backward kernel: dq, dk and dv in one pass over the tiles, five matrix products each.

    grid (batch, kv head, query head of its group, query block)

One stretch of keys and values stays in VMEM with the float32 sums of its gradients; query blocks
pass by. Scores are computed transposed, [keys, queries]: then the log-sum-exp and the rest term of
a query are rows, as they lie in memory, and of the five products only dq has to turn a tile.

    sᵀ = k·qᵀ      pᵀ = exp2(sᵀ - lse)     dv += pᵀ·do
    dpᵀ = v·doᵀ    dsᵀ = pᵀ(dpᵀ + rest)    dk += dsᵀ·q    dq += (dsᵀ)ᵀ·k

(Dao et al. 2022, arXiv 2205.14135, algorithm 4; rest = d_lse - Σ do·out.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.call import LOG2_E, Call, wide
from kernels.flash_attention.forward import NN, NT, Segments

TN = (((0,), (0,)), ((), ()))


def kernel(call: Call, stretch: int, first_query_block: int, *refs: Any) -> None:
    """Body of the grid step (batch b, kv head, query head g, query block i)."""
    segments = None
    if call.segments:
        bounds, q, k, v, d_out, lse, rest, q_ids, k_ids, *others = refs
        segments = Segments(bounds, q_ids, k_ids)
    else:
        q, k, v, d_out, lse, rest, *others = refs
    dq, dk, dv, dq_sum, dk_sum, dv_sum = others
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    last_g, last_i = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    n = call.blocks

    @pl.when((g == 0) & (i == 0))
    def start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)

    def tile(rows: int, base: Any, offset: int | None) -> None:
        """Gradients from query rows [rows, rows + tile_q) and `tile_k` keys from slot `base`."""
        at, keys = pl.ds(rows, n.tile_q), pl.ds(base, n.tile_k)
        f32 = {"preferred_element_type": jnp.float32}
        q_tile, k_tile, d_out_tile = q[at], k[keys], d_out[at]
        dots = jax.lax.dot_general(k_tile, q_tile, NT, **f32)
        s = call.scores(dots)
        same = None
        if segments is not None:
            same = wide(segments.k[keys], n.tile_q) == segments.q[:1, at]
        seen = call.seen(offset, same, (n.tile_k, n.tile_q), axis=1)
        p = jnp.exp2(s - lse[:1, at])
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        dv_sum[keys] += jax.lax.dot_general(p.astype(q.dtype), d_out_tile, NN, **f32)
        dp = jax.lax.dot_general(v[keys], d_out_tile, NT, **f32)
        ds = p * (dp + rest[:1, at])
        if call.softcap is not None:
            ds = ds * (1 - (s / (call.softcap * LOG2_E)) ** 2)
        ds = ds.astype(q.dtype)
        dk_sum[keys] += jax.lax.dot_general(ds, q_tile, NN, **f32)
        dq_sum[at] += jax.lax.dot_general(ds, k_tile, TN, **f32)

    bounds = None if segments is None else (segments.bounds[b, i, 0], segments.bounds[b, i, 1])
    call.visit(i + first_query_block, stretch, bounds, tile)
    dq[...] = (dq_sum[...] * call.scale).astype(dq.dtype)

    @pl.when((g == last_g) & (i == last_i))
    def finish() -> None:
        dk[...] = (dk_sum[...] * call.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
