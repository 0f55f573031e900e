"""The attention sublayer: project, encode positions, attend, project back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention import mask as masks
from jaxlm.attention.attend import attend
from jaxlm.attention.context import FORMS, attend_over_context
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.layer_view import LayerView
from jaxlm.attention.sampled import attend_sampled
from jaxlm.model.config import ModelConfig
from jaxlm.model.heads import into_heads, out_of_heads
from jaxlm.model.norms import Norm
from jaxlm.positions import PositionEncoding, Rotation

# One layer's attention → any arrays, which Linen collects as "probes".
Probe = Callable[[AttentionSpec, AttentionInputs], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What attention knows of a sequence of tokens, beside their keys and values.

    Attributes:
        positions: in their document.
        segment_ids: which document; 0 is padding.
        lengths: tokens of each one's context, as `PositionEncoding.rotation` takes them.
        rotations: the position encoding's angles, by the kinds of layers that it tells apart; None:
            no rotation.
        head_parameters: what the encoding's score needs to know of each head, by the same kinds.
        tree: which of the others each token sees, where that is not all before it; only beside a
            cache.
        contiguous: within a segment the position grows by one a slot. Static.
        kept: what a cache that they will go to keeps for each query; None: all. Static.
        probe: what is to be known of each layer's attention, see `Transformer.hidden`. Static.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    lengths: Int[Array, "B #T"]
    rotations: dict[str, Rotation | None]
    head_parameters: dict[str, Any]
    tree: Bool[Array, "B T T"] | None
    contiguous: bool = dataclasses.field(metadata={"static": True})
    kept: masks.AttentionMask | None = dataclasses.field(default=None, metadata={"static": True})
    probe: Probe | None = dataclasses.field(default=None, metadata={"static": True})


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values.

    Attributes:
        kind: one of `attention.layer_pattern`.
    """

    config: ModelConfig
    kind: str

    @property
    def encoding(self) -> PositionEncoding:
        """The position encoding of layers of this kind."""
        return self.config.encoding.of_kind(self.kind)

    def spec(self, tokens: Tokens) -> AttentionSpec:
        """The static description of this layer's attention."""
        c, a, encoding = self.config, self.config.attention, self.encoding
        mask = masks.causal()
        if self.kind == "sliding":
            assert a.sliding_window is not None
            mask = masks.sliding_window(a.sliding_window)
        elif self.kind == "bidirectional":
            mask = masks.full()
        mask = encoding.restrict(mask)
        return AttentionSpec(
            mask=mask if tokens.kept is None else mask & tokens.kept,
            scale=c.head_dim**-0.5 if a.scale is None else a.scale,
            softcap=a.softcap,
            score=encoding.score if encoding.changes_scores else None,
            score_form=encoding.score_form,
            network=encoding.network if encoding.score_form == "network" else None,
            score_is_learned=bool(encoding.parameters(c.dimensions)),
            ceiling=encoding.ceiling,
            aligned=tokens.contiguous,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cached: LayerView | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Attends to these tokens and, before them, to `cached`.

        Returns:
            The output, and the new tokens' keys and values [batch, length, kv_heads, head_dim] as a
            cache should keep them: unrotated where the encoding says so.
        """
        c, encoding = self.config, self.encoding
        known = self.kind if self.kind in tokens.rotations else "global"
        turn = tokens.rotations[known]
        q_raw, k_raw, v = self._project(x)
        k = encoding.rotate_keys(k_raw, turn)
        inputs = AttentionInputs(
            q=encoding.rotate_queries(q_raw, turn),
            k=k,
            v=v,
            q_positions=tokens.positions,
            k_positions=tokens.positions,
            q_segment_ids=tokens.segment_ids,
            k_segment_ids=tokens.segment_ids,
            head_parameters=tokens.head_parameters[known],
            q_far=encoding.far_queries(q_raw),
            k_far=encoding.far_keys(k_raw),
            sink_logits=self._sink_logits(),
            tree=tokens.tree,
        )
        spec = self.spec(tokens)
        if tokens.probe is not None:
            self.sow("probes", "found", tokens.probe(spec, inputs))
        if cached is None:
            y, _ = self._attend(spec, inputs)
        else:

            def rotation(positions: Array) -> Rotation | None:
                return encoding.rotation(positions, tokens.lengths, c.head_dim)

            def near_keys(k: Array, positions: Array) -> Array:
                return encoding.rotate_keys(k, rotation(positions))

            def far_keys(k: Array, positions: Array) -> Array | None:
                if not encoding.caches_unrotated:
                    k = encoding.unrotate_keys(k, rotation(positions))
                return encoding.far_keys(k)

            near = near_keys if encoding.caches_unrotated else None
            y = cached.attend(spec, inputs, near, far_keys)
        kept = k_raw if encoding.caches_unrotated else k
        return out_of_heads(c)(y), (kept, v)

    def _attend(self, spec: AttentionSpec, inputs: AttentionInputs) -> tuple[Array, Array]:
        """These tokens to one another; in training to some blocks only, where that is asked for."""
        a = self.config.attention
        if a.implementation in FORMS:
            return attend_over_context(a.implementation, spec, inputs)
        if a.sampling is None:
            return attend(spec, inputs, a.implementation)
        if not self.has_rng("dropout"):
            return attend(spec, inputs)
        return attend_sampled(a.sampling, self.make_rng("dropout"), spec, inputs)

    def _project(self, x):
        """Queries, keys, values, [batch, length, heads, head_dim]; clipped, normalised if asked."""
        c, a = self.config, self.config.attention

        q = into_heads(c, "q", a.num_heads, "heads")(x)
        k = into_heads(c, "k", c.num_kv_heads, "kv_heads")(x)
        v = into_heads(c, "v", c.num_kv_heads, "kv_heads")(x)
        if (most := c.norm.clip_qkv) is not None:
            q, k, v = (jnp.clip(y, -most, most) for y in (q, k, v))
        if a.qk_norm != "none":
            q, k = self._normalize("q_norm", q), self._normalize("k_norm", k)
        return q, k, v

    def _normalize(self, name, x):
        """Over head_dim, or over all heads together."""
        norm = Norm(self.config.norm, self.config.param_dtype, None, name=name)
        if self.config.attention.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _sink_logits(self):
        a = self.config.attention
        if not a.sink_logits:
            return None
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        sinks = self.param("sink_logits", zeros, (a.num_heads,), self.config.param_dtype)
        return sinks.astype(jnp.float32)
