"""Which key blocks a query block visits, by arithmetic on block numbers alone.

A pattern is a union of intervals of key positions (`jaxlm.attention.mask.AttentionMask` is one).
Seen from query block i, an interval that moves along with the query (causal, sliding window) hides
and shows the same blocks relative to i, whatever i is. So the offsets of partly visible blocks are
static, and the bounds of the loop over wholly visible ones need sums, minima and maxima only: that
is what the TPU compiler can follow when it states a program's cost ahead of time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp


class Interval(Protocol):
    """Keys j that query i sees: j - i <= ahead, i - j < window, j < below; None: no such bound."""

    @property
    def ahead(self) -> int | None: ...
    @property
    def window(self) -> int | None: ...
    @property
    def below(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class Band:
    """-window < j - i <= ahead over blocks of queries and keys, `block_q` a multiple of `block_k`.

    Attributes:
        ahead: keys after the query that it sees; None: all.
        window: keys up to the query that it sees, its own included; None: all.
        num_blocks_q, num_blocks_k: of the whole arrays.
    """

    ahead: int | None
    window: int | None
    block_q: int
    block_k: int
    num_blocks_q: int
    num_blocks_k: int

    @property
    def ratio(self) -> int:
        """Key blocks as long as one query block."""
        return self.block_q // self.block_k

    def edges(self) -> tuple[int, ...]:
        """Relative numbers (key block - first key block beside the query block) of the blocks that
        are partly visible.
        """
        span = self.num_blocks_q * self.ratio + self.num_blocks_k
        return tuple(d for d in range(-span, span) if self._touches(d) and not self._covers(d))

    def whole(self, i: Any) -> tuple[Any, Any]:
        """First and one past the last wholly visible key block of query block i."""
        low, high = 0, self.num_blocks_k
        first, end = low, high
        if self.window is not None:
            first = jnp.maximum(low, i * self.ratio - (self.window - self.block_q) // self.block_k)
        if self.ahead is not None:
            end = jnp.minimum(high, i * self.ratio + (self.ahead + 1) // self.block_k)
        return first, end

    def exists(self, block: Any) -> Any:
        """Whether a key block's number is one."""
        return (block >= 0) & (block < self.num_blocks_k)

    def _touches(self, d: int) -> bool:
        return self.touches(d * self.block_k, self.block_q, self.block_k)

    def _covers(self, d: int) -> bool:
        return self.covers(d * self.block_k, self.block_q, self.block_k)

    def touches(self, offset: int, rows: int, columns: int) -> bool:
        """Whether a tile has a visible pair; offset is its first key minus its first query."""
        lowest, highest = offset - (rows - 1), offset + columns - 1
        near = self.ahead is None or lowest <= self.ahead
        return near and (self.window is None or -highest < self.window)

    def covers(self, offset: int, rows: int, columns: int) -> bool:
        """Whether all pairs of a tile are visible."""
        lowest, highest = offset - (rows - 1), offset + columns - 1
        near = self.ahead is None or highest <= self.ahead
        return near and (self.window is None or -lowest < self.window)

    def visible(self, offset: Any) -> Any:
        """Of pairs with key position - query position = offset."""
        seen = None
        if self.ahead is not None:
            seen = offset <= self.ahead
        if self.window is not None:
            inside = -offset < self.window
            seen = inside if seen is None else seen & inside
        return seen
