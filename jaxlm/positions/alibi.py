"""ALiBi: a penalty that grows linearly with distance, at a fixed slope per head."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.positions.encoding import LARGE, Dimensions, PositionEncoding, require
from jaxlm.positions.registry import register


def geometric_slopes(num_heads: int) -> np.ndarray:
    """float32 [num_heads]: 2^(-8h/n), h = 1..n, for n a power of two.

    Otherwise those of the next lower power of two, followed by every other slope of twice that
    power until all heads have one (Press et al. 2022, the authors' rule for any head count).
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    extra = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, extra])[:num_heads].astype(np.float32)


@register
@dataclasses.dataclass(frozen=True)
class ALiBi(PositionEncoding):
    """score - slope_h·(i - j) (Press et al. 2022, arXiv 2108.12409, equation in section 3).

    Attributes:
        scale: multiplies every slope (Falcon: head_dim**-0.5).
    """

    scale: float = 1.0

    name: ClassVar[str] = "alibi"

    @property
    def changes_scores(self):
        """Adds a bias."""
        return True

    @property
    def score_form(self):
        """A slope."""
        return "slope"

    def bind(self, dims: Dimensions) -> ALiBi:
        """Checks the scale."""
        require(0 < self.scale <= LARGE, "alibi: scale", self.scale, "a number > 0")
        return self

    def head_parameters(self, params, num_heads):
        """The slopes."""
        return jnp.asarray(np.float32(self.scale) * geometric_slopes(num_heads))

    def bias(self, head, distance, q_positions):
        """-slope·distance: exact in float32 on long rows, unlike slope·j."""
        return -head * distance.astype(jnp.float32)
