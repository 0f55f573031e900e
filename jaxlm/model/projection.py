"""A matrix with named axes: the one kind of linear map the model uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Projection(nn.Module):
    """x [..., *inputs] → [..., *outputs], contracting all input axes.

    Attributes:
        inputs, outputs: sizes of the contracted and the new axes.
        axes: logical names of the kernel's axes, inputs first.
        bias: whether one is added.
        gain: the initial weights are normal with standard deviation gain / √fan_in.
    """

    inputs: Sequence[int]
    outputs: Sequence[int]
    axes: tuple[str | None, ...]
    bias: bool
    param_dtype: jnp.dtype
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*X"]) -> Float[Array, "*Y"]:
        """Computed in x's dtype."""
        shape = (*self.inputs, *self.outputs)
        std = self.gain / math.sqrt(math.prod(self.inputs))
        init = nn.with_logical_partitioning(nn.initializers.normal(std), self.axes)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        n = len(self.inputs)
        y = jnp.tensordot(x, kernel.astype(x.dtype), n)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:])
            bias = self.param("bias", zeros, tuple(self.outputs), self.param_dtype)
            y = y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - bias.ndim)))
        return y
