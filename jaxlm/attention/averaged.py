"""A layer of a cache's zone of which only the mean is kept: one key that stands for many.

RazorAttention's compensation token (arXiv 2407.15891): n tokens with the key k̂ and the value v̂ take
n·exp(q·k̂)·v̂ in the softmax, which is one key whose logit is higher by ln n.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.cached import Part, met, part_of
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.layer_view import FarKeys, NearKeys
from jaxlm.attention.reference import attend_reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AveragedLayer:
    """What is left of a layer's old tokens. B batch, K kv heads, H head dim.

    Attributes:
        keys, values: means, float32.
        count: tokens of each row that they are the means of; 0: none, and nothing is seen.
        positions: at which they are met as if it were one token: their rounded mean.
        segment_ids: 0 where there is none.
    """

    keys: Float[Array, "B 1 K H"]
    values: Float[Array, "B 1 K H"]
    count: Int[Array, "B"]
    positions: Int[Array, "B 1"]
    segment_ids: Int[Array, "B 1"]

    def part(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None,
        far_keys: FarKeys | None,
    ) -> Part:
        """One key, for one softmax with others."""
        part = part_of(spec, self._met(new, near_keys, far_keys))
        return dataclasses.replace(part, scores=part.scores + self._more(part.scores))

    def alone(
        self, spec: AttentionSpec, new: AttentionInputs
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """Attention to it alone, to be merged with others: as `attend_reference`."""
        out, lse = attend_reference(spec, self._met(new, None, None))
        return out, lse + self._more(lse)

    def _met(
        self, new: AttentionInputs, near_keys: NearKeys | None, far_keys: FarKeys | None
    ) -> AttentionInputs:
        k, v = self.keys.astype(new.k.dtype), self.values.astype(new.v.dtype)
        new = dataclasses.replace(new, sink_logits=None)
        return met(new, k, v, self.positions, self.segment_ids, near_keys, far_keys)

    def _more(self, like: Array) -> Array:
        """ln n of each row."""
        more = jnp.log(jnp.maximum(self.count, 1).astype(jnp.float32))
        return jnp.expand_dims(more, tuple(range(1, like.ndim)))
