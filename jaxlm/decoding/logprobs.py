"""How probable the model itself held what was drawn, and the tokens that it held most probable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.caches.rows import write_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-softmax of the logits as the model gave them: before processors and temperature.

    Attributes:
        chosen: of each token drawn.
        tokens: the n most probable ones in its place, best first.
        best: their own.
    """

    chosen: Float[Array, "B M"]
    tokens: Int[Array, "B M n"]
    best: Float[Array, "B M n"]

    @classmethod
    def none(cls, B: int, M: int, n: int) -> LogProbs:
        """Room for M tokens a row."""
        best = jnp.zeros((B, M, n))
        return cls(jnp.zeros((B, M)), best.astype(jnp.int32), best)

    def write(
        self, logits: Float[Array, "B D V"], new: Int[Array, "B D"], starts: Int[Array, "B"]
    ) -> LogProbs:
        """Of D more tokens a row, from `starts` on.

        Args:
            logits: that each was drawn from.
        """
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = (jnp.take_along_axis(logits, new[:, :, None], -1) - total)[:, :, 0]
        best, tokens = jax.lax.top_k(logits, self.best.shape[-1])
        return LogProbs(
            write_rows(self.chosen, chosen, starts),
            write_rows(self.tokens, tokens, starts),
            write_rows(self.best, best - total, starts),
        )
