"""The same job with all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    *,
    vocab_axis: int,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 nll and log-sum-exp, and whether the target has the largest logit, [M] each."""
    columns = matrix if vocab_axis == 1 else matrix.T
    s = jnp.matmul(hidden, columns, preferred_element_type=jnp.float32)
    if bias is not None:
        s = s + bias.astype(jnp.float32)[None]
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    lse = jax.nn.logsumexp(s, axis=1)
    given = (targets >= 0) & (targets < s.shape[1])
    picked = jnp.take_along_axis(s, jnp.where(given, targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(given, lse - picked, 0.0), lse, given & (picked >= s.max(1))
