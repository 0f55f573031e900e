"""Sandwich: the inner product of two sinusoidal position vectors as a bias."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.positions.encoding import LARGE, Dimensions, PositionEncoding, require
from jaxlm.positions.registry import register

# Distances are whole numbers, so the sum of cosines is read from a table. Past its end the bias is
# held at the last value: there it has decayed to a small ripple.
TABLE_LENGTH = 32768


def inner_product(distance: np.ndarray, width: int, base: float) -> np.ndarray:
    """Σ_i cos(distance / base^(2i/width)), i = 0 … width/2 - 1; float64."""
    frequencies = base ** (-np.arange(0, width, 2) / width)
    return np.cos(distance[:, None] * frequencies).sum(-1)


@register
@dataclasses.dataclass(frozen=True)
class Sandwich(PositionEncoding):
    """score + p_i·p_j / (8h/n) for head h = 1..n (Chi et al. 2023, arXiv 2212.10356, section 4).

    Attributes:
        width: length of the sinusoidal vectors p (the paper's 128), apart from the model's width.
        base: of their frequencies.
    """

    width: int = 128
    base: float = 10000.0

    name: ClassVar[str] = "sandwich"

    @property
    def changes_scores(self):
        """Adds a bias."""
        return True

    def bind(self, dims: Dimensions) -> Sandwich:
        """Checks the width and the base."""
        even = self.width >= 2 and self.width % 2 == 0
        require(even, "sandwich: width", self.width, "an even number >= 2")
        require(1 < self.base <= LARGE, "sandwich: base", self.base, "a number > 1")
        return self

    def head_parameters(self, params, num_heads):
        """The table of each head, [num_heads, TABLE_LENGTH]."""
        row = inner_product(np.arange(TABLE_LENGTH), self.width, self.base).astype(np.float32)
        ratio = 8.0 / num_heads * jnp.arange(1, num_heads + 1, dtype=jnp.float32)
        return jnp.asarray(row)[None] / ratio[:, None]

    def bias(self, head, distance, q_positions):
        """table[distance]; a future key counts as distance 0."""
        return head[jnp.clip(distance, 0, TABLE_LENGTH - 1)]
