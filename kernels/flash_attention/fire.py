"""FIRE: what a small network adds to a score, of the distance measured by the query's position.

    f(numerator(query - key) · reciprocal(query))        (Li et al. 2024, arXiv 2310.04418)

Here are its arrays; fire_tiles.py works out a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.bias import of_distance
from kernels.flash_attention.broken_line import BrokenLine, broken_line
from kernels.flash_attention.call import LOG2_E


class Fire(NamedTuple):
    """A network of a quotient, added to capped scores. Of visible pairs the quotient is in [0, 1].

    Attributes:
        numerator: [2·length - 1]: entry length - 1 + d is that of distance d = i - j; not negative,
            and it does not fall as d grows.
        reciprocal: [batch, length], of each query's denominator, above 0.
        w_in, b_in: [width], the layer of rectified units that the heads share.
        w_out, b_out: [heads, width] and [heads].
    """

    numerator: jax.Array
    reciprocal: jax.Array
    w_in: jax.Array
    b_in: jax.Array
    w_out: jax.Array
    b_out: jax.Array


class Quotient(NamedTuple):
    """`Fire` as the kernels have it; they give the gradients of all of it.

    Attributes:
        numerator: float32 [2·reach - 1].
        reciprocal: float32 [batch, length].
        line: the network.
    """

    numerator: jax.Array
    reciprocal: jax.Array
    line: BrokenLine


class Sums(NamedTuple):
    """Of a backward pass; what the gradients of a `Quotient` follow from.

    Attributes:
        line: float32 [batch, heads, 2, kinks, LANES]: of the gradient of scores, and of that times
            the quotient, over the pairs that passed each kink.
        numerator: float32 [batch, heads, 1, 2·reach], in base 2; see `bias.along_lanes`, queries
            run along the lanes.
        reciprocal: float32 [batch, heads, 1, length], of the quotient times its gradient in base 2.
    """

    line: Any
    numerator: Any
    reciprocal: Any


def quotient(fire: Fire) -> Quotient:
    """The network as a line."""
    numerator, reciprocal = (x.astype(jnp.float32) for x in fire[:2])
    return Quotient(numerator, reciprocal, broken_line(*fire[2:]))


def gradients(x: Quotient, sums: Sums) -> Quotient:
    """Of x, from what the kernel summed."""
    _, slopes, kinks = x.line
    ds, ds_x = sums.line.sum((0, 4)).swapaxes(0, 1)[:, :, : kinks.size]
    along = sums.numerator.sum((0, 1))[None]
    # The quotient is numerator · reciprocal.
    return Quotient(
        of_distance(along, along.shape[2] // 2, along.shape[2] // 2)[0] / LOG2_E,
        sums.reciprocal.sum((1, 2)) / (LOG2_E * x.reciprocal),
        BrokenLine(ds[:, 0], ds_x - kinks[None] * ds, -(slopes * ds).sum(0)),
    )
