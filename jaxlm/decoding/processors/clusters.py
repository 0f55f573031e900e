"""A penalty on tokens that are like those drawn already, by the clusters of their keys.

A cheap alternative to `jaxlm.decoding.navigation` of the same family (arXiv 2410.02284): it needs
no second look at the text. See `jaxlm.decoding.key_space`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.decoding.key_space import KeySpace
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.processors.processor import NOWHERE, Past


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClusterPenalty:
    """l - γ for each token of a cluster of which one was drawn: `processors=[…]` of `complete`.

    Attributes:
        gamma: γ of each row; other numbers need no other program.
        cluster_ids: of each token; `NOWHERE`: in none, which is never penalised.
    """

    gamma: Float[Array, "B"]
    cluster_ids: Int[Array, "B V"]

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    @classmethod
    def make(cls, batch: Batch, key_space: KeySpace, gamma: Any) -> ClusterPenalty:
        """For as many prompts and ids as the batch has.

        Args:
            batch: `Batch(rows=len(prompts), vocab_size=model.config.vocab_size)`.
            key_space: of the same model.
            gamma: one for all rows or one a row; 0: off; inf: none of the cluster again.

        Raises:
            ValueError: a γ below 0, or clusters of more tokens than the model has.
        """
        known, size = len(key_space.cluster_ids), batch.vocab_size
        if known > size:
            told = f"allowed: at most vocab_size={size}"
            raise ValueError(f"key_space of {known} tokens; {told}")
        ids = np.pad(key_space.cluster_ids, (0, size - known), constant_values=NOWHERE)
        x = batch.numbers("gamma", gamma, 0, math.inf, np.float32)
        return cls(jnp.asarray(x), jnp.broadcast_to(jnp.asarray(ids), (batch.rows, size)))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Once, however many of a cluster were drawn."""
        tokens = past.tokens
        assert tokens is not None
        at = jnp.arange(tokens.shape[1])[None]
        drawn = (at >= (past.lengths - past.drawn)[:, None]) & (at < past.lengths[:, None])
        rows = jnp.arange(len(tokens))[:, None]
        clusters = self.cluster_ids.at[rows, jnp.where(drawn, tokens, NOWHERE)]
        # There are no more clusters than tokens.
        explored = jnp.zeros(logits.shape, bool)
        explored = explored.at[rows, clusters.get(mode="fill", fill_value=NOWHERE)].set(
            True, mode="drop"
        )
        again = explored.at[rows, self.cluster_ids].get(mode="fill", fill_value=False)
        return jnp.where(again, logits - self.gamma[:, None], logits)
