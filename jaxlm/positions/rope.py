"""RoPE: queries and keys are rotated by an angle proportional to their position."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.positions.encoding import LARGE, Dimensions, PositionEncoding, Rotation, require
from jaxlm.positions.registry import register
from jaxlm.positions.rope_scaling import RopeScaling, inverse_frequencies


def rotate_pairs(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B #T R"],
    sin: Float[Array, "#B #T R"],
    interleaved: bool,
) -> Float[Array, "B T N H"]:
    """Rotates the first 2R of the head's dims; the others pass through untouched.

    Pairs are (i, i + R) — the layout of Llama and GPT-NeoX checkpoints — or, interleaved,
    (2i, 2i + 1) as in GPT-J. Computed in float32, returned in x's dtype.
    """
    width = 2 * cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return (
        jnp.concatenate([out.astype(x.dtype), rest], -1) if rest.shape[-1] else out.astype(x.dtype)
    )


@register
@dataclasses.dataclass(frozen=True)
class RoPE(PositionEncoding):
    """(R_i q)·(R_j k): the dot product depends on i - j alone (Su et al. 2021, equation 16).

    Attributes:
        base: of the frequencies base^(-2n/width).
        fraction: share of the head's dims that is rotated; floor(fraction·head_dim), even.
        interleaved: pairs (2n, 2n+1) instead of (n, n + width/2).
        scaling: for longer contexts: linear, ntk, dynamic_ntk, yarn, longrope, llama3.
    """

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    name: ClassVar[str] = "rope"

    @property
    def two_sided(self):
        """An angle has a sign."""
        return True

    @property
    def caches_unrotated(self):
        """True with a scaling that looks at the context's length."""
        return self.scaling is not None and self.scaling.length_dependent

    def width(self, head_dim: int) -> int:
        """How many dims are rotated."""
        return int(self.fraction * head_dim + 1e-9)  # a share of 30/44 of 44 is not 29

    def bind(self, dims: Dimensions) -> RoPE:
        """Checks the rotated width."""
        name, width = self.name, self.width(dims.head_dim)
        require(1 < self.base <= LARGE, f"{name}: base", self.base, "a number > 1")
        require(0 < self.fraction <= 1, f"{name}: fraction", self.fraction, "a number in (0, 1]")
        even = width >= 2 and width % 2 == 0
        require(even, f"{name}: fraction·head_dim", width, "an even number >= 2 of rotated dims")
        scaled = self.scaling is None or isinstance(self.scaling, RopeScaling)
        known = "none, linear, ntk, dynamic_ntk, yarn, longrope, llama3"
        require(scaled, f"{name}: scaling", self.scaling, known)
        if self.scaling is not None:
            self.scaling.check(width)
        return self

    def rotation(self, positions, lengths, head_dim):
        """cos and sin of position·frequency, float32."""
        width = self.width(head_dim)
        if self.scaling is None:
            raw, factor = inverse_frequencies(self.base, width), 1.0
        else:
            raw, factor = self.scaling.frequencies(self.base, width, lengths)
        f = jnp.asarray(raw, jnp.float32)
        f = f[None, None] if f.ndim == 1 else f
        angles = positions[..., None].astype(jnp.float32) * f
        return Rotation(factor * jnp.cos(angles), factor * jnp.sin(angles))

    def rotate_queries(self, q, rotation):
        """R_i q."""
        return rotate_pairs(q, rotation.cos, rotation.sin, self.interleaved)

    def rotate_keys(self, k, rotation):
        """R_j k."""
        return rotate_pairs(k, rotation.cos, rotation.sin, self.interleaved)

    def unrotate_keys(self, k, rotation):
        """R_j⁻¹ k; a scaling may have lengthened R_j k."""
        square = rotation.cos**2 + rotation.sin**2
        return rotate_pairs(k, rotation.cos / square, -rotation.sin / square, self.interleaved)
