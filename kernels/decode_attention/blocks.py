"""What a decode kernel takes of VMEM, and how its queries are cut so that it fits.

    a grid step holds    keys, values, positions, bias of a block     twice: one is copied meanwhile
                         queries and results of its heads and rows    twice
                         largest score, sum and weighed values        once
                         what is worked out of a block

The state of a head's rows stays while the cache passes by. So where all heads' is too much, heads
are cut into pieces first: each piece reads its own part of the cache. Only then rows are cut, and
each piece of them reads the cache anew: that many rows take longer than the reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kernels.decode_attention.softmax import LANES

SUBLANES = 8
TILE_ROWS = 128  # most rows whose scores exist at one time
MIB = 1 << 20
# What a call may take, by TPU generation. Beside it XLA keeps small results in VMEM, and v5p and
# tpu7x have 64 MiB, v4 has 16.
VMEM_BYTES = {
    "v4": 15 * MIB,
    "v5e": 48 * MIB,
    "v5p": 48 * MIB,
    "v6e": 48 * MIB,
    "tpu7x": 48 * MIB,
}


def vmem_bytes(chip: str) -> int:
    """What a call may take.

    Raises:
        ValueError: no such generation.
    """
    if chip not in VMEM_BYTES:
        raise ValueError(f"chip={chip!r}; allowed: {', '.join(VMEM_BYTES)}")
    return VMEM_BYTES[chip]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the queries of a sequence are cut; a piece is a step of the grid's first axis.

    Attributes:
        heads: pieces of the kv heads.
        rows: pieces of each head's rows.
        tiles: of a piece's rows, whose scores exist one after the other.
        tile: rows of one.
    """

    heads: int
    rows: int
    tiles: int
    tile: int

    @property
    def pieces(self) -> int:
        """Of a sequence."""
        return self.heads * self.rows

    @property
    def piece_rows(self) -> int:
        """Rows of a piece."""
        return self.tiles * self.tile

    @property
    def all_rows(self) -> int:
        """R, padding included."""
        return self.rows * self.piece_rows

    def of(self, step: Any) -> tuple[Any, Any, Any]:
        """Sequence, piece of the kv heads and piece of the rows, of a step of that axis."""
        return step // self.pieces, step % self.pieces // self.rows, step % self.rows


def cuts(steps: int, rows: int) -> Iterator[Cut]:
    """From the coarsest.

    Args:
        steps: grid steps that all kv heads take.
        rows: of a head, without padding.
    """
    tiles = _up(rows, TILE_ROWS) // TILE_ROWS
    for heads in (n for n in range(1, steps + 1) if steps % n == 0):
        yield _cut(heads, 1, tiles, rows)
    for pieces in range(2, tiles + 1):
        yield _cut(steps, pieces, tiles, rows)


def _cut(heads: int, pieces: int, tiles: int, rows: int) -> Cut:
    each = -(-tiles // pieces)
    # A loop over tiles starts where a register of 16-bit numbers starts, which has 16 rows.
    multiple = SUBLANES if pieces * each == 1 else 2 * SUBLANES
    return Cut(heads, pieces, each, _up(-(-rows // (pieces * each)), multiple))


def state_bytes(cut: Cut, heads: int, head_dim: int, itemsize: int, splits: int) -> int:
    """Of queries, results and state of a piece.

    Args:
        cut: the piece is one of it.
        heads: kv heads of the piece.
        head_dim, itemsize: of queries.
        splits: if several, results are float32.
    """
    width, rows = _up(head_dim, LANES), _up(cut.piece_rows, 2 * SUBLANES)
    result = itemsize if splits == 1 else 4
    row = 2 * width * (itemsize + result) + 2 * LANES * 4 + (2 * LANES + width) * 4
    return heads * rows * row + 2 * rows * LANES * 4


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
