"""How quantized numbers lie in memory, exactly; in plain jnp.

x̂ = code·scale + minimum, code an integer from 0 to 2**bits − 1.

Codes of [..., T, H], T a multiple of 128:

    8 bits   int8 [..., T, H]: code − 128.
    4, 2     int32 words [..., T·bits/32, H]. A run of 256/bits tokens is 8 rows of words. Token
             16·i + 2·r + h of the run is in row r, in bits bits·i … bits·i + bits − 1 of half h
             (0: the low 16 bits, 1: the high ones).

                 4 bits, row r   31…28 27…24 23…20 19…16 15…12 11…8  7…4  3…0
                 token 2·r +      49    33    17     1     48    32   16    0

Why: a TPU keeps rows 2·r and 2·r + 1 of 16-bit numbers in the halves of one word. So
(word >> n) & mask is, without a move between lanes or rows, a register of 16 tokens in order; and
if the mask is over the upper bits of a bfloat16's mantissa, | exponent makes it the number
2**bits + code: three operations for 16 × 128 numbers. Eight bits do not fit into a bfloat16's
mantissa beside an offset; the compiler's own conversion from int8 serves them.

Scale and minimum are bfloat16, in one word: scale in the upper half, minimum in the lower, so that
both become float32 by one operation. Keys [..., T, H] have one word per channel of `group`
consecutive tokens, [..., T/group, H]. Values have one per token of `group` channels, and time is
the last axis, as it is in scores: [..., H/group, T].
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

BITS = (8, 4, 2)
GROUPS = (16, 32, 64, 128)
BLOCK = 128  # tokens come in multiples of it
RANGE = 2.0**126  # of a group: twice as much is still a number while codes become numbers
NAN = 0x7FC00000
UPPER = -(1 << 16)  # mask of the upper half of a word


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "affine"],
    meta_fields=["bits", "group"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Keys or values.

    Attributes:
        codes: int8 [B, K, T, H], or int32 [B, K, T·bits/32, H].
        affine: scale and minimum, int32: of keys [B, K, T/group, H], of values [B, K, H/group, T].
        bits: 8, 4 or 2.
        group: numbers that share a scale.
    """

    codes: jax.Array
    affine: jax.Array
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return self.codes.nbytes + self.affine.nbytes


def rows_of_codes(tokens: int, bits: int) -> int:
    """Rows that `tokens` tokens take."""
    return tokens if bits == 8 else tokens * bits // 32


def tokens_of_codes(rows: int, bits: int) -> int:
    """Tokens that `rows` rows hold."""
    return rows if bits == 8 else rows * 32 // bits


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """int32 [..., T, H] → [..., rows, H]."""
    if bits == 8:
        return (codes - 128).astype(jnp.int8)
    *lead, T, H = codes.shape
    fields = 16 // bits
    x = codes.reshape(*lead, T // (16 * fields), fields, 8, 2, H)
    shifts = bits * jnp.arange(fields)[:, None] + 16 * jnp.arange(2)[None]  # [fields, half]
    shifts = shifts.reshape((1,) * len(lead) + (1, fields, 1, 2, 1))
    # The fields don't overlap: their sum is their union, also where it wraps around to a negative.
    words = jnp.left_shift(x, shifts.astype(jnp.int32)).sum((-4, -2), dtype=jnp.int32)
    return words.reshape(*lead, T * bits // 32, H)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """[..., rows, H] → int32 [..., T, H]."""
    if bits == 8:
        return words.astype(jnp.int32) + 128
    *lead, rows, H = words.shape
    fields = 16 // bits
    x = words.reshape(*lead, rows // 8, 1, 8, 1, H)
    shifts = bits * jnp.arange(fields)[:, None] + 16 * jnp.arange(2)[None]
    shifts = shifts.reshape((1,) * len(lead) + (1, fields, 1, 2, 1))
    codes = jnp.right_shift(x, shifts.astype(jnp.int32)) & ((1 << bits) - 1)
    return codes.reshape(*lead, tokens_of_codes(rows, bits), H)


def bounds(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum of float32 along an axis; NaN for the latter if any is no finite number,
    of which a TPU's own minimum and maximum need not tell.
    """
    return x.min(axis), x.max(axis) + (x * 0.0).sum(axis)


def affine_from(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    """Words for numbers in [low, high], float32: the least bfloat16 scale from the largest
    bfloat16 minimum that cover them. So no number is clipped, and if all are one bfloat16 the
    scale is 0 and they come back exactly. If high is NaN or as far as RANGE from low, so is the
    scale NaN, and all that is made of it.
    """
    b = jax.lax.bitcast_convert_type(low, jnp.int32)
    minimum = (b + jnp.where(low < 0, ~UPPER, 0)) & UPPER  # away from zero below it, so: down
    room = high - jax.lax.bitcast_convert_type(minimum, jnp.float32)
    s = jax.lax.bitcast_convert_type(room * (1 / ((1 << bits) - 1)), jnp.int32)
    scale = jnp.where(room < RANGE, (s + ~UPPER) & UPPER, NAN)  # up
    return scale | jax.lax.shift_right_logical(minimum, jnp.full_like(minimum, 16))


def scale_and_minimum(affine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32, of the words' shape."""
    scale = jax.lax.bitcast_convert_type(affine & UPPER, jnp.float32)
    return scale, jax.lax.bitcast_convert_type(affine << 16, jnp.float32)


def codes_for(x: jax.Array, scale: jax.Array, minimum: jax.Array, bits: int) -> jax.Array:
    """The nearest codes, int32: of float32 that broadcast with each other."""
    q = jnp.floor((x - minimum) / jnp.where(scale == 0, 1.0, scale) + 0.5)
    q = jnp.where(q > 0, q, 0.0)  # 0 also for NaN
    return jnp.minimum(q, float((1 << bits) - 1)).astype(jnp.int32)
