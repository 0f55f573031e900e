"""Which key blocks a query block visits, by arithmetic on block numbers alone.

Seen from query block i, a band that moves along with the query (causal, sliding window) hides and
shows the same blocks relative to i, whatever i is. So the offsets of partly visible blocks are
static, and the bounds of the loop over wholly visible ones need sums, minima and maxima only: that
is what the TPU compiler can follow when it states a program's cost ahead of time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Band:
    """-window < j - i <= ahead over blocks of queries i and keys j; a query block is as long as one
    key block or several.

    Attributes:
        ahead: keys after the query that it sees; None: all.
        window: keys up to the query that it sees, its own included; None: all.
        block_q, block_k: tokens.
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
        relative = range(-self.num_blocks_q * self.ratio, self.num_blocks_k)
        offsets = [(d, d * self.block_k) for d in relative]
        size = self.block_q, self.block_k
        return tuple(d for d, o in offsets if self.touches(o, *size) and not self.covers(o, *size))

    def whole(self, i: Any) -> tuple[Any, Any]:
        """First and one past the last wholly visible key block of query block i."""
        first: Any = 0
        end: Any = self.num_blocks_k
        if self.window is not None:
            first = jnp.maximum(0, i * self.ratio - (self.window - self.block_q) // self.block_k)
        if self.ahead is not None:
            end = jnp.minimum(end, i * self.ratio + (self.ahead + 1) // self.block_k)
        return first, end

    def visible_blocks(self, i: Any) -> tuple[Any, Any]:
        """First and last key block of which query block i sees something."""
        first: Any = 0
        last: Any = self.num_blocks_k - 1
        if self.window is not None:
            before = (self.window + self.block_k - 2) // self.block_k
            first = jnp.maximum(0, i * self.ratio - before)
        if self.ahead is not None:
            after = (self.ahead + self.block_q - 1) // self.block_k
            last = jnp.minimum(last, i * self.ratio + after)
        return first, last

    def queries_of(self, first: int, end: int) -> tuple[int, int]:
        """First and one past the last query block that sees one of the key blocks [first, end)."""
        low, high = 0, self.num_blocks_q
        if self.ahead is not None:
            low = max(0, (first * self.block_k - self.ahead) // self.block_q)
        if self.window is not None:
            high = min(high, -(-(end * self.block_k + self.window - 1) // self.block_q))
        return low, max(low, high)

    def exists(self, block: Any) -> Any:
        """Whether a key block's number is one."""
        return (block >= 0) & (block < self.num_blocks_k)

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
        seen = jnp.ones(offset.shape, bool)
        if self.ahead is not None:
            seen = seen & (offset <= self.ahead)
        if self.window is not None:
            seen = seen & (-offset < self.window)
        return seen

    def num_pairs(self, length: int) -> int:
        """Visible pairs of `length` tokens."""
        later = length if self.ahead is None else min(self.ahead, length)
        earlier = length if self.window is None else min(self.window - 1, length)

        def side(reach: int) -> int:  # sum over tokens of min(tokens on that side, reach)
            return (
                reach * (length - reach) + reach * (reach - 1) // 2
                if reach < length
                else (length * (length - 1) // 2)
            )

        return length + side(later) + side(earlier)
