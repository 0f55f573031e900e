"""The layout inside a kernel: words to numbers and back, by shifts and masks alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

RUN = 8  # rows of words: one register


def offset(bits: int) -> float:
    """What `load` returns is code + offset."""
    return -128.0 if bits == 8 else float(1 << bits)


def load(words: jax.Array, bits: int) -> jax.Array:
    """Codes + offset, bfloat16 [T, H], of int8 [T, H] or int32 words [T·bits/32, H]."""
    if bits == 8:
        return words.astype(jnp.bfloat16)
    rows, H = words.shape
    mask, exponent = _constants(bits)
    fields = [
        pltpu.bitcast((_shift(words, _place(bits, i)) & mask) | exponent, jnp.bfloat16)
        for i in range(16 // bits)
    ]
    # One register of each field in turn: only names change.
    runs = [field.reshape(rows // RUN, 2 * RUN, H) for field in fields]
    return jnp.stack(runs, 1).reshape(rows * 32 // bits, H)


def store(codes: jax.Array, bits: int) -> jax.Array:
    """The other way: float32 codes [T, H] to int8 or to words."""
    if bits == 8:
        return (codes - 128.0).astype(jnp.int32).astype(jnp.int8)
    T, H = codes.shape
    mask, _ = _constants(bits)
    numbers = (codes + offset(bits)).astype(jnp.bfloat16)
    runs = numbers.reshape(T * bits // (32 * RUN), 16 // bits, 2 * RUN, H)
    words = jnp.zeros((T * bits // 32, H), jnp.int32)
    for i in range(16 // bits):
        field = pltpu.bitcast(runs[:, i].reshape(T * bits // 16, H), jnp.int32) & mask
        words |= _shift(field, -_place(bits, i))
    return words


def _constants(bits: int) -> tuple[Any, Any]:
    """In both halves: the upper `bits` bits of a bfloat16's mantissa; the exponent of 2**bits."""
    twice = (1 << 16) + 1
    mask = ((1 << bits) - 1) << (7 - bits)
    return jnp.int32(mask * twice), jnp.int32(((127 + bits) << 7) * twice)


def _place(bits: int, i: int) -> int:
    """How far right field i must go to be in the upper bits of the mantissa."""
    return bits * i - (7 - bits)


def _shift(x: jax.Array, right: int) -> jax.Array:
    if right < 0:
        return x << -right
    return jax.lax.shift_right_logical(x, jnp.full_like(x, right)) if right else x
