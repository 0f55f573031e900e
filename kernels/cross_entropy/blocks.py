"""Sizes of blocks: as many rows as entries of the vocabulary, as many as VMEM holds.

The more rows a block has, the more rarely the matrix is read; the more entries, the more rarely the
hidden states.
"""

from __future__ import annotations

import dataclasses

LANES = 128
MIB = 2**20
# What a call may take of VMEM, by TPU generation.
VMEM_BYTES = {
    "v4": 15 * MIB,
    "v5e": 60 * MIB,
    "v5p": 60 * MIB,
    "v6e": 60 * MIB,
    "tpu7x": 60 * MIB,
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut.

    Attributes:
        rows: tokens of a grid step.
        vocab: entries of the vocabulary of a grid step.
        tile: rows whose logits exist at one time; divides `rows`.
        vmem_bytes: what a call may take of it.
    """

    rows: int
    vocab: int
    tile: int
    vmem_bytes: int = 60 * MIB


def choose_blocks(tokens: int, width: int, vocab: int, itemsize: int, chip: str) -> Blocks:
    """The generation's blocks, smaller where the arrays are.

    Raises:
        ValueError: no such generation, or hidden states wider than VMEM has room for.
    """
    most = widest(itemsize, chip) // width * LANES
    if most == 0:
        limit = f"{widest(itemsize, chip)} on {chip} at {itemsize} bytes a number"
        raise ValueError(f"width D={width}; allowed: at most {limit}")
    most = min(most, 512)
    rows = min(most, _up(tokens, LANES))
    tile = 256 if rows % 256 == 0 else LANES
    return Blocks(rows, min(most, _up(vocab, LANES)), tile, VMEM_BYTES[chip])


def widest(itemsize: int, chip: str) -> int:
    """The most numbers that a hidden state may have, of `itemsize` bytes each.

    Either kernel keeps a float32 sum as large as one of its blocks, and three blocks twice: one is
    in use while the other is copied. A quarter of VMEM is left for what is worked out.

    Raises:
        ValueError: no such generation.
    """
    if chip not in VMEM_BYTES:
        raise ValueError(f"chip={chip!r}; allowed: {', '.join(VMEM_BYTES)}")
    return VMEM_BYTES[chip] * 3 // 4 // LANES // (4 + 6 * itemsize)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
