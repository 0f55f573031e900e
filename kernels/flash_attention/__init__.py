"""Flash attention on TPU, forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.flash_attention.blocks import Blocks, choose_blocks
from kernels.flash_attention.kernel import Settings, attend

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float32)


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
        chip: TPU generation, for the sizes of blocks.
        blocks: of forward and backward; None: the generation's.

    Returns:
        The output [batch, heads, length, head_dim] in q's dtype, zeros where a query sees nothing,
        and the float32 log-sum-exp of the visible scores [batch, heads, length].

    Raises:
        ValueError: shapes or dtypes that the kernels do not take, or an unknown chip.
    """
    _check(q, k, v, segment_ids)
    T = q.shape[2]
    row_bytes = q.shape[3] * q.dtype.itemsize
    chosen = choose_blocks(T, chip, row_bytes) if blocks is None else blocks
    settings = Settings(ahead, window, scale, softcap, chosen)
    whole = math.lcm(*(b.block_q for b in chosen))
    padded = -(-T // whole) * whole
    # Padding is later than all tokens: a causal mask hides it from them without segment ids.
    if segment_ids is None and padded != T and ahead != 0:
        segment_ids = jnp.ones((q.shape[0], T), jnp.int32)

    def pad(x: jax.Array, axis: int, length: int) -> jax.Array:
        widths = [(0, length - T if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths) if length != T else x

    stretch = math.lcm(*(b.stretch for b in chosen))
    keys = -(-padded // stretch) * stretch
    ids = None if segment_ids is None else pad(segment_ids, 1, keys)
    out, lse = attend(settings, pad(q, 2, padded), pad(k, 2, keys), pad(v, 2, keys), ids)
    return out[:, :, :T], lse[:, :, :T]


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
