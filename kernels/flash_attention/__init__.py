"""Flash attention on TPU, forward and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.blocks import Blocks, choose_blocks
from kernels.flash_attention.kernel import Settings, Tokens, Trained, attend
from kernels.flash_attention.segments import count_up
from kernels.flash_attention.sinks import NOWHERE

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
SHORTEST_WINDOW = 128  # beside sinks: no block is shorter


class Sinks(NamedTuple):
    """The first tokens of each segment, seen from any distance: Λ-attention (LM-Infinite, arXiv
    2308.16137, section 4) and streaming with attention sinks.

    Attributes:
        num: positions below it are sinks.
        q: [batch, heads, length, head_dim], queries as they meet a sink out of the window, that is
            at a distance of `window` or more; None: as ever.
        k: [batch, kv_heads, length, head_dim], keys as they are met there; None: as ever.
        bias: [heads], added to capped scores there; None: 0.
    """

    num: int
    q: jax.Array | None = None
    k: jax.Array | None = None
    bias: jax.Array | None = None


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
    prefix: int | None = None,
    positions: jax.Array | None = None,
    sinks: Sinks | None = None,
    chip: str = "v5e",
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of tokens to one another, in O(T) memory; differentiable.

    Token i sees token j of its own segment if j - i <= ahead and i - j < window.

    Args:
        q: [batch, heads, length, head_dim], bfloat16 or float32.
        k, v: [batch, kv_heads, length, head_dim], as q; heads are a multiple of kv_heads.
        segment_ids: int32 [batch, length], 0 is padding; None: one segment.
        scale: multiplies q·k.
        ahead: 0 is causal; None: all later tokens are seen.
        window: tokens that are seen, the query's own included; None: all earlier ones.
        softcap: scores become softcap·tanh(scores / softcap).
        bias: [heads, 2·length - 1]: entry length - 1 + d is added to the capped scores at distance
            d = i - j. ALiBi, T5's buckets, KERPLE and their like are such vectors.
        learned_bias: False: the gradient of `bias` is 0, and costs nothing.
        prefix: with a causal mask, tokens at positions below it are seen by all (prefix LM).
        positions: int32 [batch, length], in the document, for `prefix` and `sinks`; a segment's
            tokens then stand one after the other. None: counted from its first token in the row.
        sinks: first tokens that are seen from any distance, with a window only.
        chip: TPU generation, for the sizes of blocks.
        blocks: of forward and backward; None: the generation's.

    Returns:
        The output [batch, heads, length, head_dim] in q's dtype, zeros where a query sees nothing,
        and the float32 log-sum-exp of the visible scores [batch, heads, length].

    Raises:
        ValueError: shapes or dtypes that the kernels do not take, or an unknown chip.
    """
    _check(q, k, v, segment_ids)
    B, N, T, _ = q.shape
    if bias is not None and bias.shape != (N, 2 * T - 1):
        raise ValueError(f"bias of shape {bias.shape}; allowed: {(N, 2 * T - 1)}")
    if positions is not None and positions.shape != (B, T):
        raise ValueError(f"positions of shape {positions.shape}; allowed: {(B, T)}")
    if prefix is not None and (ahead != 0 or window is not None or prefix < 0):
        raise ValueError(
            f"prefix={prefix} with ahead={ahead}, window={window}; allowed: an integer >= 0 with "
            "ahead=0 and no window"
        )
    if sinks is not None:
        _check_sinks(q, k, sinks, window, ahead)
    row_bytes = q.shape[3] * q.dtype.itemsize
    # Sinks out of the window of a block's queries are then those of one document.
    longest = None if sinks is None else window
    chosen = choose_blocks(T, chip, row_bytes, longest) if blocks is None else blocks
    num_sinks = 0 if sinks is None else sinks.num
    settings = Settings(ahead, window, scale, softcap, prefix, num_sinks, learned_bias, chosen)
    whole = math.lcm(*(b.block_q for b in chosen))
    padded = -(-T // whole) * whole
    # Padding is later than all tokens: a causal mask hides it from them without segment ids.
    if segment_ids is None and (positions is not None or (padded != T and ahead != 0)):
        segment_ids = jnp.ones((B, T), jnp.int32)
    stretch = math.lcm(*(b.stretch for b in chosen))
    keys = -(-padded // stretch) * stretch

    def pad(x: jax.Array | None, axis: int, length: int, value: int = 0) -> jax.Array | None:
        if x is None or length == T:
            return x
        widths = [(0, length - T if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    trained = Trained(pad(q, 2, padded), pad(k, 2, keys), pad(v, 2, keys), bias=bias)
    if positions is None and (sinks is not None or prefix is not None):
        positions = count_up(jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids)
    if sinks is not None:
        trained = trained._replace(
            q_far=pad(q if sinks.q is None else sinks.q, 2, padded),
            k_far=pad(k if sinks.k is None else sinks.k, 2, keys),
            far_bias=jnp.zeros(N) if sinks.bias is None else sinks.bias,
        )
    tokens = Tokens(pad(segment_ids, 1, keys), pad(positions, 1, keys, NOWHERE))
    out, lse = attend(settings, trained, tokens)
    return out[:, :, :T], lse[:, :, :T]


def _check_sinks(
    q: jax.Array, k: jax.Array, sinks: Sinks, window: int | None, ahead: int | None
) -> None:
    if window is None or window < SHORTEST_WINDOW or ahead is None:
        raise ValueError(
            f"sinks with window={window}, ahead={ahead}; allowed: a window of at least "
            f"{SHORTEST_WINDOW} and an integer"
        )
    if not 1 <= sinks.num <= window:
        raise ValueError(f"sinks.num={sinks.num}; allowed: from 1 to the window's {window}")
    wanted = {"q": q.shape, "k": k.shape, "bias": q.shape[1:2]}
    for name, shape in wanted.items():
        array = getattr(sinks, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"sinks.{name} of shape {array.shape}; allowed: {shape}")
        if name in ("q", "k") and array is not None and array.dtype != q.dtype:
            raise ValueError(f"sinks.{name} of {array.dtype}; allowed: {q.dtype}, as q")


def _check(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> None:
    B, N, T, H = q.shape
    if k.shape != v.shape or k.shape[::2] != (B, T) or k.shape[3] != H or N % k.shape[1]:
        raise ValueError(
            f"q, k, v of shapes {q.shape}, {k.shape}, {v.shape}; allowed: [batch, heads, length, "
            "head_dim] and twice [batch, kv_heads, length, head_dim], heads a multiple of kv_heads"
        )
    if H not in HEAD_DIMS:
        raise ValueError(f"head_dim={H}; allowed: {', '.join(map(str, HEAD_DIMS))}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; allowed: all bfloat16 or all float32"
        )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids of shape {segment_ids.shape}; allowed: {(B, T)}")
