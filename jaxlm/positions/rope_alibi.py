"""RoPE times ALiBi: relative by rotation, fading with distance by a harmonic series.

Inspired by F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
in Generative AI" (arXiv 2410.18441), which names the ingredients and gives no formula: what follows
is our reading, not a reproduction.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.positions.alibi import geometric_slopes
from jaxlm.positions.encoding import LARGE, Dimensions, require
from jaxlm.positions.registry import register
from jaxlm.positions.rope import RoPE

TABLE_LENGTH = 256


def harmonic(distance: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """H(n) = 1 + 1/2 + … + 1/n in float32; H(n <= 0) = 0.

    A table for small n; from there ln n + γ + 1/(2n) - 1/(12n²), whose error is below 1e-8.
    """
    table = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, TABLE_LENGTH))])
    near = jnp.asarray(table, jnp.float32)[jnp.clip(distance, 0, TABLE_LENGTH - 1)]
    n = jnp.maximum(distance, TABLE_LENGTH).astype(jnp.float32)
    far = jnp.log(n) + np.float32(np.euler_gamma) + 0.5 / n - 1 / (12 * n * n)
    return jnp.where(distance < TABLE_LENGTH, near, far)


@register
@dataclasses.dataclass(frozen=True)
class RopeAlibi(RoPE):
    """RoPE with scores damped by distance d = i - j.

    additive        score - m_h·H(d): a weight falls like d^(-m_h), milder than ALiBi's exponential
    multiplicative  score / (1 + m_h·H(d))
    linear          score - m_h·d: plain RoPE plus ALiBi, the baseline

    Attributes:
        kind: which of the three.
        slopes: m_h: "harmonic" is 1/h for head h = 1, 2, …; "geometric" is ALiBi's.
        strength: multiplies every slope; 0 is RoPE itself.
    """

    kind: str = "additive"
    slopes: str = "harmonic"
    strength: float = 1.0

    name: ClassVar[str] = "rope_alibi"

    @property
    def two_sided(self):
        """Its slopes would favour far tokens ahead of the query."""
        return False

    @property
    def changes_scores(self):
        """Not where the strength is 0: then it is RoPE, bit for bit."""
        return self.strength != 0

    @property
    def score_form(self):
        """A bias, a slope or a factor."""
        if not self.changes_scores:
            return None
        return {"multiplicative": "factor", "linear": "slope"}.get(self.kind, "bias")

    def bind(self, dims: Dimensions) -> RopeAlibi:
        """Checks the names."""
        kinds = ("additive", "multiplicative", "linear")
        require(self.kind in kinds, "rope_alibi: kind", self.kind, ", ".join(kinds))
        known = self.slopes in ("harmonic", "geometric")
        require(known, "rope_alibi: slopes", self.slopes, "harmonic, geometric")
        strength = self.strength
        require(0 <= strength <= LARGE, "rope_alibi: strength", strength, "a number >= 0")
        super().bind(dims)
        return self

    def head_parameters(self, params, num_heads):
        """The slopes."""
        if self.slopes == "harmonic":
            return self.strength / jnp.arange(1, num_heads + 1, dtype=jnp.float32)
        return self.strength * jnp.asarray(geometric_slopes(num_heads))

    def score(self, head, scores, distance, q_positions):
        """Damps the scores."""
        if self.kind == "linear":
            return scores - head * distance.astype(jnp.float32)
        if self.kind == "additive":
            return scores - head * harmonic(distance)
        return scores / (1 + head * harmonic(distance))
