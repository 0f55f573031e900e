"""Whether our kernels agree with plain jnp: small calls in TPU interpret mode, on a CPU.

python -m launch.kernel_agreement

One call of each kernel and dtype; tests/kernels has many more. Memory that nothing was written to
is NaN, so what is read before it is written shows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console
from rich.table import Table

from kernels import (
    block_sampled_attention,
    cross_entropy,
    decode_attention,
    kv_quantize,
    quantized_decode_attention,
)
from kernels import flash_attention as flash
from kernels.block_sampled_attention import reference as sampled_reference
from kernels.cross_entropy import reference as entropy_reference
from kernels.flash_attention import reference as flash_reference
from kernels.kv_quantize import reference as quantize_reference

# (kernel's results, the oracle's): pytrees of equal structure.
Results = tuple[Any, Any]
# Of the largest number: float32 sums in another order; bfloat16 has 8 bits and is rounded twice.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
FLASH = functools.partial(flash.flash_attention, chip="v5e")  # interpreted: for no chip of its own


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One kernel against its oracle.

    Attributes:
        kernel: its name.
        about: what of it is called.
        run: a dtype's name → results.
    """

    kernel: str
    about: str
    run: Callable[[str], Results]


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    """The same numbers for the same shape."""
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def with_gradients(
    kernel: Callable[..., Any], oracle: Callable[..., Any], *x: jax.Array
) -> Results:
    """Outputs of both and the gradients of all arguments under the same cotangents. In programs of
    their own: one by one, the operations around the kernels take longest to compile.
    """
    found, back = jax.jit(lambda *x: jax.vjp(kernel, *x))(*x)
    wanted, back_wanted = jax.jit(lambda *x: jax.vjp(oracle, *x))(*x)
    given = jax.tree.map(lambda a: normal(*a.shape, dtype=a.dtype.name), found)
    cotangents = jax.tree.map(lambda a, b: a.astype(b.dtype), given, wanted)
    # Not `back` itself: where it has two kernels, they would run at a time and may wait for ever.
    return (found, back(given)), (wanted, jax.jit(lambda b, d: b(d))(back_wanted, cotangents))


def _causal(dtype: str) -> Results:
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)

    def of(function: Any) -> Any:
        return lambda q, k, v: function(q, k, v, scale=0.125, softcap=4.0)

    return with_gradients(of(FLASH), of(flash_reference.flash_attention), q, k, -k)


def _packed_bias(dtype: str) -> Results:
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)
    ids = jnp.asarray(np.repeat([1, 2], [70, 130])[None], jnp.int32)

    def of(function: Any) -> Any:
        return lambda q, k, v, bias: function(q, k, v, ids, scale=0.125, window=90, bias=bias)

    kernel, oracle = of(FLASH), of(flash_reference.flash_attention)
    return with_gradients(kernel, oracle, q, k, -k, normal(2, 399))


def _lambda(dtype: str) -> Results:
    q, k = normal(1, 1, 300, 64, dtype=dtype), normal(1, 1, 300, 64, dtype=dtype)

    def of(function: Any) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, q_far: jax.Array) -> Any:
            sinks = flash.Sinks(4, q_far, -k)
            return function(q, k, v, scale=0.125, window=128, sinks=sinks)

        return attend

    kernel, oracle = of(FLASH), of(flash_reference.flash_attention)
    return with_gradients(kernel, oracle, q, k, -k, -q)


def _sampled(dtype: str) -> Results:
    q, k = normal(1, 2, 500, 64, dtype=dtype), normal(1, 1, 500, 64, dtype=dtype)
    drawn = jnp.array([0, 2, 3], jnp.int32), jnp.array([0.0, 0.3, 0.1])
    sample = block_sampled_attention.Sample(*drawn)

    def of(function: Any) -> Any:
        return lambda q, k, v: function(q, k, v, sample, scale=0.125, block=128, sink_blocks=1)

    kernel = of(block_sampled_attention.block_sampled_attention)
    return with_gradients(kernel, of(sampled_reference.block_sampled_attention), q, k, -k)


def _cross_entropy(dtype: str) -> Results:
    hidden, matrix = normal(24, 64, dtype=dtype), normal(64, 200, dtype=dtype)
    targets = jnp.arange(24, dtype=jnp.int32)

    def of(function: Any) -> Any:
        def losses(hidden: jax.Array, matrix: jax.Array, bias: jax.Array) -> Any:
            return function(hidden, matrix, bias, targets, vocab_axis=1, softcap=9.0)[:2]

        return losses

    kernel, oracle = of(cross_entropy.cross_entropy), of(entropy_reference.cross_entropy)
    return with_gradients(kernel, oracle, hidden, matrix, normal(200))


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


def _quantize(dtype: str) -> Results:
    """Codes, scales and minima, bit for bit."""
    x = normal(1, 1, 256, 128, dtype=dtype)
    kernels = kv_quantize.quantize_keys, kv_quantize.quantize_values
    oracles = quantize_reference.quantize_keys, quantize_reference.quantize_values
    found, wanted = ([f(x, bits=4, group=64) for f in side] for side in (kernels, oracles))
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


AGREEMENTS = (
    Agreement("flash_attention", "causal, soft cap, gradients", _causal),
    Agreement("flash_attention", "packed, window, trained bias, gradients", _packed_bias),
    Agreement("flash_attention", "Λ: window, sinks, gradients", _lambda),
    Agreement("block_sampled_attention", "drawn blocks, sinks, gradients", _sampled),
    Agreement("cross_entropy", "bias, soft cap, gradients", _cross_entropy),
    Agreement("decode_attention", "dense, ragged lengths, bias, two new tokens", _decode),
    Agreement("kv_quantize", "4 bits, keys and values", _quantize),
    Agreement(
        "quantized_decode_attention", "8, 4, 2 and 16 bits, bias, one softmax", _quantized_decode
    ),
)


def largest_error(results: Results) -> float:
    """Over all arrays, relative to the largest number of each."""
    worst = 0.0
    for found, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (found, wanted))
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return float(worst)


def main() -> None:
    """Prints a table; exit status 1 if an error is above its limit."""
    table = Table(title="Agreement with plain jnp, TPU interpret mode: largest relative error")
    for column in (
        "kernel",
        "call",
        *(f"{dtype} (≤ {limit:g})" for dtype, limit in LIMITS.items()),
    ):
        table.add_column(column)
    good = True
    parameters = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    with pltpu.force_tpu_interpret_mode(parameters):
        for agreement in AGREEMENTS:
            errors = {dtype: largest_error(agreement.run(dtype)) for dtype in LIMITS}
            good &= all(errors[dtype] <= limit for dtype, limit in LIMITS.items())
            figures = [f"{error:.1e}" for error in errors.values()]
            table.add_row(agreement.kernel, agreement.about, *figures)
    Console(width=120).print(table)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
