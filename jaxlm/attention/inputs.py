"""What one attention call is: a static description and the arrays it applies to."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention.mask import AttentionMask
from kernels.flash_attention import Fire

# (parameters of one head, scores [T, S], distance [T, S], query positions [T, 1]) -> scores [T, S]
ScoreFunction = Callable[[Any, Array, Array, Array], Array]
# (parameters of all heads, distances [D], query positions [B, T]) -> a network of a quotient
NetworkFunction = Callable[[Any, Array, Array], Fire]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static half: hashable, so a call with an equal spec never compiles twice.

    Attributes:
        mask: which keys a query sees, by position.
        scale: multiplies q·k; usually head_dim**-0.5.
        softcap: scores become softcap·tanh(scores / softcap), before any position bias.
        score: the position encoding's change to the scores of one head, evaluated tile by tile:
            `score(head_parameters, scores, distance, q_positions)`. None: unchanged.
        score_form: what `score` is, for kernels that do not call it tile by tile: "bias" adds a
            number that depends on the head and the distance alone, "slope" such a one that is
            -head_parameters·distance, "factor" multiplies by such a number, "network" adds that of
            `network`; None: something else.
        network: `network(head_parameters, distances, q_positions)`, of all heads; None: none.
        score_is_learned: whether the gradient of `head_parameters` is wanted; False: a kernel may
            leave it zero.
        ceiling: distances at or above it count as the ceiling: `score` sees the clamped distance,
            and the dot product is that of `q_far`, `k_far` where those are given.
        aligned: q and k are the same tokens in the same order, and within a segment the position
            grows by one a slot. Then hidden tiles are known from slot numbers alone.
    """

    mask: AttentionMask
    scale: float
    softcap: float | None = None
    score: ScoreFunction | None = None
    score_form: str | None = None
    network: NetworkFunction | None = None
    score_is_learned: bool = True
    ceiling: int | None = None
    aligned: bool = False


# Unchecked at construction: transforms rebuild the pytree with specs or batched arrays inside.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The arrays. B batch, T queries, S keys, N query heads, K kv heads (N = K·G), H head dim.

    Segment 0 is padding: as a key it is never seen; a query in it sees nothing and gives zeros.

    Attributes:
        head_parameters: pytree of arrays [num_heads, ...] that `AttentionSpec.score` reads, head by
            head; differentiable.
        q_far, k_far: queries and keys as they are at the distance ceiling, or None.
        sink_logits: a learned logit per head that takes part in the softmax and has no value
            (gpt-oss); not to be confused with kept sink tokens.
        tree: of draft tokens attending to one another, those on each one's way; None: no draft.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    q_segment_ids: Int[Array, "B T"]
    k_segment_ids: Int[Array, "B S"]
    head_parameters: Any = None
    q_far: Float[Array, "B T N H"] | None = None
    k_far: Float[Array, "B S K H"] | None = None
    sink_logits: Float[Array, "N"] | None = None
    tree: Bool[Array, "B T S"] | None = None


def with_sink_logits(
    out: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sink_logits: Float[Array, "N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What attention without them found, under a softmax that they take part in."""
    whole = jnp.logaddexp(lse, sink_logits.astype(jnp.float32)[None, None])
    return (out * jnp.exp(lse - whole)[..., None]).astype(out.dtype), whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedLayer:
    """What a KV cache holds of one layer. L layers, B batch, K kv heads, S slots, H head dim.

    Keys and values are [L, B, K, S, H], or with `pages` a pool [L, P, K, page, H] that rows share.

    All layers come with it: a kernel then reads its own where it lies, while a layer that is cut
    out must be copied for it.

    Attributes:
        keys, values: as the cache keeps them.
        layer: which one.
        positions: of the token in each slot.
        segment_ids: 0 where a slot is empty or holds padding.
        pages: slot s of row b is in page `pages[b, s // page]` of the pool; None: in row b.
    """

    keys: Float[Array, "L _ K _ H"]
    values: Float[Array, "L _ K _ H"]
    layer: Int[Array, ""]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    pages: Int[Array, "B _"] | None = None
