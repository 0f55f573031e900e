"""xPos: RoPE whose pairs also shrink with distance, the fast ones most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.positions.encoding import LARGE, Dimensions, Rotation, require
from jaxlm.positions.registry import register
from jaxlm.positions.rope import RoPE, rotate_pairs


def held(scale: Float[Array, "B T R"], dtype: jnp.dtype) -> Float[Array, "B T R"]:
    """The queries' factors, bounded so that products with activations are finite in `dtype`."""
    most = 6.0 if dtype == jnp.float16 else 80.0  # float16 ends at exp(11), the others at exp(88)
    return jnp.clip(scale, np.exp(-most), np.exp(most))


@register
@dataclasses.dataclass(frozen=True)
class XPos(RoPE):
    """Queries times ζ^((i-r)/s), keys times ζ^((r-j)/s) on top of RoPE (Sun et al. 2022,
    2212.10554).

    ζ_n = (2n/width + γ) / (1 + γ) for pair n. The paper has r = 0; the product is the same for any
    r. Ours is the document's last position: factors of a decoding step then never grow. A bound
    keeps the others finite: tokens more than 32,000 positions before the last (at s = 512; in
    float16 2,400) count as that far, so that among them the decay is lost.

    Attributes:
        gamma: γ, the paper's 0.4.
        scale_base: s, the distance in tokens over which a pair shrinks by ζ.
    """

    gamma: float = 0.4
    scale_base: float = 512.0

    name: ClassVar[str] = "xpos"

    @property
    def two_sided(self):
        """Its factor grows without bound ahead of the query."""
        return False

    @property
    def caches_unrotated(self):
        """r moves on with every token."""
        return True

    def bind(self, dims: Dimensions) -> XPos:
        """Checks the decay."""
        require(0 < self.gamma <= LARGE, "xpos: gamma", self.gamma, "a number > 0")
        require(1 <= self.scale_base <= LARGE, "xpos: scale_base", self.scale_base, "a number >= 1")
        super().bind(dims)
        return self

    def rotation(self, positions, lengths, head_dim):
        """RoPE's angles and the queries' factor."""
        turned = super().rotation(positions, lengths, head_dim)
        width = self.width(head_dim)
        zeta = (np.arange(0, width, 2) / width + self.gamma) / (1 + self.gamma)
        log_zeta = jnp.asarray(np.log(zeta) / self.scale_base, jnp.float32)
        ahead = (positions - (lengths - 1)).astype(jnp.float32)
        return Rotation(turned.cos, turned.sin, jnp.exp(ahead[..., None] * log_zeta[None, None]))

    def rotate_queries(self, q, rotation):
        """R_i q · ζ^((i-r)/s)."""
        scale = held(rotation.scale, q.dtype)
        return rotate_pairs(q, rotation.cos * scale, rotation.sin * scale, self.interleaved)

    def rotate_keys(self, k, rotation):
        """R_j k · ζ^((r-j)/s)."""
        scale = held(rotation.scale, k.dtype)
        return rotate_pairs(k, rotation.cos / scale, rotation.sin / scale, self.interleaved)

    def unrotate_keys(self, k, rotation):
        """R_j⁻¹ k · ζ^((j-r)/s)."""
        scale = held(rotation.scale, k.dtype)
        return rotate_pairs(k, rotation.cos * scale, -rotation.sin * scale, self.interleaved)
