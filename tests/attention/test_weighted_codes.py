"""Sums over codes agree with those over numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.attention.weighted_codes import weighted_codes
from kernels.kv_quantize.layout import BITS
from kernels.kv_quantize.reference import dequantize_values, quantize_values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32])
def test_as_of_numbers(bits, group):
    p = jax.random.uniform(jax.random.key(0), (2, 3, 256)) / 256
    x = quantize_values(jax.random.normal(jax.random.key(1), (2, 3, 256, 32)), bits, group)
    want = jnp.einsum("bks,bksh->bkh", p, dequantize_values(x))
    # float32 sums of 256 terms below 1/64, in another order
    np.testing.assert_allclose(weighted_codes(p, x), want, rtol=0, atol=1e-6)
