"""Σ p·v̂ over the tokens of a zone, from codes: a token's scale goes into its weight.

    out_h = Σ_t (p_t·scale_t)·code_th + Σ_t p_t·minimum_t

The products of a few tokens are added up as they are made, which is one loop over codes, and only
those sums exist as numbers: XLA's CPU compiler writes out all that a matmul reads. With several
rows of weights the codes would be read as often, and a matmul is better.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.kv_quantize.layout import Quantized, scale_and_minimum

TOGETHER = 16  # tokens of 8 bits; of fewer bits those that share words


def weighted_codes(p: Float[Array, "B K S"], x: Quantized) -> Float[Array, "B K H"]:
    """As above, float32.

    Args:
        p: weights of one row a kv head, float32.
        x: values of the same B, K and S.
    """
    (B, K, _), G = p.shape, x.affine.shape[2]
    scale, minimum = scale_and_minimum(x.affine)
    if x.bits == 8:  # whose codes lie there less 128
        minimum += 128.0 * scale
    factors = p[:, :, None] * scale

    def product(weights: Array, codes: Array) -> Array:
        by_group = codes.reshape(*codes.shape[:3], G, -1)
        return weights.swapaxes(2, 3)[..., None] * by_group.astype(jnp.float32)

    pairs = zip(_stretches(factors, x.bits), _fields(x.codes, x.bits), strict=True)
    sums = functools.reduce(jnp.add, (product(*pair) for pair in pairs))
    sums = sums.reshape(B, K, sums.shape[2], -1)
    ones = jnp.ones((B, K, 1, sums.shape[2]))
    out = jax.lax.dot_general(ones, sums, (((3,), (2,)), ((0, 1), (0, 1))))[:, :, 0]
    rest = (p[:, :, None] * minimum).sum(-1)
    return out + jnp.repeat(rest, out.shape[2] // G, 2)


def _fields(codes: Array, bits: int) -> list[Int[Array, "B K R H"]]:
    """Codes as they lie there, of tokens that lie so far apart that each array is in order."""
    B, K, rows, H = codes.shape
    if bits == 8:
        x = codes.reshape(B, K, rows // TOGETHER, TOGETHER, H)
        return [x[:, :, :, i] for i in range(TOGETHER)]
    mask = (1 << bits) - 1
    shifts = [bits * i + 16 * half for i in range(16 // bits) for half in range(2)]
    return [(codes >> shift) & mask for shift in shifts]


def _stretches(factors: Float[Array, "B K G S"], bits: int) -> list[Float[Array, "B K G R"]]:
    """What belongs to the tokens of each of `_fields`."""
    B, K, G, S = factors.shape
    if bits == 8:
        x = factors.reshape(B, K, G, S // TOGETHER, TOGETHER)
        return [x[..., i] for i in range(TOGETHER)]
    fields = 16 // bits
    x = factors.reshape(B, K, G, S * bits // 256, fields, 8, 2)
    pairs = [(i, half) for i in range(fields) for half in range(2)]
    return [x[..., i, :, half].reshape(B, K, G, -1) for i, half in pairs]
