"""Cuts of what is improbable, after the temperature; what is cut becomes -inf.

Semantics and names of Hugging Face. The most probable token, or the most typical one, always stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decoding.processors.batch import SMALLEST, Batch
from jaxlm.decoding.processors.processor import Past


def truncate(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits outside of top-k, then outside of top-p of what is left, become -inf.

    The token that crosses the mass p is kept, so at least one always is; ties stay together.
    """
    V = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    k = jnp.where(top_k == 0, V, jnp.minimum(top_k, V))
    kth = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Rounding can take the mass before a rare token to 1 and past it: p = 1 must cut none.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(kth, lowest), logits, -jnp.inf)


def _keep(logits: Float[Array, "B V"], kept: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Those that are kept and the most probable ones."""
    return jnp.where(kept | (logits == logits.max(-1, keepdims=True)), logits, -jnp.inf)


def _entropy(log_p: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    p = jnp.exp(log_p)
    return -jnp.where(p > 0, p * log_p, 0.0).sum(-1, keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
    """Tokens at least `min_p` times as probable as the most probable one (arXiv 2407.01082)."""

    min_p: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("min_p",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, min_p: Any) -> MinP | None:
        """0: off."""
        x = batch.numbers("min_p", min_p, 0, 1, np.float32)
        return cls(jnp.asarray(x)) if x.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """p ≥ min_p · max p, of logits."""
        top = logits.max(-1, keepdims=True)
        return _keep(logits, logits >= top + jnp.log(self.min_p)[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TypicalP:
    """The tokens whose -log p is nearest to the entropy, as many as have this mass together
    (locally typical sampling, arXiv 2202.00666, algorithm of section 4).
    """

    typical_p: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("typical_p",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, typical_p: Any) -> TypicalP | None:
        """1: off."""
        x = batch.numbers("typical_p", typical_p, SMALLEST, 1, np.float32)
        return cls(jnp.asarray(x)) if (x < 1).any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """The token that crosses the mass is kept, and those as near as it."""
        V = logits.shape[-1]
        log_p = jax.nn.log_softmax(logits, axis=-1)
        far = jnp.abs(-log_p - _entropy(log_p))
        order = jnp.argsort(far, axis=-1)
        mass = jnp.cumsum(jnp.exp(jnp.take_along_axis(log_p, order, -1)), axis=-1)
        crossing = (mass < self.typical_p[:, None]).sum(-1, keepdims=True, dtype=jnp.int32)
        last = jnp.take_along_axis(order, jnp.minimum(crossing, V - 1), -1)
        kept = far <= jnp.take_along_axis(far, last, -1)
        return jnp.where(kept | (self.typical_p[:, None] >= 1), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpsilonCutoff:
    """Tokens of at least this probability (arXiv 2210.15191, section 3)."""

    epsilon: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("epsilon_cutoff",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, epsilon_cutoff: Any) -> EpsilonCutoff | None:
        """0: off."""
        x = batch.numbers("epsilon_cutoff", epsilon_cutoff, 0, 1, np.float32)
        return cls(jnp.asarray(x)) if x.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """p ≥ ε."""
        return _keep(logits, jax.nn.softmax(logits, axis=-1) >= self.epsilon[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EtaCutoff:
    """Epsilon sampling whose bound falls where the distribution is flat (arXiv 2210.15191, eq. 5;
    α = √ε as there).
    """

    epsilon: Float[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("eta_cutoff",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, eta_cutoff: Any) -> EtaCutoff | None:
        """0: off."""
        x = batch.numbers("eta_cutoff", eta_cutoff, 0, 1, np.float32)
        return cls(jnp.asarray(x)) if x.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """p ≥ min(ε, √ε · exp(-entropy))."""
        log_p = jax.nn.log_softmax(logits, axis=-1)
        epsilon = self.epsilon[:, None]
        eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(log_p)))
        return _keep(logits, jnp.exp(log_p) >= eta)
