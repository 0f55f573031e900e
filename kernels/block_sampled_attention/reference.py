"""The same job with a mask over all pairs: what the kernels must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.block_sampled_attention.sampling import Sample


def block_sampled_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sample: Sample,
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
    s = jnp.where(seen[None, None], s + weight[None, None], -jnp.inf)
    out = jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(s, -1), v, precision="highest")
    return out, jax.nn.logsumexp(s, -1)
