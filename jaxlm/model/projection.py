"""A matrix with named axes: the one kind of linear map the model uses."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.model.low_rank import LORA, add_low_rank
from jaxlm.model.quantized import contract_quantized, dequantized, scale_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Float[Array, "*X"], kernel: Float[Array, "*K"], n: int) -> Float[Array, "*Y"]:
    """The last n axes of x with the first n of the kernel, in x's dtype.

    The kernel's gradient is summed in float32 and formed as xᵀ·dy: JAX's own rule forms dyᵀ·x and
    turns the result, for which XLA's CPU compiler copies dy turned, at a third of an MLP's time.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), n)


def _contract_forward(x: Array, kernel: Array, n: int) -> tuple[Array, tuple[Array, Array]]:
    return contract(x, kernel, n), (x, kernel)


def _contract_backward(
    n: int, saved: tuple[Array, Array], dy: Float[Array, "*Y"]
) -> tuple[Array, Array]:
    x, kernel = saved
    rows, outputs = range(x.ndim - n), kernel.ndim - n
    dx = jax.lax.dot_general(
        dy,
        kernel.astype(dy.dtype),
        ((range(dy.ndim - outputs, dy.ndim), range(n, kernel.ndim)), ((), ())),
    )
    dkernel = jax.lax.dot_general(
        x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
    )
    return dx, dkernel.astype(kernel.dtype)


contract.defvjp(_contract_forward, _contract_backward)


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
        scale = self.get_variable("params", scale_name("kernel"))
        if scale is None:
            y = contract(x, kernel, n)
        else:
            y = contract_quantized(x, kernel, scale, tuple(range(n)))
        if self.has_variable("params", LORA):
            kernel = kernel if scale is None else dequantized(kernel, scale, x.dtype)
            y = add_low_rank(x, y, kernel, self.get_variable("params", LORA), n)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:])
            bias = self.param("bias", zeros, tuple(self.outputs), self.param_dtype)
            y = y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - bias.ndim)))
        return y
