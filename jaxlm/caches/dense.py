"""The dense KV cache: every token's keys and values, in one buffer of fixed capacity."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import CachedLayer
from jaxlm.model.config import ModelConfig
from jaxlm.model.layouts import stack_sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Slots fill from the left, one for each token of the batch's common time axis.

    L layers, B batch, K kv heads, S capacity. Heads lie outside of time, so that one head's keys
    are one contiguous matrix. Layers lie as the model's do (`jaxlm.model.layouts.stack_sizes`):
    those that a loop goes over are one array, and each of the others has its own, which need not be
    cut out of a larger one.

    Attributes:
        keys, values: of each stack of layers.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty or holds padding.
        used: slots filled so far.
    """

    keys: tuple[Float[Array, "_ B K S H"], ...]
    values: tuple[Float[Array, "_ B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    used: Int[Array, ""]

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
        return cls(empty(), empty(), slots, slots.copy(), jnp.zeros((), jnp.int32))

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
        keys: Float[Array, "L B T K H"],
        values: Float[Array, "L B T K H"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> DenseCache:
        """Writes T tokens of every layer into the next slots.

        Tokens past the capacity are an error where `used` is known, and NaN under `jit`.
        """
        end = self.used + positions.shape[1]
        full = end > self.capacity
        if not isinstance(full, jax.core.Tracer) and full:
            raise ValueError(f"{int(end)} tokens; allowed: at most capacity={self.capacity}")

        def write(buffers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            new = jnp.where(full, jnp.asarray(jnp.nan, new.dtype), new).swapaxes(2, 3)
            ends = itertools.accumulate(len(b) for b in buffers[:-1])
            return tuple(
                jax.lax.dynamic_update_slice(buffer, part, (0, 0, 0, self.used, 0))
                for buffer, part in zip(buffers, jnp.split(new, list(ends)), strict=True)
            )

        def write_slots(buffer: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(buffer, new.astype(jnp.int32), (0, self.used))

        return dataclasses.replace(
            self,
            keys=write(self.keys, keys),
            values=write(self.values, values),
            positions=write_slots(self.positions, positions),
            segment_ids=write_slots(self.segment_ids, segment_ids),
            used=end,
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
