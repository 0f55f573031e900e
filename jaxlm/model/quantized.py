"""A projection's matrix in fewer bits: integers and scales, put together where it is used.

A quantized matrix is no option of the model: it is there when `kernel_scale` lies beside `kernel`.
See `jaxlm.adapters.quantize`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCALE = "kernel_scale"


def dequantized(
    kernel: Int[Array, "*K"], scale: Float[Array, "*S"], dtype: jnp.dtype
) -> Float[Array, "*K"]:
    """Each integer times the scale of its block.

    Args:
        kernel: integers.
        scale: as many axes; along each, one scale for every size(kernel) / size(scale) entries.
        dtype: of the result and of the product.
    """
    blocks = [n for k, s in zip(kernel.shape, scale.shape, strict=True) for n in (s, k // s)]
    spread = [n for s in scale.shape for n in (s, 1)]
    product = kernel.reshape(blocks).astype(dtype) * scale.astype(dtype).reshape(spread)
    return product.reshape(kernel.shape)
