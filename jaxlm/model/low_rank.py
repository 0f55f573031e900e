"""A projection's low-rank adapter: what the layer computes when its parameters hold one.

LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3) and DoRA (Liu et al. 2024, arXiv 2402.09353,
equation 5). An adapter is no option of the model: it is there when `lora` lies beside `kernel`, so
every function of (model, params) runs an adapted model too. See `jaxlm.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LORA = "lora"


def adapted_kernel(
    kernel: Float[Array, "*K"], lora: Mapping[str, Array], n: int
) -> Float[Array, "*K"]:
    """The one matrix that the projection with its adapter equals, in float32.

    Args:
        kernel: [*inputs, *outputs].
        lora: "a" [*inputs, rank], "b" [rank, *outputs], "scale" []; with DoRA "magnitude"
            [*outputs].
        n: how many axes are inputs.
    """
    a, b = (lora[name].astype(jnp.float32) for name in ("a", "b"))
    whole = kernel.astype(jnp.float32) + lora["scale"] * jnp.tensordot(a, b, 1)
    if "magnitude" not in lora:
        return whole
    return whole * _to_length(whole, lora["magnitude"], n)[(None,) * n]


def _to_length(
    whole: Float[Array, "*K"], magnitude: Float[Array, "*O"], n: int
) -> Float[Array, "*O"]:
    """What each output's column is multiplied by to be as long as its magnitude; a column of zeros
    by 1, as it stays what it is.
    """
    length = jnp.sqrt(jnp.square(whole).sum(tuple(range(n))))
    empty = length == 0
    return jnp.where(empty, 1.0, magnitude.astype(jnp.float32) / jnp.where(empty, 1.0, length))


def add_low_rank(
    x: Float[Array, "*X"],
    y: Float[Array, "*Y"],
    kernel: Float[Array, "*K"],
    lora: Mapping[str, Array],
    n: int,
) -> Float[Array, "*Y"]:
    """y = x·kernel with the adapter added, in x's dtype; the frozen matrix is never changed.

    DoRA's lengths are constants of the gradient (section 4.3): the matrix is put together for its
    columns' lengths alone, and nothing is propagated through it.
    """
    a, b = lora["a"].astype(x.dtype), lora["b"].astype(x.dtype)
    low = jnp.tensordot(x, a, n) * lora["scale"].astype(x.dtype)
    y = y + jnp.tensordot(low, b, 1)
    if "magnitude" not in lora:
        return y
    plain = {name: jax.lax.stop_gradient(lora[name]) for name in ("a", "b", "scale")}
    whole = jax.lax.stop_gradient(adapted_kernel(kernel, plain, n))
    factor = _to_length(whole, lora["magnitude"], n).astype(x.dtype)
    return y * jnp.expand_dims(factor, tuple(range(y.ndim - factor.ndim)))
