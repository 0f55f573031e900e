"""A small ReLU network of one number is a broken line: a start, and a change of slope at each kink.

    w < 0   ╲              t = -b/w, in [0, 1]       max(w·x + b, 0)
             ╲____                                       = max(b, 0) + min(w, 0)·x
    w > 0     ____╱                                        + |w|·max(x - t, 0)
              t   t

So where x lies between two kinks the network is a product and a sum, and a kernel that knows the
range of x in a tile works out only the units whose kinks lie in it. The heads share their kinks.
Gradients of the line are those of the network, by jax: it is the network itself, written otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP = 4  # kinks that are worked out at a time
TINY = 1e-30


class BrokenLine(NamedTuple):
    """start + Σₖ slopes[k]·max(x - kinks[k], 0), a line a head.

    Attributes:
        start: float32 [heads].
        slopes: float32 [heads, kinks].
        kinks: float32 [kinks], ascending from 0 to at most 1; the first is 0.
    """

    start: jax.Array
    slopes: jax.Array
    kinks: jax.Array


class Pieces(NamedTuple):
    """A line with its sums: if kinks before n are passed and those from m on are not, it is
    levels[m] + rises[n]·x + Σ slopes[k]·max(x, kinks[k]) over k in [n, m).

    Attributes:
        slopes: float32 [heads, kinks + GROUP - 1], the last ones 0, so that groups are whole.
        kinks: float32 [kinks + GROUP - 1].
        levels, rises: float32 [heads, kinks + GROUP].
    """

    slopes: jax.Array
    kinks: jax.Array
    levels: jax.Array
    rises: jax.Array


def broken_line(w_in: jax.Array, b_in: jax.Array, w_out: jax.Array, b_out: jax.Array) -> BrokenLine:
    """The line that equals b_out + w_out @ max(w_in·x + b_in, 0) for all x in [0, 1].

    Args:
        w_in, b_in: [width].
        w_out: [heads, width].
        b_out: [heads].
    """
    w_in, b_in, w_out, b_out = (x.astype(jnp.float32) for x in (w_in, b_in, w_out, b_out))
    falls = w_in < 0
    # A weight of 0 counts as one above it, so that it has the network's gradient.
    kinks = (-b_in / jnp.where(w_in == 0, TINY, w_in)).clip(0, 1)
    order = jnp.argsort(kinks)
    first = (w_out * jnp.where(falls, w_in, 0)[None]).sum(1, keepdims=True)
    turns = w_out * jnp.where(falls, -w_in, w_in)[None]
    return BrokenLine(
        b_out + (w_out * jnp.maximum(b_in, 0)[None]).sum(1),
        jnp.concatenate([first, turns[:, order]], axis=1),
        jnp.concatenate([jnp.zeros(1), kinks[order]]),
    )


def pieces(line: BrokenLine) -> Pieces:
    """Its sums."""
    slopes = jnp.pad(line.slopes, ((0, 0), (0, GROUP - 1)))
    kinks = jnp.pad(line.kinks, (0, GROUP - 1), constant_values=1.0)

    def before(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0)))

    return Pieces(slopes, kinks, line.start[:, None] - before(slopes * kinks[None]), before(slopes))
