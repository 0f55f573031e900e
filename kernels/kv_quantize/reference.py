"""Quantization written down plainly: the oracle of the kernels, and the way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.kv_quantize.layout import (
    Quantized,
    affine_from,
    bounds,
    codes_for,
    pack,
    scale_and_minimum,
    unpack,
)


def quantize_keys(x: jax.Array, bits: int, group: int) -> Quantized:
    """[..., T, H]: a scale and a minimum per channel of `group` consecutive tokens."""
    *lead, T, H = x.shape
    grouped = x.astype(jnp.float32).reshape(*lead, T // group, group, H)
    affine = affine_from(*bounds(grouped, -2), bits)
    scale, minimum = (a[..., None, :] for a in scale_and_minimum(affine))
    codes = codes_for(grouped, scale, minimum, bits).reshape(x.shape)
    return Quantized(pack(codes, bits), affine, bits, group)


def quantize_values(x: jax.Array, bits: int, group: int) -> Quantized:
    """[..., T, H]: a scale and a minimum per token of `group` channels."""
    *lead, T, H = x.shape
    grouped = x.astype(jnp.float32).reshape(*lead, T, H // group, group)
    affine = affine_from(*bounds(grouped, -1), bits)
    scale, minimum = (a[..., None] for a in scale_and_minimum(affine))
    codes = codes_for(grouped, scale, minimum, bits).reshape(x.shape)
    return Quantized(pack(codes, bits), affine.swapaxes(-1, -2), bits, group)


def dequantize_keys(x: Quantized, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """[..., T, H]."""
    codes = unpack(x.codes, x.bits).astype(jnp.float32)
    scale, minimum = (jnp.repeat(a, x.group, -2) for a in scale_and_minimum(x.affine))
    return (codes * scale + minimum).astype(dtype)


def dequantize_values(x: Quantized, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """[..., T, H]."""
    codes = unpack(x.codes, x.bits).astype(jnp.float32)
    affine = x.affine.swapaxes(-1, -2)
    scale, minimum = (jnp.repeat(a, x.group, -1) for a in scale_and_minimum(affine))
    return (codes * scale + minimum).astype(dtype)
