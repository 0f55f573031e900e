"""Keys and values as float8 with a scale per token: no kernel, XLA does it where they are made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

LARGEST = 448.0  # of float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Keys or values: x̂ = numbers·scale.

    Attributes:
        numbers: float8_e4m3fn [B, K, T, H].
        scale: float32 [B, K, T].
    """

    numbers: jax.Array
    scale: jax.Array

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return self.numbers.nbytes + self.scale.nbytes


def to_float8(x: jax.Array) -> Scaled:
    """Scales by which each token's largest number becomes the largest of float8: then
    |x̂ − x| ≤ |x|/16, or scale/1024 where that is more.

    Args:
        x: bfloat16 or float32 [B, K, T, H].
    """
    wide = x.astype(jnp.float32)
    most = jnp.abs(wide).max(-1)
    scale = jnp.where(most == 0, 1.0, most / LARGEST)
    # The quotient may be rounded up past the largest number, and what is larger is NaN.
    numbers = jnp.clip(wide / scale[..., None], -LARGEST, LARGEST)
    return Scaled(numbers.astype(jnp.float8_e4m3fn), scale)


def from_float8(x: Scaled) -> jax.Array:
    """float32 [B, K, T, H]."""
    return x.numbers.astype(jnp.float32) * x.scale[..., None]
