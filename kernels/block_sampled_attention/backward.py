"""Backward kernels: dq by the forward kernel's turns, dk and dv by the same distances seen from the
key block.

    dq      grid (batch, head, query block, turn)               key block = query block - distance
    dk, dv  grid (batch, kv head, key block, query head of      query block = key block + distance
                  its group, slot)

Each sums its gradient in VMEM. Scores are computed transposed, [keys, queries]: what belongs to a
query (log-sum-exp, rest term) is a row, as it lies in memory; see kernels.flash_attention.backward.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.block_sampled_attention.call import Call
from kernels.flash_attention.backward import TN
from kernels.flash_attention.forward import NN, NT


def _tile(call: Call, arrays: Any, log_weight: Any, seen: Any) -> tuple[Any, Any]:
    """pᵀ and dsᵀ of a tile, [keys, queries]; `seen` None: all pairs are."""
    q, k, v, d_out, lse, rest = arrays
    s = call.scores(call.dot(k, q, NT), log_weight)
    p = jnp.exp2(s - lse)
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    return p, p * (call.dot(v, d_out, NT) + rest)


def dq_kernel(call: Call, *refs: Any) -> None:
    """Body of the grid step (batch, head, query block i, turn)."""
    distances, log_weights, q, k, v, d_out, lse, rest, *ids, dq, dq_sum = refs
    i, turn = pl.program_id(2), pl.program_id(3)
    tile_q, tile_k = call.tiles

    @pl.when(turn == 0)
    def start() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    def block(diagonal: bool) -> None:
        for row, column, ahead in call.tiles_of(diagonal):
            at, keys = pl.ds(row, tile_q), pl.ds(column, tile_k)
            arrays = q[at], k[keys], v[keys], d_out[at], lse[:1, at], rest[:1, at]
            seen = call.seen(tuple(ids), at, keys, ahead, axis=1)
            _, ds = _tile(call, arrays, log_weights[call.slot(turn)], seen)
            dq_sum[at] += call.dot(ds.astype(q.dtype), k[keys], TN)

    _, visited = call.key_block(i, turn, distances)
    pl.when(turn == 0)(lambda: block(diagonal=True))
    pl.when((turn > 0) & visited)(lambda: block(diagonal=False))

    @pl.when(turn == call.num_turns - 1)
    def finish() -> None:
        dq[...] = (dq_sum[...] * call.scale).astype(dq.dtype)


def dkv_kernel(call: Call, first_key_block: int, *refs: Any) -> None:
    """Body of the grid step (batch, kv head, key block, query head g of its group, slot)."""
    distances, log_weights, q, k, v, d_out, lse, rest, *ids, dk, dv, dk_sum, dv_sum = refs
    i, g, slot = (pl.program_id(axis) for axis in (2, 3, 4))
    tile_q, tile_k = call.tiles

    @pl.when((g == 0) & (slot == 0))
    def start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def block(diagonal: bool) -> None:
        for row, column, ahead in call.tiles_of(diagonal):
            at, keys = pl.ds(row, tile_q), pl.ds(column, tile_k)
            arrays = q[at], k[keys], v[keys], d_out[at], lse[:1, at], rest[:1, at]
            seen = call.seen(tuple(ids), at, keys, ahead, axis=1)
            p, ds = _tile(call, arrays, log_weights[slot], seen)
            dv_sum[keys] += call.dot(p.astype(q.dtype), d_out[at], NN)
            dk_sum[keys] += call.dot(ds.astype(q.dtype), q[at], NN)

    visited = i + first_key_block + distances[slot] < call.num_blocks
    pl.when(slot == 0)(lambda: block(diagonal=True))
    pl.when((slot > 0) & visited)(lambda: block(diagonal=False))

    @pl.when((g == pl.num_programs(3) - 1) & (slot == pl.num_programs(4) - 1))
    def finish() -> None:
        dk[...] = (dk_sum[...] * call.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
