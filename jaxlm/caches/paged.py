"""The paged KV cache: pages of a common pool, so that rows that began alike share their beginning.

Block tables and copy-on-write as in vLLM (PagedAttention, arXiv 2309.06180, §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention.cached import SlotLayer
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.layer_view import FarKeys, NearKeys
from jaxlm.caches.kind import CACHES, CacheKind
from jaxlm.caches.page_writes import begin, write
from jaxlm.caches.pages import claim, holders_of
from jaxlm.caches.rows import write_slots
from jaxlm.caches.stacks import check_sees_no_future, empty_stacks, of_stack, split_stacks
from jaxlm.config import check, integer_at_least
from jaxlm.model.config import ModelConfig


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Paged(CacheKind):
    """A pool of pages.

    Attributes:
        page: tokens of one.
        pages: of the pool; None: as many as all rows could need, should they share none.
    """

    page: int = 64
    pages: int | None = None

    name: ClassVar[str] = "paged"

    def __post_init__(self):
        page, positive = self.page, integer_at_least(self.page, 1)[1]
        fine = positive and (page in (16, 32, 64) or page % 128 == 0)
        enough = self.pages is None or integer_at_least(self.pages, 1)[1]
        check(
            "paged",
            page=(self.page, fine, "16, 32, 64 or a multiple of 128"),
            pages=(self.pages, enough, "None or an integer >= 1"),
        )

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether there are pages for sequences that have these lengths and nothing in common."""
        return self.pages is None or sum(-(-n // self.page) for n in lengths) <= self.pages

    def init(self, config: ModelConfig, batch: int, capacity: int) -> PagedCache:
        """Empty. A pool of fewer pages than `capacity` needs serves shorter texts, see `holds`."""
        check_sees_no_future(config, capacity)
        each = -(-capacity // self.page)
        number = 1 + (self.pages or batch * each)
        shape = (number, config.num_kv_heads, self.page, config.head_dim)
        keys, values = (empty_stacks(config, shape) for _ in range(2))
        table = jnp.zeros((batch, each), jnp.int32)
        slots = jnp.zeros((batch, each * self.page), jnp.int32)
        none = jnp.zeros(batch, jnp.int32)
        held = holders_of(table, number)
        return PagedCache(keys, values, table, held, slots, slots.copy(), none, none > 0, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """A layer of a `PagedCache`.

    Attributes:
        slots: what lies in the row's slots.
        lost: rows of which tokens are missing.
    """

    slots: SlotLayer
    lost: Bool[Array, "B"]

    def attend(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None = None,
        far_keys: FarKeys | None = None,
    ) -> Float[Array, "B T N H"]:
        """As `SlotLayer.attend`, but NaN in lost rows."""
        y = self.slots.attend(spec, new, near_keys, far_keys)
        return jnp.where(self.lost[:, None, None, None], jnp.asarray(jnp.nan, y.dtype), y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Token t of a row is in page `table[row, t // page]`: padding takes no place.

    P pages, K kv heads, B batch, n pages of a row, S = n·page slots. All layers have the same
    table.

    Attributes:
        keys, values: of each stack of layers, as in `DenseCache`. Page 0 is never written.
        table: pages of each row, in order; 0 where it has none yet.
        holders: how many rows hold each page; 0: it is free.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty.
        lengths: tokens of each row so far.
        lost: rows some of whose tokens found no page: what attends to them is NaN.
        kind: the settings. Static.
    """

    keys: tuple[Float[Array, "_ P K page H"], ...]
    values: tuple[Float[Array, "_ P K page H"], ...]
    table: Int[Array, "B n"]
    holders: Int[Array, "P"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    lost: Bool[Array, "B"]
    kind: Paged = dataclasses.field(metadata={"static": True})

    axes: ClassVar = (None, "kv_heads")  # each row may hold any page

    @property
    def mask(self) -> None:
        """It keeps all."""

    @property
    def appendable(self) -> None:
        """What it keeps never changes its form."""

    def layer(self, index: int | Int[Array, ""]) -> PagedLayer:
        """What a layer attends to."""
        stack = of_stack(self.keys, self.values, index)
        slots = CachedLayer(*stack, self.positions, self.segment_ids, self.table)
        return PagedLayer(SlotLayer(slots), self.lost)

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> PagedCache:
        """Writes T tokens behind those of their row. A page that other rows hold too is copied
        first: at most one a row, the last, and only if it is not full.

        A row that finds no page, or is at its capacity, is lost: an error where that is known, and
        under `jit` NaN for what attends to that row.
        """
        there = (segment_ids != 0) & ~self.lost[:, None]
        counts = there.sum(1, dtype=jnp.int32)
        page, T = self.kind.page, positions.shape[1]
        claims = claim(self.table, self.holders, self.lengths, counts, page, T)
        if not isinstance(claims.unplaced, jax.core.Tracer) and claims.unplaced.any():
            self._refuse(int((self.lengths + counts).max()))
        counts = jnp.where(claims.unplaced, 0, counts)
        slots = self.lengths[:, None] + jnp.arange(T)[None]
        buffers = self.keys + self.values
        buffers = begin(buffers, claims)
        new = [part for x in kv for part in split_stacks(self.keys, x.swapaxes(2, 3))]
        buffers = write(buffers, new, claims, counts)
        return dataclasses.replace(
            self,
            keys=buffers[: len(self.keys)],
            values=buffers[len(self.keys) :],
            table=claims.table,
            holders=claims.holders,
            positions=write_slots(self.positions, positions, slots, there),
            segment_ids=write_slots(self.segment_ids, segment_ids, slots, there),
            lengths=self.lengths + counts,
            lost=self.lost | claims.unplaced,
        )

    def _refuse(self, longest: int) -> None:
        """Raises ValueError for tokens that have no place; the longest row would have `longest`."""
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens; allowed: at most capacity={self.capacity}")
        free = int((self.holders == 0).sum())
        raise ValueError(
            f"pages={self.pages}; allowed: more, as these tokens need more than {free} free ones"
        )

    def reorder(self, rows: Int[Array, "R"]) -> PagedCache:
        """Row i becomes what row `rows[i]` was, of any number of rows. Keys and values stay where
        they are; only a pool that is as large as all rows could need grows when there are more.
        """
        table = self.table[rows]
        number = self.holders.size
        if self.kind.pages is None:
            number = max(number, 1 + table.size)
        grown = number - self.holders.size

        def grow(buffers: tuple[Array, ...]) -> tuple[Array, ...]:
            pad = ((0, 0), (0, grown), (0, 0), (0, 0), (0, 0))
            return tuple(jnp.pad(b, pad) for b in buffers) if grown else buffers

        return dataclasses.replace(
            self,
            keys=grow(self.keys),
            values=grow(self.values),
            table=table,
            holders=holders_of(table, number),
            positions=self.positions[rows],
            segment_ids=self.segment_ids[rows],
            lengths=self.lengths[rows],
            lost=self.lost[rows],
        )

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.positions.shape[1]

    @property
    def pages(self) -> int:
        """Of the pool, but for the one that is never written."""
        return self.holders.size - 1

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: of the pool."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that a row holds; not under `jit`."""
        return int((self.holders[1:] > 0).sum()) * (self.nbytes // self.holders.size)
