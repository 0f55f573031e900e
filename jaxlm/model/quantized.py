"""A matrix in fewer bits: integers and scales, put together where it is used.

A quantized matrix is no option of the model: it is there when `NAME_scale` lies beside `NAME`,
a projection's kernel, the embedding or the head. See `jaxlm.adapters.quantize`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A few rows meet an int8 matrix as integers: there it is reading the matrix that takes the time.
MOST_ROWS = 64
# The second integer of an input counts units that are as many times smaller.
FINER = 254


def scale_name(name: str) -> str:
    """Where the scales of a matrix are."""
    return f"{name}_scale"


def whole(tree: Mapping[str, Any], name: str) -> Array:
    """A matrix as it is, or put together in float32 where it is quantized."""
    scale = tree.get(scale_name(name))
    return tree[name] if scale is None else dequantized(tree[name], scale, scale.dtype)


def dequantized(
    matrix: Int[Array, "*K"], scale: Float[Array, "*S"], dtype: jnp.dtype
) -> Float[Array, "*K"]:
    """Each integer times the scale of its block.

    Args:
        matrix: integers.
        scale: as many axes; along each, one scale for every size(matrix) / size(scale) entries.
        dtype: of the result and of the product.
    """
    blocks = [n for k, s in zip(matrix.shape, scale.shape, strict=True) for n in (s, k // s)]
    spread = [n for s in scale.shape for n in (s, 1)]
    product = matrix.reshape(blocks).astype(dtype) * scale.astype(dtype).reshape(spread)
    return product.reshape(matrix.shape)


def contract_quantized(
    x: Float[Array, "*X"],
    matrix: Int[Array, "*K"],
    scale: Float[Array, "*S"],
    axes: tuple[int, ...],
) -> Float[Array, "*Y"]:
    """The last axes of x with `axes` of the matrix, in x's dtype. Only x has a gradient.

    A few rows meet an int8 matrix that has one scale an output as integers: no float copy of it is
    made. Many rows meet it put together, which then costs little beside the product.
    """
    rows = math.prod(x.shape[: x.ndim - len(axes)])
    one_scale = all(scale.shape[i] == 1 for i in axes)
    if matrix.dtype == jnp.int8 and one_scale and rows <= MOST_ROWS:
        return _by_integers(x, matrix, scale, axes)
    return _put_together(x, matrix, scale, axes)


def _put_together(x: Array, matrix: Array, scale: Array, axes: tuple[int, ...]) -> Array:
    last = range(x.ndim - len(axes), x.ndim)
    return jax.lax.dot_general(x, dequantized(matrix, scale, x.dtype), ((last, axes), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_integers(x: Array, matrix: Array, scale: Array, axes: tuple[int, ...]) -> Array:
    """Each row of x as unit·(a + b / 254), a and b int8: to 1/64,000 of its largest entry, so that
    it is the matrix that was rounded and not x.
    """
    last = tuple(range(x.ndim - len(axes), x.ndim))
    unit = jnp.abs(x).max(last, keepdims=True).astype(jnp.float32) / 127
    units = x.astype(jnp.float32) / jnp.where(unit == 0, 1.0, unit)
    coarse = jnp.round(units)
    pieces = jnp.stack([coarse, jnp.round((units - coarse) * FINER)]).astype(jnp.int8)
    # Exact in int32 up to 2^31 / 127² = 133,000 inputs.
    a, b = jax.lax.dot_general(
        pieces,
        matrix,
        ((tuple(i + 1 for i in last), axes), ((), ())),
        preferred_element_type=jnp.int32,
    ).astype(jnp.float32)
    rows, outputs = x.shape[: last[0]], [n for i, n in enumerate(scale.shape) if i not in axes]
    unit = unit.reshape(rows + (1,) * len(outputs))
    spread = scale.reshape([1] * len(rows) + outputs)
    return ((a + b / FINER) * unit * spread).astype(x.dtype)


def _by_integers_forward(
    x: Array, matrix: Array, scale: Array, axes: tuple[int, ...]
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _by_integers(x, matrix, scale, axes), (x, matrix, scale)


def _by_integers_backward(
    axes: tuple[int, ...], saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, None, None]:
    x, matrix, scale = saved
    _, back = jax.vjp(lambda x: _put_together(x, matrix, scale, axes), x)
    return (*back(dy), None, None)


_by_integers.defvjp(_by_integers_forward, _by_integers_backward)
