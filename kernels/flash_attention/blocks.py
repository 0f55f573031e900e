"""Sizes of blocks and tiles, from a small table per TPU generation.

Chosen by the compiler's static cycles, see `launch.compile`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut.

    Attributes:
        block_q, block_k: queries of a grid step; keys of a step of the loop within it.
        tile_q, tile_k: of the scores that exist at one time.
        stretch: keys and values in VMEM at a time.
    """

    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    stretch: int

    @property
    def blocks_per_stretch(self) -> int:
        """Key blocks of a stretch."""
        return self.stretch // self.block_k


TABLE = {
    "v5e": Blocks(1024, 1024, 256, 512, 8192),
    "v5p": Blocks(1024, 1024, 256, 512, 8192),
    "v6e": Blocks(1024, 1024, 512, 512, 8192),
}


def choose_blocks(length_q: int, length_k: int, chip: str = "v5e") -> Blocks:
    """The generation's blocks, smaller where the arrays are."""
    b = TABLE[chip]
    block = min(b.block_q, _up(max(length_q, length_k), 128))
    tile_q, tile_k = _divisor(block, b.tile_q), _divisor(block, b.tile_k)
    stretch = min(b.stretch // block * block, _up(length_k, block))
    return Blocks(block, block, tile_q, tile_k, stretch)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _divisor(n: int, most: int) -> int:
    """The largest multiple of 128 that divides n and is not above `most`."""
    return max(d for d in range(128, most + 1, 128) if n % d == 0)
