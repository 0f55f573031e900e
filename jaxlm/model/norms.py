"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.model.config import NormConfig


class Norm(nn.Module):
    """Normalises the last axis and scales it; the kind is the config's."""

    config: NormConfig
    param_dtype: jnp.dtype
    axis_name: str | None = "norm"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """x / rms(x) · scale, or (x - mean) / std · scale + bias; x's dtype is kept."""
        c = self.config
        width = x.shape[-1:]
        axes = (self.axis_name,)
        start = nn.initializers.zeros if c.scale_plus_one else nn.initializers.ones
        scale = self.param(
            "scale", nn.with_logical_partitioning(start, axes), width, self.param_dtype
        ).astype(jnp.float32)
        if c.scale_plus_one:
            scale = 1 + scale
        y = x.astype(jnp.float32)
        if c.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + c.epsilon)
        y = y * jnp.expand_dims(scale, tuple(range(y.ndim - 1)))
        if c.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
            bias = self.param("bias", zeros, width, self.param_dtype).astype(jnp.float32)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
        return y.astype(x.dtype)
