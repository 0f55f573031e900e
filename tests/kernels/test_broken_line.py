"""A ReLU network of one number against itself, written as a broken line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.flash_attention.broken_line import GROUP, broken_line, pieces


def network(x, w_in, b_in, w_out, b_out):
    """[heads, points] of points x."""
    units = jax.nn.relu(w_in[:, None] * x[None] + b_in[:, None])
    return jnp.einsum("nw,wp->np", w_out, units, precision="highest") + b_out[:, None]


def line_of(x, *weights):
    """The same by the line's definition."""
    line = broken_line(*weights)
    risen = jnp.maximum(x[None] - line.kinks[:, None], 0)
    total = jnp.einsum("nk,kp->np", line.slopes, risen, precision="highest")
    return total + line.start[:, None]


def pieces_of(x, first, groups, *weights):
    """By a tile's kinks alone."""
    end = first + GROUP * groups
    p = pieces(broken_line(*weights))
    inner = jnp.maximum(x[None], p.kinks[first:end, None])
    met = jnp.einsum("nk,kp->np", p.slopes[:, first:end], inner, precision="highest")
    return p.levels[:, end, None] + p.rises[:, first, None] * x[None] + met


@pytest.fixture
def weights():
    """Kinks before, within and after [0, 1]; rising, falling and level units."""
    keys = jax.random.split(jax.random.key(0), 4)
    w_in, b_in = jax.random.normal(keys[0], (16,)), jax.random.normal(keys[1], (16,))
    b_in = b_in.at[:8].set(-w_in[:8] * jnp.linspace(0.05, 0.95, 8))
    w_in, b_in = w_in.at[14:].set(0), b_in.at[14:].set(jnp.array([0.5, -0.5]))
    return w_in, b_in, jax.random.normal(keys[2], (3, 16)), jax.random.normal(keys[3], (3,))


def test_a_network_is_a_broken_line(weights):
    """Values, and the gradients of all weights and of the points: float32 sums of 101 terms."""
    x = jnp.linspace(0.003, 0.997, 101)  # none at a kink, where a slope is either side's
    found, back = jax.vjp(line_of, x, *weights)
    wanted, wanted_back = jax.vjp(network, x, *weights)
    given = jax.random.normal(jax.random.key(1), wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for a, b in zip(back(given), wanted_back(given), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.6), (0.5, 0.51), (1, 1), (0, 0.2)])
def test_kinks_out_of_a_range_are_left_out(weights, low, high):
    kinks = np.asarray(broken_line(*weights).kinks)
    first = int((kinks <= low).sum())
    groups = -(-max(int((kinks < high).sum()) - first, 0) // GROUP)
    x = jnp.linspace(low, high, 33)
    found = pieces_of(x, first, groups, *weights)
    np.testing.assert_allclose(found, network(x, *weights), atol=1e-5)
