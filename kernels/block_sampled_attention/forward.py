"""Forward kernel: a query block against the key blocks at the drawn distances, one a grid step.

    grid (batch, head, query block i, turn)

                 sinks                 drawn distances 1, 3, 4: i-4 and i-3 and i-1
               ┌─────┬─────┬─────┬─────┬─────┬─────┬─────┐
    query      │whole│     │whole│whole│     │whole│edge │     the edge first: then each query
    block i    │     │     │     │     │     │     │  ╲  │     has seen a key, itself
               └─────┴─────┴─────┴─────┴─────┴─────┴─────┘

The distances are prefetched scalars, so a block that is not drawn is not fetched either.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.block_sampled_attention.call import Call
from kernels.flash_attention.call import HIDDEN, LOG2_E, wide
from kernels.flash_attention.forward import NN, NT


def kernel(call: Call, *refs: Any) -> None:
    """Body of the grid step (batch, head, query block i, turn)."""
    distances, log_weights, q, k, v, *ids, out, lse, top, total, acc = refs
    i, turn = pl.program_id(2), pl.program_id(3)
    tile_q, tile_k = call.tiles
    weight = log_weights[call.slot(turn)]

    @pl.when(turn == 0)
    def start() -> None:
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def block(diagonal: bool) -> None:
        for row, column, ahead in call.tiles_of(diagonal):
            at, keys = pl.ds(row, tile_q), pl.ds(column, tile_k)
            s = call.scores(call.dot(q[at], k[keys], NT), weight)
            seen = call.seen(tuple(ids), at, keys, ahead, axis=0)
            if seen is not None:
                s = jnp.where(seen, s, -jnp.inf)
            old = top[at]
            new = jnp.maximum(old, s.max(1, keepdims=True))
            p, shrink = jnp.exp2(s - wide(new, tile_k)), jnp.exp2(old - new)
            value = call.dot(p.astype(v.dtype), v[keys], NN)
            top[at] = new
            total[at] = total[at] * shrink + p.sum(1, keepdims=True)
            acc[at] = acc[at] * wide(shrink, acc.shape[1]) + value

    _, visited = call.key_block(i, turn, distances)
    pl.when(turn == 0)(lambda: block(diagonal=True))
    pl.when((turn > 0) & visited)(lambda: block(diagonal=False))

    @pl.when(turn == call.num_turns - 1)
    def finish() -> None:
        sums = jnp.where(total[...] == 0, 1.0, total[...])  # 0: padding, which sees nothing
        out[...] = (acc[...] / wide(sums, acc.shape[1])).astype(out.dtype)
        found = (top[...] + jnp.log2(sums)) / LOG2_E
        lse[...] = jnp.where(total[...] == 0, HIDDEN, found).T[:1]
