"""Sizes of blocks and tiles, from a small table per TPU generation.

Chosen by the compiler's static cycles, see `launch.compile`.
"""

from __future__ import annotations

import dataclasses

from kernels.chip import target_chip


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut.

    Attributes:
        block_q, block_k: queries of a grid step, a multiple of the keys of a step of the loop
            within it.
        tile_q, tile_k: of the scores that exist at one time; multiples of 128 that divide a block.
        stretch: keys and values in VMEM at a time, whole blocks of them.
        vmem_bytes: what a call may take of it.
        early: tiles whose scores the forward kernel begins before it needs them. The compiler finds
            such work by itself on v5e; on v6e it leaves the matrix unit idle a tenth longer.
    """

    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    stretch: int
    vmem_bytes: int = 64 << 20
    early: int = 0

    def __post_init__(self) -> None:
        multiples = (
            *(("tile_q", 128), ("tile_k", 128)),
            *(("block_k", self.tile_k), ("block_q", self.tile_q)),
            *(("block_q", self.block_k), ("stretch", self.block_k), ("vmem_bytes", 1)),
        )
        for name, of in multiples:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value % of:
                raise ValueError(f"Blocks: {name}={value!r}; allowed: a multiple of {of}")
        if not isinstance(self.early, int) or self.early < 0:
            raise ValueError(f"Blocks: early={self.early!r}; allowed: an integer >= 0")

    @property
    def blocks_per_stretch(self) -> int:
        """Key blocks of a stretch."""
        return self.stretch // self.block_k


# Forward and backward.
TABLE = {
    "v4": (
        Blocks(512, 512, 256, 512, 2048, 15 << 20),
        Blocks(512, 512, 256, 512, 2048, 15 << 20),
    ),
    "v5e": (Blocks(1024, 1024, 256, 512, 8192), Blocks(1024, 1024, 256, 512, 8192)),
    "v5p": (Blocks(1024, 1024, 256, 512, 8192), Blocks(1024, 1024, 256, 512, 8192)),
    "v6e": (Blocks(1024, 1024, 512, 512, 8192, early=1), Blocks(1024, 1024, 512, 512, 8192)),
    "tpu7x": (Blocks(1024, 1024, 512, 512, 8192, early=1), Blocks(1024, 1024, 512, 512, 8192)),
}


def known_chip(chip: str | None) -> str:
    """A generation; None: that which the program is traced for.

    Raises:
        ValueError: no such generation.
    """
    chip = target_chip() if chip is None else chip
    if chip not in TABLE:
        raise ValueError(f"chip={chip!r}; allowed: {', '.join(TABLE)}; None on a TPU")
    return chip


def check_blocks(blocks: tuple[Blocks, Blocks], longest_block: int | None) -> None:
    """Of sizes that a caller gives; see `choose_blocks`.

    Raises:
        ValueError: not two, or too long.
    """
    if not isinstance(blocks, tuple) or [type(b) for b in blocks] != [Blocks, Blocks]:
        raise ValueError(f"blocks={blocks!r}; allowed: two Blocks, of forward and of backward")
    longest = max(b.block_q for b in blocks)
    if longest_block is not None and longest > longest_block:
        raise ValueError(
            f"blocks of {longest} queries with sinks; allowed: no more than the window's "
            f"{longest_block}"
        )


def choose_blocks(
    length: int,
    chip: str,
    row_bytes: int,
    longest_block: int | None = None,
    part: int | None = None,
) -> tuple[Blocks, Blocks]:
    """The generation's blocks of forward and backward, smaller where the arrays are, and shorter
    stretches where a key has more bytes than the table's 128 bfloat16 numbers: they fill VMEM.
    No block has more than `longest_block` tokens, which is at least 128; a block divides `part`, a
    multiple of 128.

    Raises:
        ValueError: no such generation.
    """
    forward, backward = TABLE[known_chip(chip)]
    most = max(forward.block_q, backward.block_q) if longest_block is None else longest_block
    sizes = length, row_bytes, most, part
    return _fit(forward, *sizes), _fit(backward, *sizes)


def _fit(b: Blocks, length: int, row_bytes: int, most: int, part: int | None) -> Blocks:
    longest = b.stretch * 256 // max(row_bytes, 256)
    block = min(b.block_q, longest // 128 * 128, most // 128 * 128, -(-length // 128) * 128)
    if part is not None:
        block = _divisor(part, block)
    num_blocks = -(-length // block)
    num_stretches = -(-num_blocks * block // longest)
    stretch = -(-num_blocks // num_stretches) * block
    return dataclasses.replace(
        b,
        block_q=block,
        block_k=block,
        tile_q=_divisor(block, b.tile_q),
        tile_k=_divisor(block, b.tile_k),
        stretch=stretch,
    )


def _divisor(n: int, most: int) -> int:
    """The largest multiple of 128 that divides n and is not above `most`."""
    return max(d for d in range(128, most + 1, 128) if n % d == 0)
