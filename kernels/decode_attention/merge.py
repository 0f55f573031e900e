"""Attention over parts of the keys, put together by the log-sum-exp of each part."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.decode_attention.inputs import unpack_rows


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys from (out, lse) over disjoint parts of them.

    out = Σ_p exp(lse_p − lse)·out_p, lse = log Σ_p exp(lse_p). A learned sink logit is one more
    part, whose out is zero.

    Args:
        parts: out [..., H] and lse float32 [...] of each; a query that saw nothing has an out of
            zero and a huge negative, finite lse.

    Returns:
        The same for the union, out in the first part's dtype.
    """
    lses = jnp.stack([lse for _, lse in parts])
    top = lses.max(0, keepdims=True)
    weights = jnp.exp(lses - top)
    total = weights.sum(0, keepdims=True)
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
    out = (outs * (weights / total)[..., None]).sum(0)
    return out.astype(parts[0][0].dtype), (top + jnp.log(total))[0]


def merge_splits(
    out: jax.Array, lse: jax.Array, num_heads: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """A kernel's [splits, B, K, R, H] and [splits, B, K, R] → [B, N, T, H] and [B, N, T]."""
    parts = [
        (unpack_rows(o, num_heads, length), unpack_rows(s, num_heads, length))
        for o, s in zip(out, lse, strict=True)
    ]
    return parts[0] if len(parts) == 1 else merge(parts)
