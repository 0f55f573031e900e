"""Causal attention in which far blocks of tokens take part only now and then: for training.

Inspired by PrFlashAttention (Li 2024, arXiv 2410.18441); see `kernels.block_sampled_attention`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jaxlm.attention.flash import unsupported
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.on_mesh import on_mesh
from jaxlm.config import at_least, check, check_types, integer_at_least, one_of
from jaxlm.registry import Registry
from kernels.block_sampled_attention import (
    BLOCKS,
    Sample,
    block_sampled_attention,
    decaying_probabilities,
    reference,
    sample_distances,
)


@dataclasses.dataclass(frozen=True)
class BlockSampling:
    """Which blocks take part; the text form is `block_sampled(block=512)`.

    Attributes:
        block: tokens of a block: 128, 256, 512 or 1024.
        exponent, least: a block at a distance of d blocks takes part with the probability
            max(least, d**-exponent); with least=1 all do, and attention is that of evaluation.
        sink_blocks: first blocks of a row, which all later tokens see.
    """

    name: ClassVar[str] = "block_sampled"

    block: int = 512
    exponent: float = 0.5
    least: float = 0.05
    sink_blocks: int = 1

    def __post_init__(self):
        check_types(type(self), vars(self), "block_sampled")
        check(
            "block_sampled",
            block=one_of(self.block, *BLOCKS),
            exponent=at_least(self.exponent, 0),
            least=(self.least, 0 < self.least <= 1, "a number in (0, 1]"),
            sink_blocks=integer_at_least(self.sink_blocks, 0),
        )


SAMPLINGS = Registry("attention.implementation", BlockSampling)
SAMPLINGS.register(BlockSampling)


def attend_sampled(
    sampling: BlockSampling, key: Array, spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention to the drawn blocks of earlier tokens, in slots: a draw for all heads.

    On a TPU by the kernels for what they do, in O(T) memory; elsewhere by plain jnp in O(T²). On a
    mesh set by `jax.set_mesh`, each device attends for its rows and its heads.

    Args:
        sampling: which blocks take part.
        key: of jax.random; the same key draws the same.
        spec: causal, without a soft cap, and scores that no encoding changes.
        x: of tokens attending to one another, without sink logits.

    Returns:
        As `jaxlm.attention.attend.attend`.
    """
    blocks = -(-x.q.shape[1] // sampling.block)
    chances = decaying_probabilities(blocks, sampling.exponent, sampling.least)
    sample = sample_distances(key, chances)
    by_kernels = spec.aligned and unsupported(spec, x) is None

    def run(q: Array, k: Array, v: Array, ids: Array, distances: Array, weights: Array) -> Any:
        function = block_sampled_attention if by_kernels else reference.block_sampled_attention
        drawn = Sample(distances, weights, blocks)
        sizes = {"block": sampling.block, "sink_blocks": sampling.sink_blocks}
        return function(q, k, v, drawn, ids, scale=spec.scale, **sizes)

    if by_kernels:
        heads, sizes = ("batch", "kv_heads"), {"batch": x.q.shape[0], "kv_heads": x.k.shape[2]}
        run = on_mesh(run, sizes, [heads, heads, heads, ("batch",), (), ()], [heads, heads])
    q, k, v = (a.swapaxes(1, 2) for a in (x.q, x.k, x.v))
    out, lse = run(q, k, v, x.q_segment_ids, sample.distances, sample.log_weights)
    return out.swapaxes(1, 2).astype(x.q.dtype), lse.swapaxes(1, 2)
