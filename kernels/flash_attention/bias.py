"""A number of the distance alone: a vector in memory, a tile of equal diagonals in registers.

The vector of a head, [1, 2·reach], holds the number of distance d = query - key at `reach + d`, or
at `reach - d` where keys run along the lanes: then both kinds of tile read it from left to right.

    lanes    … b₃ b₂ b₁ b₀ b₋₁ …         tile   b₀ b₋₁ b₋₂      every row is the one above,
             └── a window of it ──┘              b₁ b₀  b₋₁      turned by one lane
                                                 b₂ b₁  b₀
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.call import LANES, SUBLANES


def along_lanes(of_distance: jax.Array, reach: int, keys: bool) -> jax.Array:
    """[heads, 2·length - 1] → float32 [heads, 1, 2·reach]; zeros past `length`.

    `keys`: whether keys run along the lanes of a tile, or queries.
    """
    size = of_distance.shape[1]
    x = of_distance[:, ::-1] if keys else of_distance
    before = reach - (size + 1) // 2 + 1
    whole = jnp.pad(x, ((0, 0), (before, 2 * reach - before - size)))
    return whole.astype(jnp.float32)[:, None]


def of_distance(along: jax.Array, reach: int, length: int) -> jax.Array:
    """The inverse of `along_lanes` where queries run along the lanes, of a gradient: float32
    [heads, 1, 2·reach] → [heads, 2·length - 1].
    """
    before = reach - length + 1
    return along[:, 0, before : before + 2 * length - 1]


def _window(first: Any, rows: int, columns: int) -> Any:
    """The lanes that a tile reads; `first` is that of its entry (0, 0), a multiple of 128."""
    start = first - rows
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), rows + columns)


def tile(along: Any, first: Any, rows: int, columns: int, strides: bool) -> jax.Array:
    """float32 [rows, columns]: entry (r, c) is what lies at lane first + c - r.

    `strides`: whether the chip turns each row by its number at once. Else rows double again and
    again: below those that are there, the same turned by how many they are.
    """
    window = along[:, _window(first, rows, columns)]
    if strides:
        x = jnp.broadcast_to(window, (LANES, rows + columns))
        x = pltpu.roll(x, columns, 1, stride=1, stride_axis=0)
    else:
        x = _turn_right(window, columns)
        while x.shape[0] < LANES:
            x = jnp.concatenate([x, _turn_right(x, x.shape[0])])
    return jnp.concatenate([_turn_right(x, r)[:, :columns] for r in range(0, rows, LANES)])


def add_diagonals(along: Any, first: Any, x: jax.Array) -> None:
    """Adds every diagonal's sum of a tile x [rows, columns] to its lane: the transpose of `tile`.

    Rows are laid onto one another, turned by what is between them: 128 at a time, which costs
    nothing, then the lower half onto the upper, again and again.
    """
    rows, columns = x.shape
    x = jnp.concatenate([jnp.zeros((rows, rows), x.dtype), x], axis=1)
    slabs = [_turn_left(x[r : r + LANES], r) for r in range(0, rows, LANES)]
    x = functools.reduce(jnp.add, slabs)
    height = LANES
    while height > SUBLANES:
        height //= 2
        x = x[:height] + _turn_left(x[height:], height)
    last = [_turn_left(x[r : r + 1], r) for r in range(SUBLANES)]
    along[:, _window(first, rows, columns)] += functools.reduce(jnp.add, last)


def _turn_right(x: jax.Array, by: int) -> jax.Array:
    return pltpu.roll(x, by, 1) if by else x


def _turn_left(x: jax.Array, by: int) -> jax.Array:
    return pltpu.roll(x, x.shape[1] - by, 1) if by else x
