"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import functools

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
        scale = bias = None
        if c.scale:
            scale = self.param(
                "scale", nn.with_logical_partitioning(start, axes), width, self.param_dtype
            ).astype(jnp.float32)
        if c.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
            bias = self.param("bias", zeros, width, self.param_dtype).astype(jnp.float32)
        return normalize(c, x, scale, bias)


# The backward pass keeps x alone and works the rest out anew: that costs less than memory's way.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def normalize(
    config: NormConfig,
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"] | None,
    bias: Float[Array, "D"] | None,
) -> Float[Array, "*B D"]:
    """The function itself; `scale` is the parameter as it is stored."""

    def row(vector: Array) -> Array:
        return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))

    y = x.astype(jnp.float32)
    if config.kind == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + config.epsilon)
    if scale is not None:
        y = y * row(1 + scale if config.scale_plus_one else scale)
    return (y if bias is None else y + row(bias)).astype(x.dtype)
