"""The dense KV cache: every token's keys and values, in one buffer of fixed capacity."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import CachedLayer
from jaxlm.caches.rows import write_rows
from jaxlm.model.config import ModelConfig
from jaxlm.model.layouts import stack_sizes


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

    @classmethod
    def init(cls, config: ModelConfig, batch: int, capacity: int) -> DenseCache:
        """An empty cache of `capacity` tokens a sequence, in the config's dtype.

        Raises:
            ValueError: capacity below 1, or a model whose tokens see later ones.
        """
        if config.sees_ahead:
            raise ValueError(
                f"layer_pattern={config.attention.layer_pattern}; allowed: no bidirectional layer "
                "in a model that generates or keeps a cache"
            )
        if capacity < 1:
            raise ValueError(f"capacity={capacity}; allowed: an integer >= 1")
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)

        # Distinct buffers: a donated argument must not hold one buffer twice.
        def empty() -> tuple[Array, ...]:
            return tuple(jnp.zeros((n, *shape), config.dtype) for n in stack_sizes(config))

        slots = jnp.zeros((batch, capacity), jnp.int32)
        return cls(empty(), empty(), slots, slots.copy(), jnp.zeros(batch, jnp.int32))

    def layer(self, index: int | Int[Array, ""]) -> CachedLayer:
        """What a layer attends to: a known layer of any stack, or one in a loop over the first."""
        stack = 0
        if isinstance(index, int):
            while index >= (size := self.keys[stack].shape[0]):
                stack, index = stack + 1, index - size
        keys, values = self.keys[stack], self.values[stack]
        return CachedLayer(keys, values, jnp.asarray(index), self.positions, self.segment_ids)

    def commit(
        self,
        kv: tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> DenseCache:
        """Writes T tokens' keys and values behind those of their row; padding is left out.

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
        if T > 1:  # in each row the tokens first, then its padding
            order = jnp.argsort(~real, axis=1, stable=True)
            positions, segment_ids = (
                jnp.take_along_axis(a, order, 1) for a in (positions, segment_ids)
            )
            keys, values = (
                jnp.take_along_axis(a, order[None, :, :, None, None], 2) for a in (keys, values)
            )

        def write(buffers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            new = jnp.where(full[None, :, None, None, None], jnp.asarray(jnp.nan, new.dtype), new)
            ends = itertools.accumulate(len(b) for b in buffers[:-1])
            parts = jnp.split(new.swapaxes(2, 3), list(ends))
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

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.keys[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))

    @classmethod
    def nbytes_of(cls, config: ModelConfig, batch: int, capacity: int) -> int:
        """Bytes of keys and values that `init` would take."""
        numbers = batch * config.num_kv_heads * capacity * config.head_dim
        return 2 * config.num_layers * numbers * config.dtype.itemsize
