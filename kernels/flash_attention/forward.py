"""Forward kernel: one query block against all key blocks that the pattern shows it.

    grid (batch, head, query block, stretch of keys)

                 keys in VMEM, one stretch (here 6 blocks)
               ┌─────┬─────┬─────┬─────┬─────┬─────┐
    query      │whole│whole│whole│edge │     │     │   whole: a loop, no mask
    block i    │     │     │     │  ╲  │     │     │   edge:  unrolled, masked, its hidden
               └─────┴─────┴─────┴─────┴─────┴─────┘          corners left out

Within a block, tiles of `tile_q` × `tile_k` scores are unrolled, so that the compiler's scheduler
has matrix products of one tile to run beside the exponentials of another: that is where the speed
comes from. The running maximum and sum are kept 128 lanes wide, which spares a relayout per tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.call import HIDDEN, LOG2_E, Call, wide

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


class Segments(NamedTuple):
    """References: bounds [B, query blocks, 2] in scalar memory, ids of a query block as columns
    [block_q, LANES], of a stretch of keys as rows [SUBLANES, stretch].
    """

    bounds: Any
    q: Any
    k: Any


def kernel(call: Call, *refs: Any) -> None:
    """Body of the grid step (batch b, head n, query block i, stretch of keys j)."""
    segments = None
    if call.segments:
        bounds, q, k, v, q_ids, k_ids, *rest = refs
        segments = Segments(bounds, q_ids, k_ids)
    else:
        q, k, v, *rest = refs
    out, lse, top, total, acc = rest
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    n = call.blocks

    @pl.when(j == 0)
    def start() -> None:
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def tile(rows: int, base: Any, offset: int | None) -> None:
        """Adds `tile_k` keys from slot `base` to query rows [rows, rows + tile_q)."""
        at, keys = pl.ds(rows, n.tile_q), pl.ds(base, n.tile_k)
        dots = jax.lax.dot_general(q[at], k[keys], NT, preferred_element_type=jnp.float32)
        s = call.scores(dots)
        same = None
        if segments is not None:
            same = wide(segments.q[at], n.tile_k) == segments.k[:1, keys]
        seen = call.seen(offset, same, (n.tile_q, n.tile_k), axis=0)
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
        old = top[at]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p, shrink = jnp.exp2(s - wide(new, n.tile_k)), jnp.exp2(old - new)
        value = jax.lax.dot_general(
            p.astype(v.dtype), v[keys], NN, preferred_element_type=jnp.float32
        )
        top[at] = new
        total[at] = total[at] * shrink + p.sum(1, keepdims=True)
        acc[at] = acc[at] * wide(shrink, call.head_dim) + value

    bounds = None if segments is None else (segments.bounds[b, i, 0], segments.bounds[b, i, 1])
    call.visit(i, j, bounds, tile)

    @pl.when(j == call.num_stretches - 1)
    def finish() -> None:
        sums = total[...]
        empty = sums == 0
        sums = jnp.where(empty, 1.0, sums)
        out[...] = (acc[...] / wide(sums, call.head_dim)).astype(out.dtype)
        # exp2 throughout; the log-sum-exp is handed out in base e.
        lse[...] = jnp.where(empty, HIDDEN, (top[...] + jnp.log2(sums)) / LOG2_E).T[:1]
