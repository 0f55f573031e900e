"""The new tokens attending to each other: the part that is not in the cache yet."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.decode_attention.softmax import NOTHING


def attend_new(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T tokens, such as a draft tree, to themselves; `merge` joins it to the cache's.

    Plain jnp: T·T scores are little work, and their keys and values have just been computed.

    Args:
        q: [B, N, T, H].
        k, v: [B, K, T, H], N a multiple of K.
        mask: bool [T, T] or [B, T, T], query by key: the tree's ancestors, itself included.
        scale, softcap: as of `Scoring`.
        bias: float32 [B, N, T, T], added to the capped scores, or None.

    Returns:
        out [B, N, T, H] in q's dtype and lse float32 [B, N, T].
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    grouped = q.reshape(B, K, N // K, T, H)
    s = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if bias is not None:
        s += bias.reshape(s.shape)
    s = jnp.where(jnp.broadcast_to(mask, (B, T, T))[:, None, None], s, -jnp.inf)
    top = jnp.maximum(s.max(-1, keepdims=True), NOTHING)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum(
        "bkgts,bksh->bkgth", (p / total).astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    lse = jnp.where(empty, NOTHING, top + jnp.log(total))
    return out.reshape(B, N, T, H).astype(q.dtype), lse.reshape(B, N, T)
