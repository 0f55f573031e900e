"""Products with codes, in bfloat16, against the same in float64 of what was rounded alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels.kv_quantize.layout import scale_and_minimum, unpack
from kernels.kv_quantize.reference import quantize_keys, quantize_values
from kernels.quantized_decode_attention.dequantize import dots, weighed
from tests.kernels.interpret import INTERPRET, random

ROWS, W, H, GROUP = 8, 256, 128, 32
BF16 = jnp.bfloat16


def rounded(x):
    """float64 of the nearest bfloat16; a tie goes up, as by the kernel's integers."""
    bits = (np.asarray(x, np.float32).view(np.uint32) + (1 << 15)) & 0xFFFF0000
    return bits.view(np.float32).astype(np.float64)


def of_groups(kept):
    """(float32 scale, float64 minimum) of each group."""
    scale, minimum = (np.asarray(x) for x in scale_and_minimum(kept.affine))
    return zip(scale, minimum.astype(np.float64), strict=True)


def run(body, columns, *arrays):
    def kernel(*refs):
        *given, out = refs
        out[...] = body(*(ref[...] for ref in given))

    shape = jax.ShapeDtypeStruct((ROWS, columns), jnp.float32)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=INTERPRET)(*arrays))


CASES = [(bits, mean) for bits in (8, 4, 2) for mean in (0, 100)]
# What is left is of sums in float32: 128 products of a query with minima of about the mean, or the
# mean itself. Were the offset multiplied by what is not rounded, it would be a hundred times more.


@pytest.mark.parametrize(("bits", "mean"), CASES)
def test_the_offset_adds_no_error_to_scores(bits, mean):
    rng = np.random.default_rng(0)
    kept, q = quantize_keys(random(rng, W, H) + mean, bits, GROUP), random(rng, ROWS, H, dtype=BF16)
    found = run(lambda *x: dots(*x, bits, GROUP, 128), W, q, kept.codes, kept.affine)
    codes, wide = np.asarray(unpack(kept.codes, bits), np.float64), np.asarray(q, np.float32)
    wanted = [
        rounded(wide * scale) @ codes[g * GROUP : (g + 1) * GROUP].T + (wide @ minimum)[:, None]
        for g, (scale, minimum) in enumerate(of_groups(kept))
    ]
    np.testing.assert_allclose(found, np.concatenate(wanted, 1), atol=3e-5 * (1 + mean))


@pytest.mark.parametrize(("bits", "mean"), CASES)
def test_the_offset_adds_no_error_to_weighed_values(bits, mean):
    rng = np.random.default_rng(0)
    kept = quantize_values(random(rng, W, H) + mean, bits, GROUP)
    p = jax.nn.softmax(random(rng, ROWS, W))
    found = run(lambda *x: weighed(*x, bits, GROUP, BF16), H, p, kept.codes, kept.affine)
    codes, weights = np.asarray(unpack(kept.codes, bits), np.float64), np.asarray(p)
    wanted = [
        rounded(weights * scale) @ codes[:, g * GROUP : (g + 1) * GROUP]
        + (weights @ minimum)[:, None]
        for g, (scale, minimum) in enumerate(of_groups(kept))
    ]
    np.testing.assert_allclose(found, np.concatenate(wanted, 1), atol=5e-6 + 1e-6 * mean)
