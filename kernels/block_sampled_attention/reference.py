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
    of_distance = jnp.full(sample.num_blocks, -jnp.inf)
    of_distance = of_distance.at[sample.distances].set(sample.log_weights, mode="drop")
    weight = of_distance.at[0].set(0.0)[jnp.maximum(distance, 0)]
    weight = jnp.where(sink, 0.0, weight)
    seen = (j <= i) & (weight > -jnp.inf)
    seen = seen[None]
    if segment_ids is not None:
        own, theirs = segment_ids[:, :, None], segment_ids[:, None]
        seen = seen & (own == theirs) & (own != 0)
    seen = jnp.broadcast_to(seen[:, None], s.shape)
    return softmax(s + jnp.where(jnp.isfinite(weight), weight, 0.0)[None, None], seen, v)
