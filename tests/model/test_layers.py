"""Scanned or unrolled, recomputed or not: the same model, the same gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.caches.dense import DenseCache
from jaxlm.model.config import NumericsConfig
from jaxlm.model.layers import stack_layers, unroll_layers
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import REMAT_POLICIES, Transformer
from tests.model.configs import CONFIGS, logits, make, packed_rows, shapes


def with_numerics(model, **changes):
    numerics = dataclasses.replace(model.config.numerics, **changes)
    return Transformer(model.config.replace(numerics=numerics))


SCANNED = [n for n, c in CONFIGS.items() if c.numerics.scan_layers]
# One layer a round; a pattern with layers left over; a pattern longer than the model; experts.
SHAPES = ["base", "pattern", "long_pattern", "experts"]


@pytest.mark.parametrize("name", SHAPES)
def test_layouts_have_the_shapes_of_their_models(name):
    model, params = make(name)
    unrolled = unroll_layers(model.config, params)
    want = abstract_params(with_numerics(model, scan_layers=False))
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), unrolled)
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), want)


@pytest.mark.parametrize("name", SCANNED)
def test_stacking_undoes_unrolling(name):
    config = CONFIGS[name]
    numbered = [
        np.arange(x.size, dtype=np.float32).reshape(x.shape) for x in jax.tree.leaves(shapes(name))
    ]
    params = jax.tree.unflatten(jax.tree.structure(shapes(name)), numbered)
    back = stack_layers(config, unroll_layers(config, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", SHAPES)
def test_scanned_and_unrolled_give_one_result(name):
    model, params = make(name)
    unrolled = with_numerics(model, scan_layers=False)
    got = logits(unrolled, unroll_layers(model.config, params), *packed_rows())
    # The compiler may fuse across unrolled layers: float32 rounding, as against the oracle.
    np.testing.assert_allclose(got, logits(model, params, *packed_rows()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_scanned_and_unrolled_fill_one_cache(name):
    """Layer i's keys and values are in row i, whatever the layout."""
    model, params = make(name)
    rows = packed_rows()

    @functools.partial(jax.jit, static_argnums=0)
    def fill(model, params):
        cache = DenseCache.init(model.config, 2, 16)
        return model.apply({"params": params}, *rows, cache)[1]

    one = fill(model, params)
    two = fill(with_numerics(model, scan_layers=False), unroll_layers(model.config, params))
    assert np.abs(one.keys).max(axis=(1, 2, 3, 4)).all()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_every_remat_policy_is_a_choice_of_the_config():
    for name in ("none", *REMAT_POLICIES):
        assert NumericsConfig(remat=name).remat == name
    assert set(REMAT_POLICIES) == {"dots", "full"}


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params, rows, key):
    def loss(p):
        y, _ = model.apply({"params": p}, *rows, rngs={"dropout": key})
        return jnp.where(rows[2] != 0, jax.nn.log_softmax(y)[..., 3], 0.0).sum()

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module", params=["pattern", "experts", "unrolled"])
def stored(request):
    """A model with dropout, and its gradients with nothing recomputed."""
    model, params = make(request.param)
    model = Transformer(model.config.replace(dropout=0.3))
    return model, params, gradients(model, params, packed_rows(), jax.random.key(0))


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_recomputing_changes_no_gradient(stored, remat):
    """Dropout included: the backward pass draws the masks of the forward pass."""
    model, params, want = stored
    got = gradients(with_numerics(model, remat=remat), params, packed_rows(), jax.random.key(0))

    def close(path, a, b):
        assert np.abs(b).max() > 0, path
        # What is recomputed may be fused otherwise: rounding of 6e-8 a step, over a few dozen.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize("name", ["base", "unrolled", "long_pattern"])
def test_full_remat_recomputes_every_matrix_product(name):
    """More products in the optimized program: nothing was merged back by the compiler."""

    def products(model, params):
        program = gradients.lower(model, params, packed_rows(), jax.random.key(0)).compile()
        return program.as_text().count(" dot(")

    model, params = make(name)
    once, twice = products(model, params), products(with_numerics(model, remat="full"), params)
    per_layer = 7  # q, k, v, out, up, gate, down
    bodies = 1 if name == "base" else 2  # of layers in the program
    assert twice - once >= bodies * (per_layer - 1)  # the last product's result is not needed


def test_stacking_keeps_dtypes():
    model, params = make("bfloat16_params")
    back = stack_layers(model.config, unroll_layers(model.config, params))
    assert {x.dtype for x in jax.tree.leaves(back)} == {jnp.dtype("bfloat16")}
