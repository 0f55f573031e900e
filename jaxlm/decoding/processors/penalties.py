"""Penalties on tokens that are there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.decoding.processors.batch import SMALLEST, Batch
from jaxlm.decoding.processors.processor import Past


def _by_count(
    logits: Float[Array, "B V"], past: Past, change: Callable[[Array, Array], Array]
) -> Float[Array, "B V"]:
    """change(logits, counts); tokens on the way to a draft's node, of which there are few, count
    too and are changed again.
    """
    counts = past.counts
    assert counts is not None
    out = change(logits, counts)
    if past.path is None:
        return out
    rows = jnp.arange(logits.shape[0])[:, None]
    at = jnp.minimum(past.path, logits.shape[1] - 1)
    times = (past.path[:, :, None] == past.path[:, None, :]).sum(-1, dtype=jnp.int32)
    again = change(logits[rows, at], counts[rows, at] + times)
    return out.at[rows, past.path].set(again, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens of prompt and output less probable: l / θ where l > 0, else l · θ (CTRL,
    arXiv 1909.05858, section 4.1, with Hugging Face's sign rule).
    """

    penalty: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("repetition_penalty",)
    needs: ClassVar[frozenset[str]] = frozenset({"prompt", "counts"})

    @classmethod
    def make(cls, batch: Batch, repetition_penalty: Any) -> RepetitionPenalty | None:
        """1: off; below 1 repeats are made more probable."""
        x = batch.numbers("repetition_penalty", repetition_penalty, SMALLEST, 1e6, np.float32)
        return cls(jnp.asarray(x)) if (x != 1).any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Once, however often a token is there."""
        penalty = self.penalty[:, None]
        assert past.prompt is not None
        assert past.counts is not None
        there = dataclasses.replace(past, counts=past.counts + past.prompt.astype(jnp.int32))

        def change(x: Array, count: Array) -> Array:
            return jnp.where(count > 0, jnp.where(x > 0, x / penalty, x * penalty), x)

        return _by_count(logits, there, change)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputPenalty:
    """l - frequency · count - presence · [count > 0], counted in the output alone, as OpenAI's
    API and vLLM have it.
    """

    frequency: Float[Array, "B"]
    presence: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("frequency_penalty", "presence_penalty")
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})

    @classmethod
    def make(
        cls, batch: Batch, frequency_penalty: Any = 0.0, presence_penalty: Any = 0.0
    ) -> OutputPenalty | None:
        """0: off."""
        frequency = batch.numbers("frequency_penalty", frequency_penalty, -2, 2, np.float32)
        presence = batch.numbers("presence_penalty", presence_penalty, -2, 2, np.float32)
        if not (frequency.any() or presence.any()):
            return None
        return cls(jnp.asarray(frequency), jnp.asarray(presence))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """By how often each token was drawn."""
        frequency, presence = self.frequency[:, None], self.presence[:, None]

        def change(x: Array, count: Array) -> Array:
            there = (count > 0).astype(jnp.float32)
            return x - (frequency * count.astype(jnp.float32) + presence * there)

        return _by_count(logits, past, change)
