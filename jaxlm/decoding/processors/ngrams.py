"""No sequence of n tokens twice."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.processors.processor import Past


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoRepeatNGrams:
    """Bans what would end an n-gram that prompt and output hold already, as Hugging Face does."""

    size: Int[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("no_repeat_ngram_size",)
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    @classmethod
    def make(cls, batch: Batch, no_repeat_ngram_size: Any) -> NoRepeatNGrams | None:
        """0: off."""
        high = 2**31 - 1
        x = batch.numbers("no_repeat_ngram_size", no_repeat_ngram_size, 0, high, np.int32)
        return cls(jnp.asarray(x)) if x.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """The token at t is banned if the n - 1 before it are the last n - 1."""
        tokens, lengths, size = past.tokens, past.lengths, self.size
        assert tokens is not None
        at = jnp.arange(tokens.shape[1])[None]

        def compare(back: Array, same: Array) -> Array:
            last = jnp.maximum(lengths - 1 - back, 0)[:, None]
            equal = jnp.roll(tokens, back + 1, axis=1) == jnp.take_along_axis(tokens, last, 1)
            return same & (equal | (back >= size - 1)[:, None])

        there = (at >= size[:, None] - 1) & (at < lengths[:, None]) & (size > 0)[:, None]
        # A text's own length ends the loop where n is larger than it: nothing is banned then.
        turns = jnp.minimum(size.max() - 1, tokens.shape[1])
        same = jax.lax.fori_loop(0, turns, compare, there)
        rows = jnp.arange(tokens.shape[0])[:, None]
        return logits.at[rows, tokens].min(jnp.where(same, -jnp.inf, jnp.inf), mode="drop")
