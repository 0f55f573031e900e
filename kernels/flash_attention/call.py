"""What one call of the kernels is, and how a kernel walks over the tiles that it must compute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.pattern import Band
from kernels.flash_attention.places import Rule, penalty
from kernels.precision import product

LANES, SUBLANES = 128, 8
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·LOG2_E), and TPUs have an exp2
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# (first query row within the block, first key within the stretch,
#  first key minus first query in slots, or None where the pattern hides nothing of the tile)
Tile = tuple[int, Any, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half.

    Attributes:
        band: the pattern, in blocks.
        blocks: sizes.
        head_dim: H.
        scale: multiplies q·k.
        precision: of matrix products.
        softcap: scores become softcap·tanh(scores / softcap); None: they don't.
        segments: whether there are segment ids.
        prefix: positions below it are seen by earlier tokens too; None: by none.
        num_sinks: first tokens of a segment that are seen from any distance.
        strides: whether the chip turns the rows of a tile by a stride.
        reach: half the length of a bias in memory, see bias.py; it is that of the padded keys.
        num_blocks: query blocks of the call, fewer than the band's where it has a part of them.
        rule: what positions say, where they are data: then the band hides nothing; None: the band.
    """

    band: Band
    blocks: Blocks
    head_dim: int
    scale: float
    precision: jax.lax.Precision
    softcap: float | None
    segments: bool
    prefix: int | None
    num_sinks: int
    strides: bool
    reach: int
    num_blocks: int
    rule: Rule | None

    @property
    def length(self) -> int:
        """Of the rows that the band is of, in whole query blocks."""
        return self.band.num_blocks_q * self.blocks.block_q

    def number(self, refs: dict[str, Any], i: Any) -> Any:
        """Of the call's query block i among those of the whole rows."""
        return i + refs["first_block"][0] if "first_block" in refs else i

    @property
    def num_stretches(self) -> int:
        """Stretches of keys that are in VMEM one after the other."""
        return -(-self.band.num_blocks_k // self.blocks.blocks_per_stretch)

    def bounds(self, refs: dict[str, Any], b: Any, i: Any) -> tuple[Any, Any, Any]:
        """First and one past the last key block that the segments leave the call's query block i of
        row b, and one past the last that holds tokens of their prefixes.
        """
        if "bounds" not in refs:
            return 0, self.band.num_blocks_k, -(-(self.prefix or 0) // self.blocks.block_k)
        # In one row: scalar memory pads a short last axis to 128 numbers.
        found, at = refs["bounds"], 3 * (b * self.num_blocks + i)
        return found[at], found[at + 1], found[at + 2]

    def visit(
        self, i: Any, j: Any, bounds: tuple[Any, Any, Any], work: Callable[[list[Tile]], None]
    ) -> None:
        """Calls `work` with the tiles of query block i and stretch j in which a pair is visible,
        those of one key block at a time.
        """
        n, band = self.blocks, self.band
        low = j * n.blocks_per_stretch
        first, end = band.whole(i)
        start, stop, open_end = bounds
        start = jnp.maximum(start, low)
        stop = jnp.minimum(stop, low + n.blocks_per_stretch)

        def block(kb: Any, offset: Any) -> None:
            tiles: list[Tile] = []
            for rows in range(0, n.block_q, n.tile_q):
                for keys in range(0, n.block_k, n.tile_k):
                    at = None if offset is None else offset + keys - rows
                    if isinstance(at, int):
                        if not band.touches(at, n.tile_q, n.tile_k):
                            continue
                        if band.covers(at, n.tile_q, n.tile_k):
                            at = None
                    tiles.append((rows, (kb - low) * n.block_k + keys, at))
            work(tiles)

        jax.lax.fori_loop(
            jnp.maximum(first, start), jnp.minimum(end, stop), lambda kb, _: block(kb, None), None
        )
        if self.prefix is not None:
            # The whole blocks of a causal mask end where its edges begin.
            last = jnp.maximum((i + 1) * band.ratio, open_end)
            jax.lax.fori_loop(
                jnp.maximum(end, start),
                jnp.minimum(last, stop),
                lambda kb, _: block(kb, kb * n.block_k - i * n.block_q),
                None,
            )
            return
        for edge in band.edges():
            kb = i * band.ratio + edge

            # Blocks beside the queries exist, and without a branch are scheduled with what follows.
            always = 0 <= edge < band.ratio and self.num_stretches == 1 and not self.segments

            @pl.when(always or band.exists(kb) & (start <= kb) & (kb < stop))
            def _(kb: Any = kb, edge: int = edge) -> None:
                block(kb, edge * n.block_k)

    def stretches(self, i: Any) -> tuple[Any, Any]:
        """First and last stretch of which query block i may see something."""
        first, last = self.band.visible_blocks(i)
        if self.prefix is not None:
            _, stop, open_end = self.bounds({}, 0, i)
            last = jnp.maximum(last, (stop if self.segments else open_end) - 1)
        per = self.blocks.blocks_per_stretch
        return first // per, last // per

    def offset(self, i: Any, j: Any, rows: int, base: Any) -> Any:
        """First key minus first query of a tile, in slots; i and j are query block and stretch."""
        return j * self.blocks.stretch + base - i * self.blocks.block_q - rows

    def of_pairs(
        self, refs: dict[str, Any], name: str, at: Any, keys: Any, axis: int
    ) -> tuple[jax.Array, jax.Array]:
        """`name` of the queries and of the keys of a tile, each in its shape; `axis` is that of the
        queries, and the other side's numbers lie in a row.
        """
        n, q, k = self.blocks, refs[f"q_{name}"], refs[f"k_{name}"]
        if axis == 0:
            return wide(q[at], n.tile_k), jnp.broadcast_to(k[:1, keys], (n.tile_q, n.tile_k))
        return jnp.broadcast_to(q[:1, at], (n.tile_k, n.tile_q)), wide(k[keys], n.tile_q)

    def penalty(self, refs: dict[str, Any], head: Any, at: Any, keys: Any, axis: int) -> jax.Array:
        """What a tile's scores lose where positions are data; see `of_pairs`."""
        assert self.rule is not None
        return penalty(
            self.rule, refs["place_slopes"][head], *self.of_pairs(refs, "at", at, keys, axis)
        )

    def seen_places(
        self, refs: dict[str, Any], at: Any, keys: Any, offset: Any, axis: int
    ) -> jax.Array | None:
        """Which pairs of a tile are visible where positions are data, or None for all."""
        if offset is None:
            return None
        assert self.rule is not None
        q_ids, k_ids = self.of_pairs(refs, "ids", at, keys, axis)
        seen = self.rule.mask.visible(*self.of_pairs(refs, "at", at, keys, axis))
        return seen & (q_ids == k_ids)

    def cost(self, q: jax.Array, k: jax.Array, products: int, share: float = 1) -> pl.CostEstimate:
        """Of the visible pairs: products, exponentials, and every array once."""
        B, N, T, H = q.shape
        # A stretch of the queries has its part of the pairs on average.
        near = self.band.num_pairs(self.length) * (T / self.length)
        pairs = B * N * (near + T * self.num_sinks) * share
        arrays = 2 * (q.nbytes + k.nbytes) * (1 if products == 2 else 2) * share
        return pl.CostEstimate(
            flops=int(2 * products * pairs * H),
            transcendentals=int(pairs),
            bytes_accessed=int(arrays),
        )

    def dot(self, a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
        """A matrix product in float32."""
        return product(a, b, dims, self.precision)

    def scores(self, dots: jax.Array) -> jax.Array:
        """q·k → scores in base 2, capped."""
        s = dots * (self.scale * LOG2_E)
        if self.softcap is None:
            return s
        cap = self.softcap * LOG2_E
        return cap * jnp.tanh(s / cap)

    def before_cap(self, ds: jax.Array, capped: jax.Array) -> jax.Array:
        """The gradient of capped scores (in base 2) → that of the scores before the cap."""
        if self.softcap is None:
            return ds
        return ds * (1 - (capped / (self.softcap * LOG2_E)) ** 2)

    def seen(self, offset: Any, same: Any, is_open: Any, shape: tuple[int, ...], axis: int) -> Any:
        """Which pairs of a tile are visible, or None for all.

        Args:
            offset: first key minus first query; None: the band hides nothing.
            same: pairs of one segment; None: all.
            is_open: keys that are seen by earlier queries too; None: no key.
            shape: of the tile.
            axis: that of the queries.
        """
        if offset is None:
            return same
        ahead = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
        ahead = ahead - jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        seen = self.band.visible(ahead + offset)
        if is_open is not None:
            seen = seen | is_open
        return seen if same is None else seen & same

    def seen_sinks(self, first_query: Any, slots: jax.Array, axis: int) -> jax.Array:
        """Which pairs of a tile of sinks are visible, segments apart; `slots` has the tile's shape,
        `axis` is that of the queries.
        """
        assert self.band.window is not None
        query = first_query + jax.lax.broadcasted_iota(jnp.int32, slots.shape, axis)
        return query - slots >= self.band.window

    def has_sinks(self, i: Any) -> Any:
        """Whether a query of block i may see a sink that is out of its window."""
        assert self.band.window is not None
        return (i + 1) * self.blocks.block_q > self.band.window


def wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes → [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def fold(x: jax.Array) -> jax.Array:
    """[rows, width] → [rows, LANES]: the sum over every LANES-th column."""
    return functools.reduce(
        jnp.add, (x[:, lane : lane + LANES] for lane in range(0, x.shape[1], LANES))
    )


def as_row(x: jax.Array) -> jax.Array:
    """[rows, LANES] of equal lanes → [1, rows]: the diagonals, which cost less than turning it."""
    shape = (LANES, LANES)
    own = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    own = own == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    parts = [
        jnp.where(own, x[row : row + LANES], 0.0).sum(0, keepdims=True)
        for row in range(0, x.shape[0], LANES)
    ]
    return jnp.concatenate(parts, 1)
