"""What one call of the kernels is, and how a kernel walks over the tiles that it must compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.pattern import Band

LANES = 128
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·LOG2_E), and TPUs have an exp2
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# (first query row of the block, first key slot of the stretch, keys, scores -> scores that count)
Tile = Callable[[int, Any, int, Callable[[jax.Array], jax.Array]], None]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half.

    Attributes:
        band: the pattern, in blocks.
        blocks: sizes.
        num_keys: keys that there are; those after them are padding.
        head_dim: H.
        scale: multiplies q·k.
        softcap: scores become softcap·tanh(scores / softcap); None: they don't.
        segments: whether there are segment ids.
        bias: whether there is a bias by distance.
    """

    band: Band
    blocks: Blocks
    num_keys: int
    head_dim: int
    scale: float
    softcap: float | None
    segments: bool
    bias: bool

    @property
    def num_stretches(self) -> int:
        """Stretches of keys that are in VMEM one after the other."""
        return -(-self.band.num_blocks_k // self.blocks.blocks_per_stretch)

    def visit(self, r: Any, b: Any, i: Any, j: Any, tile: Tile, axis: int) -> None:
        """Calls `tile` for every tile of query block i and stretch j in which a pair is visible.

        `axis` is that of the queries in the scores.
        """
        n, band = self.blocks, self.band
        low = j * n.blocks_per_stretch
        high = low + n.blocks_per_stretch
        first, end = band.whole(i)
        end = jnp.minimum(end, self.num_keys // n.block_k)

        def block(kb: Any, offset: int | None) -> None:
            for rows in range(0, n.block_q, n.tile_q):
                for keys in range(0, n.block_k, n.tile_k):
                    at = None if offset is None else offset + keys - rows
                    if at is not None and not band.touches(at, n.tile_q, n.tile_k):
                        continue
                    whole = at is None or band.covers(at, n.tile_q, n.tile_k)
                    see = self._seer(None if whole else at, axis)
                    tile(rows, (kb - low) * n.block_k + keys, n.tile_k, see)

        jax.lax.fori_loop(
            jnp.maximum(first, low), jnp.minimum(end, high), lambda kb, _: block(kb, None), None
        )
        for edge in band.edges():
            kb = i * band.ratio + edge

            @pl.when(band.exists(kb) & (low <= kb) & (kb < high))
            def _(kb: Any = kb, edge: int = edge) -> None:
                block(kb, edge * n.block_k)

    def _seer(self, offset: int | None, axis: int) -> Callable[[jax.Array], jax.Array]:
        """Scores (base 2) → those of visible pairs, capped; -inf elsewhere."""

        def see(s: jax.Array) -> jax.Array:
            if self.softcap is not None:
                cap = self.softcap * LOG2_E
                s = cap * jnp.tanh(s / cap)
            if offset is None:
                return s
            ahead = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1 - axis)
            ahead = ahead - jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
            return jnp.where(self.band.visible(ahead + offset), s, -jnp.inf)

        return see


class Refs(SimpleNamespace):
    """A kernel's references by name."""

    @classmethod
    def split(
        cls, call: Call, refs: Any, outputs: tuple[str, ...], scratch: tuple[str, ...]
    ) -> Refs:
        """In the order in which Pallas passes them."""
        names = ["q", "k", "v", *outputs, *scratch]
        return cls(**dict(zip(names, refs, strict=True)))
