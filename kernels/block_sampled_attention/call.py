"""The static half of a call, and which key block is whose turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels.flash_attention.call import LOG2_E, wide
from kernels.precision import product


@dataclasses.dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        block: tokens of a block, of queries and of keys.
        num_blocks: of a row.
        slots: length of the list of distances.
        sink_blocks: the first key blocks, which every later query sees.
        scale: multiplies q·k.
        precision: of matrix products, those of the backward pass too.
    """

    block: int
    num_blocks: int
    slots: int
    sink_blocks: int
    scale: float
    precision: jax.lax.Precision

    @property
    def num_turns(self) -> int:
        """Key blocks that a query block may visit: its own, the sinks, those at the distances."""
        return self.slots + self.sink_blocks

    def slot(self, turn: Any) -> Any:
        """Of the list; 0, which is the query block's own, for sinks too."""
        return jnp.maximum(turn - self.sink_blocks, 0)

    def key_block(self, i: Any, turn: Any, distances: Any) -> tuple[Any, Any]:
        """The key block of a query block's turn, and whether it is visited then: not if there is no
        such block, nor a sink twice. One that is not visited has a number too, for the fetch.
        """
        sink = (turn > 0) & (turn <= self.sink_blocks)
        at_distance = i - distances[self.slot(turn)]
        block = jnp.where(sink, turn - 1, at_distance)
        visited = jnp.where(sink, block < i, (turn == 0) | (block >= self.sink_blocks))
        return jnp.clip(block, 0, i), visited

    @property
    def tiles(self) -> tuple[int, int]:
        """Queries and keys of the scores that exist at one time."""
        rows = 256 if self.block % 256 == 0 else 128
        return rows, 512 if self.block % 512 == 0 else rows

    def tiles_of(self, diagonal: bool) -> Iterator[tuple[int, int, int | None]]:
        """First query, first key, and the key's lead over the query, or None if all is visible."""
        tile_q, tile_k = self.tiles
        for row in range(0, self.block, tile_q):
            for column in range(0, self.block, tile_k):
                ahead = column - row
                if diagonal and ahead >= tile_q:
                    continue
                masked = diagonal and ahead + tile_k - 1 > 0
                yield row, column, ahead if masked else None

    def dot(self, a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
        """A matrix product in float32."""
        return product(a, b, dims, self.precision)

    def scores(self, dots: jax.Array, log_weight: Any) -> jax.Array:
        """q·k → scores in base 2."""
        return dots * (self.scale * LOG2_E) + log_weight * LOG2_E

    def seen(
        self, ids: tuple[Any, ...], at: Any, keys: Any, ahead: int | None, axis: int
    ) -> jax.Array | None:
        """Which pairs of a tile are visible, or None for all.

        Args:
            ids: references of the queries' and of the keys' segments, or none; those of the side
                `axis` are columns, the others rows.
            at, keys: the tile's queries and keys.
            ahead: see `tiles_of`.
            axis: that of the queries.
        """
        (tile_q, tile_k), seen = self.tiles, None
        if ahead is not None:
            shape = (tile_q, tile_k) if axis == 0 else (tile_k, tile_q)
            lead = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
            seen = lead - jax.lax.broadcasted_iota(jnp.int32, shape, axis) + ahead <= 0
        if ids:
            q, k = ids
            if axis == 0:
                same = wide(q[at], tile_k) == k[:1, keys]
            else:
                same = wide(k[keys], tile_q) == q[:1, at]
            seen = same if seen is None else seen & same
        return seen
