"""A tile of FIRE, and its gradients; see fire.py for what it is.

The numerator is a vector of the distance, expanded as in bias.py; the reciprocal is a number a
query. The network is a broken line (broken_line.py): a tile's range of quotients, which follows
from its nearest and farthest distance and its queries' reciprocals, says which kinks are passed by
all pairs and which by none. The others, few in a tile that is far from its queries, are worked out
in groups, by a loop over the tile in VMEM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention import bias
from kernels.flash_attention.broken_line import GROUP, pieces
from kernels.flash_attention.call import LANES, LOG2_E, Call
from kernels.flash_attention.fire import Quotient
from kernels.flash_attention.operands import Operands


class Span(NamedTuple):
    """The kinks that pairs of a tile differ in: the first, and how many groups of them."""

    first: Any
    groups: Any

    @property
    def end(self) -> Any:
        """One past the last."""
        return self.first + GROUP * self.groups


def add_operands(
    operands: Operands,
    call: Call,
    x: Quotient,
    keys: bool,
    whole: Callable[[tuple[int, ...]], pl.BlockSpec],
) -> None:
    """All but the reciprocal. `keys`: see `bias.along_lanes`; `whole` is the spec of an array that
    all grid steps read.
    """
    for name, table in pieces(x.line)._asdict().items():
        operands.prefetch(name, table if name == "kinks" else table * LOG2_E)
    # At distances -reach, 128 - reach, …, reach: no pair is farther.
    at = jnp.arange(0, 2 * call.reach + 1, LANES) - 1
    operands.prefetch("marks", x.numerator[at.clip(0, 2 * call.reach - 2)])
    rows = x.reciprocal.reshape(x.reciprocal.shape[0], -1, call.blocks.tile_q)
    operands.prefetch("least", rows.min(2))
    operands.prefetch("most", rows.max(2))
    along = bias.along_lanes(x.numerator[None], call.reach, keys)[0]
    operands.add("numerator", along, whole(along.shape))


def span(call: Call, refs: dict[str, Any], b: Any, i: Any, rows: int, offset: Any) -> Span:
    """Of a tile of batch row b, query block i, from query `rows` of it; `offset` is its first key
    minus its first query.
    """
    n = call.blocks
    tile = i * (n.block_q // n.tile_q) + rows // n.tile_q
    nearest = jax.lax.div(call.reach - offset - n.tile_k, LANES)
    low = refs["marks"][nearest] * refs["least"][b, tile]
    high = refs["marks"][nearest + (n.tile_q + n.tile_k) // LANES] * refs["most"][b, tile]
    num = refs["kinks"].shape[0] - GROUP + 1
    kinks = [refs["kinks"][k] for k in range(num)]
    passed = sum(jnp.where(kink <= low, 1, 0) for kink in kinks)
    met = sum(jnp.where(kink < high, 1, 0) for kink in kinks)
    return Span(passed, jax.lax.div(jnp.maximum(met - passed, 0) + GROUP - 1, GROUP))


def add(refs: dict[str, Any], head: Any, span: Span, s: jax.Array, x: jax.Array) -> jax.Array:
    """Scores s in base 2 of one tile → with the network of its quotients x."""
    refs["quotient"][...] = x
    refs["sum"][...] = s + (refs["levels"][head, span.end] + refs["rises"][head, span.first] * x)

    def group(g: Any, _: None) -> None:
        x, s = refs["quotient"][...], refs["sum"][...]
        for n in range(GROUP):
            k = span.first + GROUP * g + n
            s += refs["slopes"][head, k] * jnp.maximum(x, refs["kinks"][k])
        refs["sum"][...] = s

    jax.lax.fori_loop(0, span.groups, group, None)
    return refs["sum"][...]


def add_gradients(refs: dict[str, Any], head: Any, span: Span, ds: jax.Array) -> jax.Array:
    """Adds a tile's part to `d_line`; its quotients are as `add` left them.

    `d_line`, [2, kinks, LANES], holds Σ ds and Σ ds·x over the pairs that passed each kink.

    Returns:
        The gradient of the quotients, in base 2.
    """
    x = refs["quotient"][...]
    sums = _lanes(ds), _lanes(ds * x)
    kink = jax.lax.broadcasted_iota(jnp.int32, refs["d_line"].shape[1:], 0)
    for side, total in enumerate(sums):
        refs["d_line"][side] += jnp.where(kink < span.first, total, 0.0)
    refs["sum"][...] = ds
    refs["rise"][...] = jnp.full(ds.shape, refs["rises"][head, span.first])

    def group(g: Any, _: None) -> None:
        x, ds, rise = (refs[name][...] for name in ("quotient", "sum", "rise"))
        for n in range(GROUP):
            k = span.first + GROUP * g + n
            passed = x >= refs["kinks"][k]
            part = jnp.where(passed, ds, 0.0)
            refs["d_line"][0, pl.ds(k, 1)] += _lanes(part)
            refs["d_line"][1, pl.ds(k, 1)] += _lanes(part * x)
            rise += jnp.where(passed, refs["slopes"][head, k], 0.0)
        refs["rise"][...] = rise

    jax.lax.fori_loop(0, span.groups, group, None)
    return refs["sum"][...] * refs["rise"][...]


def _lanes(x: jax.Array) -> jax.Array:
    """The sum over rows and over vectors of lanes: [1, LANES]."""
    row = x.sum(0, keepdims=True)
    return functools.reduce(jnp.add, (row[:, c : c + LANES] for c in range(0, row.shape[1], LANES)))
