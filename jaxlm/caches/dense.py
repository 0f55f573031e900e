"""The dense KV cache: every token's keys and values, in one buffer of fixed capacity."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Slots fill from the left, one for each token of the batch's common time axis.

    L layers, B batch, K kv heads, S capacity. Heads lie outside of time, so that one head's keys
    are one contiguous matrix.

    Attributes:
        keys, values: of each layer.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty or holds padding.
        used: slots filled so far.
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
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
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        slots = jnp.zeros((batch, capacity), jnp.int32)
        zeros = jnp.zeros(shape, config.dtype)
        # Distinct buffers: a donated argument must not hold one buffer twice.
        return cls(zeros, zeros.copy(), slots, slots.copy(), jnp.zeros((), jnp.int32))

    def view(self) -> tuple[Float[Array, "L B K S H"], Float[Array, "L B K S H"]]:
        """Keys and values of all layers as they lie: turned here, the whole cache is copied."""
        return self.keys, self.values

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

        def write(buffer: Array, new: Array) -> Array:
            at = (0, 0, 0, self.used, 0)
            new = jnp.where(full, jnp.asarray(jnp.nan, new.dtype), new)
            return jax.lax.dynamic_update_slice(buffer, new.swapaxes(2, 3), at)

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
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.size * x.dtype.itemsize for x in (self.keys, self.values))

    @classmethod
    def nbytes_of(cls, config: ModelConfig, batch: int, capacity: int) -> int:
        """Bytes of keys and values that `init` would take."""
        return jax.eval_shape(lambda: cls.init(config, batch, capacity)).nbytes
