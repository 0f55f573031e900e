"""xPos: RoPE whose pairs also shrink with distance, the fast ones most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.positions.encoding import Rotation
from jaxlm.positions.registry import register
from jaxlm.positions.rope import RoPE, rotate_pairs

# exp(±80) is near the ends of float32: positions past about 32,000 (at scale_base 512) count as
# that far, which only flattens the decay.
MAX_EXPONENT = 80.0


@register
@dataclasses.dataclass(frozen=True)
class XPos(RoPE):
    """Queries times ζ^(i/s), keys times ζ^(-j/s) on top of RoPE (Sun et al. 2022, 2212.10554).

    ζ_n = (2n/width + γ) / (1 + γ) for pair n.

    Attributes:
        gamma: γ, the paper's 0.4.
        scale_base: s, the distance over which a pair shrinks by ζ.
    """

    gamma: float = 0.4
    scale_base: float = 512.0

    name: ClassVar[str] = "xpos"

    def rotation(self, positions, lengths, head_dim):
        """RoPE's angles and the queries' factor."""
        turned = super().rotation(positions, lengths, head_dim)
        width = self.width(head_dim)
        zeta = (np.arange(0, width, 2) / width + self.gamma) / (1 + self.gamma)
        log_zeta = jnp.asarray(np.log(zeta) / self.scale_base, jnp.float32)
        exponent = positions[..., None].astype(jnp.float32) * log_zeta[None, None]
        scale = jnp.exp(jnp.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT))
        return Rotation(turned.cos, turned.sin, scale)

    def rotate_queries(self, q, rotation):
        """R_i q · ζ^(i/s)."""
        cos, sin, scale = rotation
        return rotate_pairs(q, cos * scale, sin * scale, self.interleaved)

    def rotate_keys(self, k, rotation):
        """R_j k · ζ^(-j/s)."""
        cos, sin, scale = rotation
        return rotate_pairs(k, cos / scale, sin / scale, self.interleaved)
