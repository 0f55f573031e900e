"""A layer of a cache that keeps its heads in several ways: each part attends for its own heads."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.layer_view import FarKeys, LayerView, NearKeys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitLayer:
    """See `jaxlm.attention.layer_view`. n kv heads in all.

    Attributes:
        parts: each of some kv heads.
        order: the first part's heads, then the next one's; of one part all, as they are.
        places: of each head in that order.
        counts: heads of each part. Static.
    """

    parts: tuple[LayerView, ...]
    order: Int[Array, "n"]
    places: Int[Array, "n"]
    counts: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None = None,
        far_keys: FarKeys | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of T new queries to [cache ‖ new tokens], as the parts do it."""
        if len(self.parts) == 1:
            return self.parts[0].attend(spec, new, near_keys, far_keys)
        queries = new.q.shape[2] // new.k.shape[2]  # of a kv head
        ends = list(itertools.accumulate(self.counts))[:-1]

        def of_queries(heads: Array) -> Array:
            return (heads[:, None] * queries + jnp.arange(queries)[None]).reshape(-1)

        found = [
            part.attend(spec, _of_heads(new, heads, of_queries(heads)), near_keys, far_keys)
            for part, heads in zip(self.parts, jnp.split(self.order, ends), strict=True)
        ]
        return jnp.concatenate(found, 2)[:, :, of_queries(self.places)]


def _of_heads(
    new: AttentionInputs, heads: Int[Array, "n"], queries: Int[Array, "R"]
) -> AttentionInputs:
    """The same tokens with some kv heads and the query heads that belong to them."""

    def of(x: Any, which: Array) -> Any:
        return None if x is None else x[:, :, which]

    return dataclasses.replace(
        new,
        q=of(new.q, queries),
        k=of(new.k, heads),
        v=of(new.v, heads),
        head_parameters=jax.tree.map(lambda x: x[queries], new.head_parameters),
        q_far=of(new.q_far, queries),
        k_far=of(new.k_far, heads),
        sink_logits=None if new.sink_logits is None else new.sink_logits[queries],
    )
