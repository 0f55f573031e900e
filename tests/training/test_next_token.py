"""The chunked loss against plain NumPy in float64; its gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.training.objectives.next_token import LossSpec, next_token_loss


def oracle(spec, hidden, matrix, bias, targets, weights):
    """(loss, (nll, z, correct)) with all logits at once."""
    logits = hidden @ matrix + bias
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll, z = (weights * (lse - picked)).sum(), (weights * lse**2).sum()
    right = (weights * (logits.argmax(-1) == targets)).sum()
    return nll + spec.z_weight * z, (nll, z, right)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(2, 11))
SPECS = st.builds(
    LossSpec,
    chunk=st.sampled_from([1, 2, 4, 64]),
    softcap=st.sampled_from([None, 1.5]),
    z_weight=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=15)  # each compiles a program
@given(SIZES, SPECS, st.booleans(), st.integers(0, 2**32 - 1))
def test_values_and_gradients(sizes, spec, with_bias, seed):
    B, T, D, V = sizes
    generator = np.random.default_rng(seed)
    hidden, matrix = generator.normal(size=(B, T, D)), generator.normal(size=(D, V))
    bias = generator.normal(size=V) * with_bias
    targets = generator.integers(0, V, (B, T))
    weights = generator.choice([0.0, 0.5, 2.0], (B, T))

    def loss(hidden, matrix, bias):
        args = (jnp.asarray(x, jnp.float32) for x in (hidden, matrix))
        b = jnp.asarray(bias, jnp.float32) if with_bias else None
        y, w = jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)
        total, sums = next_token_loss(spec, *args, b, y, w)
        return 3 * total, sums  # the cotangent is not 1

    wrt = (0, 1, 2) if with_bias else (0, 1)
    point = [jnp.asarray(x, jnp.float32) for x in (hidden, matrix, bias)]
    both = jax.jit(lambda *p: (jax.value_and_grad(loss, wrt, has_aux=True)(*p), loss(*p)))
    ((total, sums), grads), (plain, _) = both(*point)

    # The oracle sees the same numbers, rounded to float32.
    exact = [np.asarray(x, np.float64) for x in point]
    expected, parts = oracle(spec, *exact, targets, weights)
    # A few hundred float32 operations of relative error 6e-8 each.
    scale = 1 + abs(expected) + parts[1]
    np.testing.assert_allclose([total, plain], [3 * expected] * 2, atol=1e-5 * scale)
    np.testing.assert_allclose(sums, parts, atol=1e-5 * scale)

    for _ in range(3):
        step = 1e-5
        directions = [generator.normal(size=x.shape) for x in exact]
        if not with_bias:
            directions[2] *= 0
        ahead, behind = (
            oracle(
                spec,
                *(x + s * d for x, d in zip(exact, directions, strict=True)),
                targets,
                weights,
            )[0]
            for s in (step, -step)
        )
        slope = sum(
            (np.asarray(g, np.float64) * d).sum() for g, d in zip(grads, directions, strict=False)
        )
        # Float32 again; the differences themselves are good to 1e-9.
        np.testing.assert_allclose(slope, 3 * (ahead - behind) / (2 * step), atol=1e-4 * scale)


def test_the_parts_have_no_gradient():
    """Metrics beside the loss: to differentiate them would silently give zero."""
    args = (jnp.ones((1, 2, 3)), jnp.ones((3, 4)), None)
    targets, weights = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
    grads = jax.grad(lambda h: next_token_loss(LossSpec(), h, *args[1:], targets, weights)[1].nll)(
        args[0]
    )
    assert not np.any(grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_keeps_float32_sums(dtype):
    """Only the inputs are rounded: logits, log-sum-exp and sums stay float32."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 64, 8)), dtype)
    matrix = jnp.asarray(generator.normal(size=(8, 50)), dtype)
    targets = generator.integers(0, 50, (2, 64))
    weights = np.ones((2, 64))
    spec = LossSpec(chunk=16)
    total, _ = next_token_loss(
        spec, hidden, matrix, None, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, "f4")
    )
    exact = (np.asarray(x, np.float64) for x in (hidden, matrix))
    expected, _ = oracle(spec, *exact, np.zeros(50), targets, weights)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
