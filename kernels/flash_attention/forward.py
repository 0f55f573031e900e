"""Forward kernel: one query block against all key blocks that the pattern shows it.

    grid (batch, head, query block, stretch of keys)

                 keys in VMEM, one stretch (here 6 blocks)
               ┌─────┬─────┬─────┬─────┬─────┬─────┐
    query      │whole│whole│whole│edge │     │     │   whole: a loop, no mask
    block i    │     │     │     │  ╲  │     │     │   edge:  unrolled, masked, its hidden
               └─────┴─────┴─────┴─────┴─────┴─────┘          corners left out

Within a block, tiles of `tile_q` × `tile_k` scores are unrolled, so that the compiler's scheduler has
matrix products of one tile to run beside the exponentials of another: that is where the speed comes
from. The running maximum and sum are kept 128 lanes wide, which spares a relayout per tile.

Letters: T queries, S keys, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.call import HIDDEN, LANES, LOG2_E, Call, Refs

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes → [rows, width]."""
    if width < LANES:
        return x[:, :width]
    return x if width == LANES else jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def kernel(call: Call, *refs: Any) -> None:
    """Body of the grid step (batch b, head n, query block i, stretch of keys j)."""
    r = Refs.split(call, refs, outputs=("out", "lse"), scratch=("top", "total", "acc"))
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    c, n = call, call.blocks

    @pl.when(j == 0)
    def start() -> None:
        r.top[...] = jnp.full_like(r.top, HIDDEN)
        r.total[...] = jnp.zeros_like(r.total)
        r.acc[...] = jnp.zeros_like(r.acc)

    def tile(rows: int, base: Any, width: int, see: Any) -> None:
        """Adds `width` keys from slot `base` of the stretch to query rows [rows, rows + tile_q)."""
        at, keys = pl.ds(rows, n.tile_q), pl.ds(base, width)
        s = jax.lax.dot_general(r.q[at], r.k[keys], NT, preferred_element_type=jnp.float32)
        s = see(s * (c.scale * LOG2_E))
        old = r.top[at]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p, shrink = jnp.exp2(s - _wide(new, width)), jnp.exp2(old - new)
        v = r.v[keys]
        value = jax.lax.dot_general(p.astype(v.dtype), v, NN, preferred_element_type=jnp.float32)
        r.top[at] = new
        r.total[at] = r.total[at] * shrink + p.sum(1, keepdims=True)
        r.acc[at] = r.acc[at] * _wide(shrink, c.head_dim) + value

    c.visit(r, b, i, j, tile, axis=0)

    @pl.when(j == c.num_stretches - 1)
    def finish() -> None:
        total = r.total[...]
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        r.out[...] = (r.acc[...] / _wide(total, c.head_dim)).astype(r.out.dtype)
        # exp2 throughout; the log-sum-exp is handed out in base e.
        lse = jnp.where(empty, HIDDEN, (r.top[...] + jnp.log2(total)) / LOG2_E)
        r.lse[...] = lse.T[:1]
