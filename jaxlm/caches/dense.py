"""The dense KV cache: every token's keys and values, in one buffer of fixed capacity."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.cached import SlotLayer
from jaxlm.attention.inputs import CachedLayer
from jaxlm.caches.kind import CACHES, ROWS_AND_HEADS, CacheKind
from jaxlm.caches.rows import write_rows
from jaxlm.caches.stacks import (
    check_sees_no_future,
    empty_stacks,
    of_stack,
    reorder_rows,
    split_stacks,
)
from jaxlm.model.config import ModelConfig


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Dense(CacheKind):
    """Every token, as it is."""

    name: ClassVar[str] = "dense"

    def init(self, config: ModelConfig, batch: int, capacity: int) -> DenseCache:
        """Empty, with a slot for each of `capacity` tokens."""
        return DenseCache.init(config, batch, capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Slots of a row fill from the left, one for each of its own tokens: padding takes none.

    L layers, B batch, K kv heads, S capacity. Heads lie outside of time, so that one head's keys
    are one contiguous matrix. Layers lie as the model's do (`jaxlm.model.layouts.stack_sizes`):
    those that a loop goes over are one array, and each of the others has its own, which need not be
    cut out of a larger one.

    Attributes:
        keys, values: of each stack of layers.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty.
        lengths: tokens of each row so far.
    """

    keys: tuple[Float[Array, "_ B K S H"], ...]
    values: tuple[Float[Array, "_ B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    lengths: Int[Array, "B"]

    axes: ClassVar = ROWS_AND_HEADS

    @classmethod
    def init(cls, config: ModelConfig, batch: int, capacity: int) -> DenseCache:
        """An empty cache of `capacity` tokens a sequence, in the config's dtype.

        Raises:
            ValueError: capacity below 1, or a model whose tokens see later ones.
        """
        check_sees_no_future(config, capacity)
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)

        keys, values = (empty_stacks(config, shape) for _ in range(2))
        slots = jnp.zeros((batch, capacity), jnp.int32)
        return cls(keys, values, slots, slots.copy(), jnp.zeros(batch, jnp.int32))

    @property
    def mask(self) -> None:
        """It keeps all."""

    @property
    def appendable(self) -> None:
        """Any number: a token stays as it is."""

    def layer(self, index: int | Int[Array, ""]) -> SlotLayer:
        """What a layer attends to: a known layer of any stack, or one in a loop over the first."""
        there = (self.positions, self.segment_ids)
        return SlotLayer(CachedLayer(*of_stack(self.keys, self.values, index), *there))

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> DenseCache:
        """Writes T tokens' keys and values behind those of their row, whose own padding comes last
        and is left out.

        T slots must be free in each row, whatever part of them is padding: where they are not, it
        is an error where `lengths` is known, and NaN under `jit`.
        """
        keys, values = kv
        T = positions.shape[1]
        full = self.lengths + T > self.capacity
        if not isinstance(full, jax.core.Tracer) and full.any():
            most = int(self.lengths.max()) + T
            raise ValueError(f"{most} tokens; allowed: at most capacity={self.capacity}")
        real = segment_ids != 0

        def write(buffers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            new = jnp.where(full[None, :, None, None, None], jnp.asarray(jnp.nan, new.dtype), new)
            parts = split_stacks(buffers, new.swapaxes(2, 3))
            return tuple(
                write_rows(buffer, part, self.lengths, batch=1, time=3)
                for buffer, part in zip(buffers, parts, strict=True)
            )

        return dataclasses.replace(
            self,
            keys=write(self.keys, keys),
            values=write(self.values, values),
            positions=write_rows(self.positions, positions, self.lengths),
            segment_ids=write_rows(self.segment_ids, segment_ids, self.lengths),
            lengths=self.lengths + real.sum(1, dtype=jnp.int32),
        )

    def reorder(self, rows: Int[Array, "R"]) -> DenseCache:
        """Row i becomes what row `rows[i]` was, of any number of rows."""
        return reorder_rows(self, rows)

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.keys[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))
