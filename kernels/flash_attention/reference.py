"""Attention as it is written on paper: what the kernels must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.flash_attention.call import HIDDEN


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    ahead: int | None = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.flash_attention.flash_attention`, in O(T²) memory and float32."""
    B, N, T, _ = q.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // k.shape[1], axis=1) for x in (k, v))
    s = scale * jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    seen = jnp.ones((B, 1, T, T), bool)
    if ahead is not None:
        seen &= (j - i <= ahead)[None, None]
    if window is not None:
        seen &= (i - j < window)[None, None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen &= (same & (segment_ids != 0)[:, :, None])[:, None]
    some = seen.any(-1)
    s = jnp.where(seen, s, HIDDEN)
    p = jnp.where(seen, jax.nn.softmax(s, axis=-1), 0.0)
    lse = jnp.where(some, jax.nn.logsumexp(s, axis=-1), HIDDEN)
    return jnp.einsum("bnts,bnsh->bnth", p, v, precision="highest"), lse
