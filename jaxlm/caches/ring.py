"""The first few tokens and the last ones: memory that does not grow with the text.

With a model whose Λ mask is no wider it drops nothing that is seen (LM-Infinite, arXiv 2308.16137);
any other model sees through it no more than it keeps (attention sinks: arXiv 2309.17453).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention import mask as masks
from jaxlm.attention.cached import SlotLayer
from jaxlm.attention.inputs import CachedLayer
from jaxlm.attention.mask import AttentionMask
from jaxlm.caches.kind import CACHES, ROWS_AND_HEADS, CacheKind
from jaxlm.caches.rows import round_up, write_slots
from jaxlm.caches.stacks import (
    check_sees_no_future,
    empty_stacks,
    of_stack,
    reorder_rows,
    split_stacks,
)
from jaxlm.config import check, integer_at_least
from jaxlm.model.config import ModelConfig


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Ring(CacheKind):
    """A window and sinks.

    Attributes:
        window: the last tokens kept, the query's own included.
        num_sinks: the first tokens kept.
        slack: slots beside those, so that what a draft's tokens see is not yet written over.
    """

    window: int
    num_sinks: int = 4
    slack: int = 16

    name: ClassVar[str] = "ring"

    def __post_init__(self):
        check(
            "ring",
            window=integer_at_least(self.window, 1),
            num_sinks=integer_at_least(self.num_sinks, 0),
            slack=integer_at_least(self.slack, 0),
        )

    @property
    def mask(self) -> AttentionMask:
        """A Λ."""
        return masks.lambda_shaped(self.window, self.num_sinks)

    def init(self, config: ModelConfig, batch: int, capacity: int) -> RingCache:
        """Empty, of a multiple of 8 slots: else XLA for TPUs lays an argument out as kernels do not
        read it. A `capacity` below its own slots spares some of them.
        """
        check_sees_no_future(config, capacity)
        around = min(self.window + self.slack, max(1, capacity - self.num_sinks))
        slots = round_up(self.num_sinks + around, 8)
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        keys, values = (empty_stacks(config, shape) for _ in range(2))
        none = jnp.zeros((batch, slots), jnp.int32)
        return RingCache(keys, values, none, none.copy(), jnp.zeros(batch, jnp.int32), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Token t of a row is in slot t while t < num_sinks, then goes round the other slots.

    Attributes:
        keys, values: of each stack of layers, as in `DenseCache`.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty.
        lengths: tokens of each row so far.
        kind: the settings. Static.
    """

    keys: tuple[Float[Array, "_ B K S H"], ...]
    values: tuple[Float[Array, "_ B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    kind: Ring = dataclasses.field(metadata={"static": True})

    axes: ClassVar = ROWS_AND_HEADS

    @property
    def mask(self) -> AttentionMask:
        """What it keeps for each query."""
        return self.kind.mask

    @property
    def appendable(self) -> None:
        """Any number: a token stays as it is."""

    def layer(self, index: int | Int[Array, ""]) -> SlotLayer:
        """What a layer attends to."""
        stack = of_stack(self.keys, self.values, index)
        return SlotLayer(CachedLayer(*stack, self.positions, self.segment_ids), self.mask)

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> RingCache:
        """Writes T tokens, each row's oldest ones that are no sinks being written over."""
        there = segment_ids != 0
        token = self.lengths[:, None] + jnp.cumsum(there, 1) - there.astype(jnp.int32)
        sinks = self.kind.num_sinks
        around = self.positions.shape[1] - sinks
        slots = jnp.where(token < sinks, token, sinks + (token - sinks) % around)

        def write(buffers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            parts = split_stacks(buffers, new.swapaxes(2, 3))
            return tuple(
                write_slots(buffer, part, slots, there, batch=1, time=3)
                for buffer, part in zip(buffers, parts, strict=True)
            )

        return dataclasses.replace(
            self,
            keys=write(self.keys, kv[0]),
            values=write(self.values, kv[1]),
            positions=write_slots(self.positions, positions, slots, there),
            segment_ids=write_slots(self.segment_ids, segment_ids, slots, there),
            lengths=self.lengths + there.sum(1, dtype=jnp.int32),
        )

    def reorder(self, rows: Int[Array, "R"]) -> RingCache:
        """Row i becomes what row `rows[i]` was, of any number of rows."""
        return reorder_rows(self, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))
