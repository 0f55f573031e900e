"""Small calls of the kernels of decoding and their oracles."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import decode_attention, kv_quantize, quantized_decode_attention
from kernels.kv_quantize import reference as quantize_reference
from launch.kernel_agreement_call import Agreement, Results, normal


def _positions(first: int, number: int) -> jax.Array:
    """Of consecutive tokens, in both rows."""
    return jnp.tile(jnp.arange(first, first + number, dtype=jnp.int32), (2, 1))


def _decode(dtype: str) -> Results:
    """Of two new tokens after a cache of two rows."""
    q, k = normal(2, 4, 2, 128, dtype=dtype), normal(2, 2, 256, 128, dtype=dtype)
    slots = decode_attention.Slots(
        _positions(0, 256), lengths=jnp.array([200, 100], jnp.int32), bias=normal(2, 4, 2, 256)
    )
    queries = decode_attention.Queries(_positions(256, 2))
    call = q, k, -k, decode_attention.Scoring(0.1), queries, slots
    return decode_attention.decode_attention(*call), decode_attention.reference(*call)


def _paged(dtype: str) -> Results:
    """Two sequences of three pages each, of which the second shares the first's first."""
    q, k = normal(2, 4, 1, 128, dtype=dtype), normal(6, 2, 64, 128, dtype=dtype)
    table = jnp.array([[4, 0, 2], [4, 5, 1]], jnp.int32)
    slots = decode_attention.Slots(_positions(0, 192), lengths=jnp.array([192, 70], jnp.int32))
    queries, scoring = decode_attention.Queries(_positions(192, 1)), decode_attention.Scoring(0.1)

    def dense(pool: jax.Array) -> jax.Array:
        return jnp.concatenate([pool[table[:, page]] for page in range(3)], 2)

    found = decode_attention.paged_decode_attention(q, k, -k, table, scoring, queries, slots)
    return found, decode_attention.reference(q, dense(k), -dense(k), scoring, queries, slots)


def _quantize(dtype: str) -> Results:
    """Codes, scales and minima, bit for bit."""
    x = normal(1, 1, 256, 128, dtype=dtype)
    kernels = kv_quantize.quantize_keys, kv_quantize.quantize_values
    oracles = quantize_reference.quantize_keys, quantize_reference.quantize_values
    found, wanted = (
        [f(x, bits=bits, group=64) for bits in (8, 4, 2) for f in side]
        for side in (kernels, oracles)
    )
    return found, wanted


def _quantized_decode(dtype: str) -> Results:
    zones = []
    x = normal(2, 1, 128, 128, dtype=dtype)
    for number, bits in enumerate((8, 4, 2)):
        k = quantize_reference.quantize_keys(x, bits, 64)
        v = quantize_reference.quantize_values(-x, bits, 64)
        slots = decode_attention.Slots(_positions(128 * number, 128))
        zones.append(quantized_decode_attention.Zone(k, v, slots))
    slots = decode_attention.Slots(_positions(384, 128), bias=normal(2, 2, 2, 128))
    zones.append(quantized_decode_attention.Zone(x, -x, slots))
    queries = decode_attention.Queries(_positions(512, 2))
    q = normal(2, 2, 2, 128, dtype=dtype)
    call = q, zones, decode_attention.Scoring(0.1), queries
    found = quantized_decode_attention.quantized_decode_attention(*call)
    return found, quantized_decode_attention.reference(*call)


def _float8_decode(dtype: str) -> Results:
    q, x = normal(2, 2, 1, 128, dtype=dtype), normal(2, 1, 128, 128, dtype=dtype)
    slots = decode_attention.Slots(_positions(0, 128))
    kept = kv_quantize.to_float8(x), kv_quantize.to_float8(-x)
    zones = [quantized_decode_attention.Zone(*kept, slots)]
    queries = decode_attention.Queries(_positions(128, 1))
    call = q, zones, decode_attention.Scoring(0.1), queries
    found = quantized_decode_attention.quantized_decode_attention(*call)
    return found, quantized_decode_attention.reference(*call)


AGREEMENTS = (
    Agreement("decode_attention", "dense, ragged lengths, bias, two new tokens", _decode),
    Agreement("decode_attention", "pages, ragged lengths", _paged),
    Agreement("kv_quantize", "8, 4 and 2 bits, keys and values", _quantize),
    Agreement(
        "quantized_decode_attention", "8, 4, 2 and 16 bits, bias, one softmax", _quantized_decode
    ),
    Agreement("quantized_decode_attention", "float8, scales", _float8_decode),
)
