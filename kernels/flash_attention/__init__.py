"""Flash attention on TPU, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.flash_attention.blocks import Blocks, check_blocks, choose_blocks, known_chip
from kernels.flash_attention.check import (
    DTYPES,
    HEAD_DIMS,
    SHORTEST_WINDOW,
    Sinks,
    check,
    check_options,
    check_places,
    check_scores,
)
from kernels.flash_attention.fire import Fire, quotient
from kernels.flash_attention.kernel import Settings, Tokens, Trained, attend
from kernels.flash_attention.padding import whole_blocks
from kernels.flash_attention.places import At, Mask, Rule
from kernels.precision import precision_of

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "SHORTEST_WINDOW",
    "At",
    "Fire",
    "Mask",
    "Sinks",
    "flash_attention",
    "flash_attention_at",
]


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
    bias: jax.Array | None = None,
    learned_bias: bool = True,
    factor: jax.Array | None = None,
    prefix: int | None = None,
    positions: jax.Array | None = None,
    sinks: Sinks | None = None,
    fire: Fire | None = None,
    first_query: jax.Array | None = None,
    chip: str | None = None,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of tokens to one another, in O(T) memory; differentiable.

    Args:
        q: [batch, heads, length, head_dim], bfloat16 or float32, which products round to bfloat16
            unless `jax.default_matmul_precision("highest")` is set; so they do here as elsewhere.
        k, v: [batch, kv_heads, length, head_dim], as q; heads are a multiple of kv_heads.
        segment_ids: int32 [batch, length], 0 is padding, -2³¹ no id; None: one segment.
        scale, softcap: scores are s = scale·q·k, or softcap·tanh(s / softcap).
        ahead, window: token i sees token j of its own segment if j - i <= ahead and
            i - j < window; None: all later ones, all earlier ones.
        bias: [heads, 2·length - 1]: entry length - 1 + d is added to the capped scores at distance
            d = i - j. ALiBi, T5's buckets, KERPLE and their like are such vectors.
        learned_bias: False: the gradient of `bias` is 0, and costs nothing.
        factor: as `bias`, multiplies the capped scores before it is added; its gradient is 0.
        prefix: with a causal mask, tokens at positions below it are seen by all (prefix LM).
        positions: int32 [batch, length], in the document, for `prefix` and `sinks`; a segment's
            tokens then stand one after the other. None: counted from its first token in the row.
        sinks: first tokens, seen from any distance, with a window only.
        fire: a network that is added to the capped scores; alone, without sinks or first_query.
        first_query: int32 []: q and `sinks.q` are `part` tokens from this one on, a device's part
            of rows or a chunk of a prompt. It is a multiple of `part`, which is one of 128.
        chip, blocks: TPU generation, sizes of both passes; None: that traced for, and its own.

    Returns:
        The output, of q's shape and dtype, 0 where a query sees nothing, and the float32
        log-sum-exp of the visible scores [batch, heads, length or part].

    Raises:
        ValueError: shapes or dtypes that the kernels do not take, or an unknown chip.
    """
    check(q, k, v, segment_ids, positions, first_query)
    check_scores(scale, softcap)
    check_options(q, k, ahead, window, bias, factor, prefix, sinks, fire)
    chip, part = known_chip(chip), q.shape[2] if first_query is not None else None
    sizes = _blocks(q, k, window if sinks else None, part, chip, blocks)
    options = (softcap, prefix, sinks.num if sinks else 0, learned_bias, chip != "v4")
    settings = Settings(ahead, window, float(scale), precision_of(q.dtype), *options, sizes)
    trained = _trained(q, k, v, bias, factor, fire, sinks)
    return _attend(settings, trained, Tokens(segment_ids, positions, first_query))


def flash_attention_at(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_at: At,
    k_at: At,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    ceiling: int | None = None,
    chip: str | None = None,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `flash_attention`, of tokens that stand anywhere: what is seen follows from positions that
    are data. Key blocks that a query block's positions or segments hide are left out; so the cost
    follows the mask as far as near positions stand near one another.

    Args:
        q: [batch, heads, T, head_dim], bfloat16 or float32, as there.
        k, v: [batch, kv_heads, S, head_dim], as q; heads are a multiple of kv_heads.
        q_at, k_at: positions and segment ids of T queries and of S keys; a token sees keys of its
            own segment only, and 0 is padding, -2³¹ no id. Positions below 2²⁹ in size.
        mask: which positions see which.
        scale, softcap: scores are s = scale·q·k, or softcap·tanh(s / softcap).
        slopes: [heads]: capped scores lose slope·min(distance, ceiling), where distance is the
            query's position less the key's (ALiBi); their gradient is 0.
        ceiling: None: no minimum is taken.
        chip, blocks: as there.

    Raises:
        ValueError: shapes or dtypes that the kernels do not take, or an unknown chip.
    """
    check_places(q, k, v, q_at, k_at, mask, slopes, ceiling)
    check_scores(scale, softcap)
    T, S = q.shape[2], k.shape[2]
    chip, part = known_chip(chip), T if T < S and T % 128 == 0 else None
    sizes = _blocks(q, k, None, part, chip, blocks)
    options = (softcap, None, 0, False, chip != "v4", sizes, Rule(mask, ceiling))
    settings = Settings(None, None, float(scale), precision_of(q.dtype), *options)
    tokens = Tokens(k_at.segment_ids, k_at.positions, None, q_at)
    return _attend(settings, Trained(q, k, v, slopes=slopes), tokens)


def _blocks(
    q: jax.Array,
    k: jax.Array,
    longest: int | None,
    part: int | None,
    chip: str,
    blocks: tuple[Blocks, Blocks] | None,
) -> tuple[Blocks, Blocks]:
    """Those given, or the generation's. No longer than a window beside sinks: then the sinks that a
    block's queries see out of it are those of one document.
    """
    if blocks is None:
        return choose_blocks(k.shape[2], chip, q.shape[3] * q.dtype.itemsize, longest, part)
    check_blocks(blocks, longest)
    return blocks


def _attend(settings: Settings, x: Trained, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    T = x.q.shape[2]
    out, lse = attend(settings, *whole_blocks(settings, x, tokens))
    return out[:, :, :T], lse[:, :, :T]


def _trained(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    factor: jax.Array | None,
    fire: Fire | None,
    sinks: Sinks | None,
) -> Trained:
    """What has a gradient; sinks are met as ever where nothing else is said."""
    if sinks is None:
        line = None if fire is None else quotient(fire)
        return Trained(q, k, v, bias=bias, factor=factor, fire=line)
    q_far, k_far = (q if sinks.q is None else sinks.q), (k if sinks.k is None else sinks.k)
    far_bias = jnp.zeros(q.shape[1]) if sinks.bias is None else sinks.bias
    return Trained(q, k, v, q_far, k_far, bias, far_bias, factor, sinks.factor)
