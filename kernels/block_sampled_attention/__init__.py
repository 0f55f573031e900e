"""Causal attention on TPU that takes part of its blocks, drawn by their distance.

    probabilities = decaying_probabilities(num_blocks=-(-T // 512))
    sample = sample_distances(jax.random.fold_in(key, layer), probabilities)
    out, _ = block_sampled_attention(q, k, v, sample, scale=H**-0.5, sink_blocks=1)

Inspired by PrFlashAttention (Li 2024, arXiv 2410.18441), which states the idea and no details: a
probability over block distances decides which blocks take part in a round. With probability 1 at
all distances it is flash attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.block_sampled_attention.call import Call
from kernels.block_sampled_attention.kernel import attend
from kernels.block_sampled_attention.sampling import (
    Sample,
    decaying_probabilities,
    sample_distances,
)
from kernels.flash_attention.check import check, check_scores
from kernels.precision import precision_of

__all__ = [
    "BLOCKS",
    "Sample",
    "block_sampled_attention",
    "decaying_probabilities",
    "sample_distances",
]

BLOCKS = (128, 256, 512, 1024)


def block_sampled_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sample: Sample,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    block: int = 512,
    sink_blocks: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of tokens to earlier ones in the blocks at the sample's distances.

    On a TPU float32 is multiplied at jax's default precision, in one pass of bfloat16, unless
    `jax.default_matmul_precision("highest")` is set around the call: then in full, forward and
    backward.

    Args:
        q: [batch, heads, length, head_dim], bfloat16 or float32.
        k, v: [batch, kv_heads, length, head_dim], as q; heads are a multiple of kv_heads.
        sample: of `sample_distances`, for as many blocks as the length has.
        segment_ids: int32 [batch, length]: tokens see those of their own segment; 0 is padding,
            -2³¹ no id. None: one segment.
        scale: multiplies q·k.
        block: tokens of a block.
        sink_blocks: the first key blocks, which every later query sees whatever was drawn.

    Returns:
        The output [batch, heads, length, head_dim] in q's dtype, 0 where a query sees nothing, and
        the float32 log-sum-exp of the visible scores [batch, heads, length]. Differentiable in q, k
        and v.

    Raises:
        ValueError: shapes, dtypes or sizes that the kernels do not take.
    """
    check(q, k, v, segment_ids)
    check_scores(scale, None)
    T = q.shape[2]
    _check(sample, T, block, sink_blocks)
    num_blocks = sample.num_blocks
    # A block's own distance is the first.
    drawn = jnp.pad(sample.distances, (1, 0)), jnp.pad(sample.log_weights, (1, 0))
    sizes = block, num_blocks, drawn[0].shape[0], min(sink_blocks, num_blocks)
    call = Call(*sizes, float(scale), precision_of(q.dtype))
    # Padding is later than all tokens: the causal mask hides it from them.
    rest = (0, num_blocks * block - T)
    arrays = (jnp.pad(x, ((0, 0), (0, 0), rest, (0, 0))) for x in (q, k, v))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), rest))
    out, lse = attend(call, *arrays, ids, drawn)
    return out[:, :, :T], lse[:, :, :T]


def _check(sample: Sample, length: int, block: int, sink_blocks: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block={block}; allowed: {', '.join(map(str, BLOCKS))}")
    if not isinstance(sink_blocks, int) or sink_blocks < 0:
        raise ValueError(f"sink_blocks={sink_blocks!r}; allowed: an integer >= 0")
    d, w, blocks = sample.distances, sample.log_weights, -(-length // block)
    if d.ndim != 1 or w.shape != d.shape or (d.dtype, w.dtype) != (jnp.int32, jnp.float32):
        raise ValueError(
            f"sample of {d.dtype}{d.shape} and {w.dtype}{w.shape}; allowed: int32 [S], float32 [S]"
        )
    if sample.num_blocks != blocks:
        raise ValueError(
            f"sample.num_blocks={sample.num_blocks}; allowed: {blocks}, as length={length} has "
            f"of block={block}"
        )
