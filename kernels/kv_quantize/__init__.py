"""Quantize and pack keys and values for a KV cache: 8, 4 or 2 bits, asymmetric, in groups.

Keys share a scale per channel over consecutive tokens, because their large numbers stay in a few
channels; values per token over channels (KIVI, arXiv 2402.02750). scale and minimum are bfloat16.
|x̂ − x| ≤ scale/2, where scale is at most (max − min)/(2**bits − 1), one bfloat16 rounding of the
minimum and one of the scale above it. The layout of the bits is in `layout`.

That holds of groups of finite numbers with max − min < 2**126. A group that has a NaN, an infinity
or a wider range comes back as NaN, all of it: never as another number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.kv_quantize.kernel import call
from kernels.kv_quantize.layout import BITS, BLOCK, GROUPS, Quantized, pack, unpack
from kernels.kv_quantize.reference import dequantize_keys, dequantize_values
from kernels.kv_quantize.scaled import Scaled, from_float8, to_float8

__all__ = [
    "BLOCK",
    "Quantized",
    "Scaled",
    "cost_estimate",
    "dequantize_keys",
    "dequantize_values",
    "from_float8",
    "pack",
    "quantize_keys",
    "quantize_values",
    "to_float8",
    "unpack",
]

MOST_TOKENS = 1024  # of a grid step


def quantize_keys(x: jax.Array, *, bits: int, group: int = 64, interpret: Any = False) -> Quantized:
    """Keys, a scale per channel of `group` consecutive tokens.

    Args:
        x: bfloat16 or float32 [B, K, T, H], T a multiple of 128.
        bits: 8, 4 or 2.
        group: 16, 32, 64 or 128.
        interpret: for tests only.

    Raises:
        ValueError: a shape, dtype or option that is not supported.
    """
    return _quantize(x, bits, group, False, interpret)


def quantize_values(
    x: jax.Array, *, bits: int, group: int = 64, interpret: Any = False
) -> Quantized:
    """Values, a scale per token of `group` channels. As `quantize_keys`; `group` divides H."""
    return _quantize(x, bits, group, True, interpret)


def cost_estimate(x: jax.Array, bits: int, group: int) -> pl.CostEstimate:
    """Each number is read once, and its code written."""
    moved = x.size * x.dtype.itemsize + x.size * bits // 8 + 4 * x.size // group
    return pl.CostEstimate(flops=6 * x.size, transcendentals=0, bytes_accessed=moved)


def _quantize(x: jax.Array, bits: int, group: int, turned: bool, interpret: Any) -> Quantized:
    if bits not in BITS:
        raise ValueError(f"bits={bits}; allowed: {', '.join(map(str, BITS))}")
    if group not in GROUPS:
        raise ValueError(f"group={group}; allowed: {', '.join(map(str, GROUPS))}")
    if x.ndim != 4 or 0 in x.shape or x.shape[2] % BLOCK or x.shape[3] not in (64, 128, 256):
        raise ValueError(
            f"x={x.shape}; allowed: [B, K, T, H], none 0, T a multiple of {BLOCK}, H 64, 128 or 256"
        )
    if turned and x.shape[3] % group:
        raise ValueError(f"group={group}; allowed: a divisor of x's H={x.shape[3]}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x.dtype={x.dtype}; allowed: bfloat16, float32")
    B, K, T, _ = x.shape
    block = next(n for n in range(min(MOST_TOKENS, T), 0, -BLOCK) if T % n == 0)
    heads = next(n for n in range(MOST_TOKENS // block, 0, -1) if B * K % n == 0)
    cost = cost_estimate(x, bits, group)
    codes, affine = call(x, bits, group, turned, heads, block, cost, interpret)
    return Quantized(codes, affine, bits, group)
