"""Fixed sines and cosines of the absolute position, added to the token embedding."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.positions.encoding import LARGE, Dimensions, PositionEncoding, require
from jaxlm.positions.registry import register


def sinusoids(positions: Int[Array, "B T"], width: int, base: float) -> Float[Array, "B T D"]:
    """[sin(t·f_0) … sin(t·f_{D/2-1}), cos(t·f_0) …], f_i = base^(-2i/D); all sines first."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


@register
@dataclasses.dataclass(frozen=True)
class Sinusoidal(PositionEncoding):
    """x_t + scale·sinusoids(t) (Vaswani et al. 2017, section 3.5; sines before cosines).

    Attributes:
        base: the longest wavelength is 2π·base.
        scale: None is d_model**-0.5, the standard deviation of our token embeddings, so that a
            token and its position start out of one size. (The original scales the embedding up
            by √d instead, which a tied output head could not bear.)
    """

    base: float = 10000.0
    scale: float | None = None

    name: ClassVar[str] = "sinusoidal"
    relative: ClassVar[bool] = False

    @property
    def two_sided(self):
        """Every position has a vector."""
        return True

    def bind(self, dims: Dimensions) -> Sinusoidal:
        """Fills the scale; the width must be even."""
        require(dims.d_model % 2 == 0, "sinusoidal: d_model", dims.d_model, "an even number")
        require(1 < self.base <= LARGE, "sinusoidal: base", self.base, "a number > 1")
        scale = dims.d_model**-0.5 if self.scale is None else self.scale
        require(0 < scale <= LARGE, "sinusoidal: scale", scale, "None or a number > 0")
        return dataclasses.replace(self, scale=scale)

    def embed(self, params, x, positions):
        """x + scale·sinusoids, computed in float32 and cast."""
        assert self.scale is not None
        added = self.scale * sinusoids(positions, x.shape[-1], self.base)
        return x + added.astype(x.dtype)
