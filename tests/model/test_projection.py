"""The projection's own gradient rule against JAX's rule for the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.projection import contract


@pytest.mark.parametrize(
    ("x", "kernel", "n"),
    [
        ((2, 5, 6), (6, 7), 1),
        ((2, 5, 6), (6, 3, 4), 1),
        ((2, 5, 3, 4), (3, 4, 6), 2),
        ((5,), (5, 2), 1),
    ],
)
def test_gradients_are_those_of_tensordot(x, kernel, n):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)
    want, back = jax.vjp(lambda x, k: jnp.tensordot(x, k, n), x, kernel)
    got, ours = jax.vjp(lambda x, k: contract(x, k, n), x, kernel)
    np.testing.assert_array_equal(got, want)
    dy = jax.random.normal(keys[2], want.shape)
    for mine, theirs in zip(ours(dy), back(dy), strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)  # float32, other order


def test_kernel_gradients_are_summed_in_float32():
    """4,096 equal terms: a bfloat16 sum would stop growing at 256."""
    x, kernel = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.grad(lambda k: contract(x, k, 1).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    assert float(gradient[0, 0]) == 4096
