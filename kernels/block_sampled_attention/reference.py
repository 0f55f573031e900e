"""The same job with a mask over all pairs: what the kernels must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.block_sampled_attention.sampling import Sample
from kernels.flash_attention.reference import softmax


def block_sampled_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sample: Sample,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    block: int,
    sink_blocks: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.block_sampled_attention.block_sampled_attention`, in O(T²) memory and float32."""
    N, T = q.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // k.shape[1], axis=1) for x in (k, v))
    s = scale * jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest")
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    distance, sink = i // block - j // block, j // block < sink_blocks
    drawn = distance[..., None] == sample.distances[None, None]
    weight = jnp.where(drawn, sample.log_weights[None, None], 0.0).sum(-1)
    weight = jnp.where(sink | (distance == 0), 0.0, weight)
    seen = (j <= i) & (drawn.any(-1) | sink | (distance == 0))
    seen = seen[None]
    if segment_ids is not None:
        own, theirs = segment_ids[:, :, None], segment_ids[:, None]
        seen = seen & (own == theirs) & (own != 0)
    seen = jnp.broadcast_to(seen[:, None], s.shape)
    return softmax(s + weight[None, None], seen, v)
