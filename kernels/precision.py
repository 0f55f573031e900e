"""How exactly a TPU multiplies float32 matrices, as jax's own products have it.

The matrix unit takes bfloat16. A float32 operand is rounded to it, unless the caller asks for more:
then it is cut into three parts of eight bits, and their products are summed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# (contracted axes of each operand), (batch axes of each operand)
Dimensions = tuple[tuple[Any, Any], tuple[Any, Any]]
# What `jax.default_matmul_precision` may say that means one product. Mosaic knows one other way, of
# float32's full precision: it serves all that asks for more.
ONE_PRODUCT = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """What `jax.default_matmul_precision` says of operands of this dtype, now: a backward pass that
    is traced later follows its forward pass.
    """
    config: Any = jax.config  # its values have no types
    if dtype == jnp.float32 and config.jax_default_matmul_precision not in ONE_PRODUCT:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def product(
    a: jax.Array, b: jax.Array, dims: Dimensions, precision: jax.lax.Precision
) -> jax.Array:
    """A matrix product, float32 whatever its operands are.

    Every product of a kernel says its precision: what says none has what
    `jax.default_matmul_precision` says where it is traced, and Mosaic refuses that of bfloat16.
    """
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
