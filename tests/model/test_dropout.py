"""Dropout: where, when and how much."""

import dataclasses
import functools
import hashlib

import jax
import numpy as np
import pytest

from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.model.configs import PATTERN, make, packed_rows, small
from tests.model.layouts import stack_layers

RATE = 0.25
EPSILON = 1e16


def with_layout(config, scan):
    numerics = dataclasses.replace(config.numerics, scan_layers=scan)
    return Transformer(config.replace(numerics=numerics))


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, key=None):
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, *packed_rows(), method="hidden", rngs=rngs)[0]


def test_only_with_a_key():
    model, params = make("dropout")
    same, _ = make("base")
    np.testing.assert_array_equal(hidden(model, params), hidden(same, params))
    assert (hidden(model, params, jax.random.key(0)) != hidden(model, params)).any()


def test_rate_zero_is_none():
    model, params = make("base")
    want = hidden(model, params)
    np.testing.assert_array_equal(hidden(model, params, jax.random.key(0)), want)


def test_same_key_same_result():
    model, params = make("dropout")
    first = hidden(model, params, jax.random.key(1))
    np.testing.assert_array_equal(hidden(model, params, jax.random.key(1)), first)
    assert (hidden(model, params, jax.random.key(2)) != first).any()


def bits_model(scan):
    """Every addition to the residual stream is a power of two: 1 from the embeddings, 2 and 4 from
    the first layer's attention and MLP, and so on; the huge epsilon makes the norm a constant.
    """
    config = small(
        dropout=RATE,
        num_layers=5,
        attention={
            "layer_pattern": PATTERN,
            "sliding_window": 3,
            "out_bias": True,
        },
        feed_forward={"bias": True},
        norm={"epsilon": EPSILON},
        numerics={"scan_layers": scan},
    )
    abstract = abstract_params(with_layout(config, scan=False))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    params["embedding"][:] = 1
    params["final_norm"]["scale"][:] = 1
    for i in range(config.num_layers):
        block = params["last_layers"][f"block_{i}"]
        block["attention"]["out"]["bias"][:] = 2.0 ** (2 * i + 1)
        block["feed_forward"]["down"]["bias"][:] = 2.0 ** (2 * i + 2)
    return Transformer(config), stack_layers(config, params) if scan else params


def masks(scan, key):
    """What each of the 11 places keeps: booleans [8, 64, d_model]."""
    model, params = bits_model(scan)
    rows = [np.full((8, 64), n, np.int32) for n in (0, 0, 1)]

    @jax.jit
    def hidden(params, key, *rows):
        return model.apply({"params": params}, *rows, method="hidden", rngs={"dropout": key})[0]

    x = hidden(params, key, *rows)
    # What is kept is divided by 1 - p, so that the mean stays as it was.
    sums = np.asarray(x, np.float64) * EPSILON**0.5 * (1 - RATE)
    # Rounding, and the mean square (at most 2047²) that the norm adds to epsilon.
    np.testing.assert_allclose(sums, sums.round(), rtol=1e-6, atol=1e-6)
    return [(sums.round().astype(int) >> k) & 1 == 1 for k in range(11)]


# By scan. If they change, a run that is gone on with is another run than before: change them
# knowingly, and say so to the library's users.
FROZEN = {
    True: "91b4b3e632890473d9d748bcf640a2e29d0b7eceaf581228212fdc2c44c2308d",
    False: "df0aba8d1e4bc332ebf9f49fbd3a28f9ba28c0160dbdf563c2821aaa2e793409",
}


@pytest.mark.parametrize("scan", FROZEN)
def test_every_place_has_a_mask_of_its_own_which_is_frozen(scan):
    drawn = masks(scan, jax.random.fold_in(jax.random.key(7), 3))  # as at step 3 of seed 7
    for i, mask in enumerate(drawn):
        # Of this many coins: five standard deviations.
        assert abs(mask.mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / mask.size)
        for other in drawn[:i]:
            share = (1 - RATE) ** 2 + RATE**2  # at which independent masks agree
            deviation = np.sqrt(share * (1 - share) / mask.size)
            assert abs((mask == other).mean() - share) < 5 * deviation
    assert hashlib.sha256(np.packbits(drawn).tobytes()).hexdigest() == FROZEN[scan]
