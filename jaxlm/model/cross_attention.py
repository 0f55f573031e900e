"""A decoder's attention to what an encoder made of its input."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.attention import mask as masks
from jaxlm.attention.attend import attend
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.model.config import ModelConfig
from jaxlm.model.heads import into_heads, out_of_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What a decoder attends to: an encoder's output, or the keys and values made of it.

    Attributes:
        segment_ids: tokens of a segment see the segment of that number; 0 is padding.
        hidden: the encoder's output; None where the keys and values are there.
        keys, values: of all layers, [layers, batch, length, kv_heads, head_dim]; of one,
            [batch, length, kv_heads, head_dim].
    """

    segment_ids: Int[Array, "B S"]
    hidden: Float[Array, "B S D"] | None = None
    keys: Shaped[Array, "*L B S K H"] | None = None
    values: Shaped[Array, "*L B S K H"] | None = None

    def of_layer(self, layer: int | Int[Array, ""]) -> Source:
        """What one layer attends to."""
        if self.keys is None:
            return self
        keys, values = (
            jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values)


class CrossAttention(nn.Module):
    """Multi-head attention to all of a source, without positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], source: Source
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Attends to one layer's source.

        Returns:
            The output, and the source's keys and values [batch, length, kv_heads, head_dim].
        """
        c, a = self.config, self.config.attention

        k, v = source.keys, source.values
        if k is None or v is None:
            k = into_heads(c, "k", c.num_kv_heads, "kv_heads")(source.hidden)
            v = into_heads(c, "v", c.num_kv_heads, "kv_heads")(source.hidden)
        inputs = AttentionInputs(
            q=into_heads(c, "q", a.num_heads, "heads")(x),
            k=k,
            v=v,
            q_positions=jnp.zeros_like(segment_ids),
            k_positions=jnp.zeros_like(source.segment_ids),
            q_segment_ids=segment_ids,
            k_segment_ids=source.segment_ids,
        )
        scale = c.head_dim**-0.5 if a.scale is None else a.scale
        spec = AttentionSpec(masks.full(), scale, a.softcap)
        # Few queries at a time meet keys and values that were kept; many, those made of `hidden`.
        few = source.keys is not None or a.implementation == "reference"
        y, _ = attend(spec, inputs, "reference" if few else "blockwise")
        return out_of_heads(c)(y), (k, v)
