"""The part of a cache that keeps no token but the mean of all that came to it.

RazorAttention's compensation token (arXiv 2407.15891), with sums in float32. Ours: it is met at the
mean of the tokens' positions where the position encoding asks for one.

Letters: B batch, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention.averaged import AveragedLayer
from jaxlm.caches.stacks import empty_stacks, of_stack
from jaxlm.caches.zones import TIME, Group
from jaxlm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AveragedZone:
    """Sums over all tokens that came.

    Attributes:
        keys, values: of each stack of layers, as in `DenseCache`.
        count: tokens.
        position: their mean.
        segment_ids: of the newest; 0 where there is none.
        blocks: it has room for any group. Static.
    """

    keys: tuple[Float[Array, "_ B K 1 H"], ...]
    values: tuple[Float[Array, "_ B K 1 H"], ...]
    count: Int[Array, "B"]
    position: Float[Array, "B"]
    segment_ids: Int[Array, "B 1"]
    blocks: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def empty(cls, config: ModelConfig, batch: int) -> AveragedZone:
        """Of nothing yet."""
        shape = (batch, config.num_kv_heads, 1, config.head_dim)
        keys, values = (empty_stacks(config, shape, jnp.float32) for _ in range(2))
        none = jnp.zeros((batch, 1), jnp.int32)
        return cls(keys, values, none[:, 0], jnp.zeros(batch), none.copy())

    def layer(self, index: int | Int[Array, ""]) -> AveragedLayer:
        """What a layer attends to."""
        keys, values, layer = of_stack(self.keys, self.values, index)
        count = jnp.maximum(self.count, 1).astype(jnp.float32)[:, None, None, None]

        def mean(x: Array) -> Array:
            own = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
            return own.swapaxes(1, 2) / count

        positions = jnp.round(self.position).astype(jnp.int32)[:, None]
        return AveragedLayer(mean(keys), mean(values), self.count, positions, self.segment_ids)

    def put(self, row: Array, block: Array, new: Group, when: Bool[Array, ""]) -> AveragedZone:
        """With the tokens of one more group."""
        del block

        def added(sums: tuple[Array, ...], parts: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(one(*pair) for pair in zip(sums, parts, strict=True))

        def one(sums: Array, part: Array) -> Array:
            more = part.astype(jnp.float32).sum(TIME, keepdims=True)
            return sums.at[:, row].add(jnp.where(when, more[:, 0], 0.0))

        n = new.positions.shape[1]
        count = (self.count[row] + n).astype(jnp.float32)
        nearer = (new.positions[0].astype(jnp.float32) - self.position[row]).sum() / count
        newest = jnp.where(when, new.segment_ids[0, -1], self.segment_ids[row, 0])
        return dataclasses.replace(
            self,
            keys=added(self.keys, new.keys),
            values=added(self.values, new.values),
            count=self.count.at[row].add(jnp.where(when, n, 0)),
            position=self.position.at[row].add(jnp.where(when, nearer, 0.0)),
            segment_ids=self.segment_ids.at[row, 0].set(newest),
        )
