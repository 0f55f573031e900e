"""What one call of the kernels is, and how a kernel walks over the tiles that it must compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.pattern import Band

LANES, SUBLANES = 128, 8
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·LOG2_E), and TPUs have an exp2
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# (first query row within the block, first key within the stretch,
#  first key minus first query in positions, or None where the band hides nothing of the tile)
Tile = Callable[[int, Any, "int | None"], None]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half.

    Attributes:
        band: the pattern, in blocks.
        blocks: sizes.
        head_dim: H.
        scale: multiplies q·k.
        softcap: scores become softcap·tanh(scores / softcap); None: they don't.
        segments: whether there are segment ids.
    """

    band: Band
    blocks: Blocks
    head_dim: int
    scale: float
    softcap: float | None
    segments: bool

    @property
    def num_stretches(self) -> int:
        """Stretches of keys that are in VMEM one after the other."""
        return -(-self.band.num_blocks_k // self.blocks.blocks_per_stretch)

    def visit(self, i: Any, j: Any, bounds: tuple[Any, Any] | None, tile: Tile) -> None:
        """Calls `tile` for every tile of query block i and stretch j in which a pair is visible.

        `bounds` are the first and one past the last key block that the segments leave.
        """
        n, band = self.blocks, self.band
        low = j * n.blocks_per_stretch
        high = low + n.blocks_per_stretch
        first, end = band.whole(i)
        start, stop = (low, high) if bounds is None else bounds
        if bounds is not None:
            start, stop = jnp.maximum(start, low), jnp.minimum(stop, high)

        def block(kb: Any, offset: int | None) -> None:
            for rows in range(0, n.block_q, n.tile_q):
                for keys in range(0, n.block_k, n.tile_k):
                    at = None if offset is None else offset + keys - rows
                    if at is not None:
                        if not band.touches(at, n.tile_q, n.tile_k):
                            continue
                        if band.covers(at, n.tile_q, n.tile_k):
                            at = None
                    tile(rows, (kb - low) * n.block_k + keys, at)

        jax.lax.fori_loop(
            jnp.maximum(first, start), jnp.minimum(end, stop), lambda kb, _: block(kb, None), None
        )
        for edge in band.edges():
            kb = i * band.ratio + edge

            @pl.when(band.exists(kb) & (start <= kb) & (kb < stop))
            def _(kb: Any = kb, edge: int = edge) -> None:
                block(kb, edge * n.block_k)

    def scores(self, dots: jax.Array) -> jax.Array:
        """q·k → scores in base 2, capped."""
        s = dots * (self.scale * LOG2_E)
        if self.softcap is None:
            return s
        cap = self.softcap * LOG2_E
        return cap * jnp.tanh(s / cap)

    def seen(self, offset: int | None, same: Any, shape: tuple[int, int], axis: int) -> Any:
        """Which pairs of a tile are visible, or None for all. `axis` is that of the queries."""
        if offset is None:
            return same
        ahead = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
        ahead = ahead - jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        seen = self.band.visible(ahead + offset)
        return seen if same is None else seen & same


def wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes → [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
