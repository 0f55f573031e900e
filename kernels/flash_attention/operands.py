"""What the kernels are given: arrays by name, and ids as the vector unit compares them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.chip import SCALAR_BYTES
from kernels.flash_attention.call import LANES, SUBLANES
from kernels.flash_attention.fire import Quotient
from kernels.flash_attention.places import Places
from kernels.flash_attention.sinks import SinkRows


class Far(NamedTuple):
    """Sinks, as they are met out of the window.

    Attributes:
        q: [B, N, T, H].
        k, v: [B, K, query blocks, sinks, H].
        sinks: who they are.
        bias: float32 [N, 1, sinks] in base 2, equal along the last axis.
        factor: so too, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: SinkRows
    bias: jax.Array
    factor: jax.Array | None


class Segments(NamedTuple):
    """Of packed rows.

    Attributes:
        q_ids: int32 [B, T], see `query_ids`.
        k_ids: int32 [B, S].
        bounds: int32 [B, T / block_q, 3], see `block_bounds`.
    """

    q_ids: jax.Array
    k_ids: jax.Array
    bounds: jax.Array


class Arrays(NamedTuple):
    """Of one call, padded to whole blocks.

    Attributes:
        q: [B, N, T, H].
        k, v: [B, K, S, H], S >= T.
        first_block: int32 [1], number of q's first block in the rows, or None: 0.
        segments: or None.
        is_open: int32 [B, S], not 0 for keys that earlier queries see too, or None.
        bias: float32 [N, 2·length - 1] in base 2, see `flash_attention`, or None.
        factor: [N, 2·length - 1], or None.
        far: or None.
        fire: or None.
        places: where tokens are, if that is data, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    first_block: jax.Array | None
    segments: Segments | None
    is_open: jax.Array | None
    bias: jax.Array | None
    factor: jax.Array | None
    far: Far | None
    fire: Quotient | None
    places: Places | None = None


class Operands:
    """The arguments of a kernel in order, those in scalar memory first, with their names."""

    def __init__(self, first_block: jax.Array | None) -> None:
        self.scalars: list[tuple[str, jax.Array]] = []
        if first_block is not None:
            self.prefetch("first_block", first_block)
        self.blocks: list[tuple[str, jax.Array, pl.BlockSpec]] = []

    def prefetch(self, name: str, array: jax.Array) -> None:
        """Into scalar memory, before the first grid step.

        Raises:
            ValueError: it has no room.
        """
        self.scalars.append((name, array))
        size = sum(_scalar_bytes(array.shape) for _, array in self.scalars)
        if size > SCALAR_BYTES:
            raise ValueError(
                f"scalars of all blocks={size} bytes, of them {name} {array.shape}; allowed: "
                f"{SCALAR_BYTES} bytes a call: fewer rows at a time, longer blocks, or a longer "
                "window beside sinks"
            )

    def prefetch_bounds(self, bounds: jax.Array) -> None:
        """[B, blocks, numbers], in one row: see `Call.bounds`."""
        self.prefetch("bounds", bounds.reshape(-1))

    def prefetch_places(self, places: Places) -> None:
        """What of them are scalars."""
        self.prefetch("states", places.words)
        if places.slopes is not None:
            self.prefetch("place_slopes", places.slopes)

    def add(self, name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        """Into VMEM, block by block."""
        self.blocks.append((name, array, spec))

    @property
    def num_prefetched(self) -> int:
        """In scalar memory."""
        return len(self.scalars)

    @property
    def names(self) -> list[str]:
        """In the order of a kernel's references."""
        return [name for name, _ in self.scalars] + [name for name, _, _ in self.blocks]

    @property
    def arrays(self) -> list[jax.Array]:
        """In that order."""
        return [array for _, array in self.scalars] + [array for _, array, _ in self.blocks]

    @property
    def specs(self) -> list[pl.BlockSpec]:
        """Of what is in VMEM."""
        return [spec for _, _, spec in self.blocks]


def _scalar_bytes(shape: tuple[int, ...]) -> int:
    """Of four-byte numbers in scalar memory, which pads the last axis and the one before it."""
    sides = (SUBLANES, LANES)[-len(shape) :]
    padded = (-(-n // side) * side for n, side in zip(shape[-2:], sides, strict=True))
    return 4 * math.prod(shape[:-2]) * math.prod(padded)


def columns(ids: jax.Array) -> jax.Array:
    """[B, T] → [B, T, LANES], equal lanes."""
    return jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))


def rows_of(ids: jax.Array) -> jax.Array:
    """[B, T] → [B, SUBLANES, T], equal rows."""
    return jnp.broadcast_to(ids[:, None], (ids.shape[0], SUBLANES, ids.shape[1]))


def query_ids(ids: jax.Array) -> jax.Array:
    """Padding as a query is of no key's segment, not of that of padding keys either: its id is the
    one that no segment has.
    """
    return jnp.where(ids == 0, jnp.iinfo(jnp.int32).min, ids)
