"""Scanned or unrolled, recomputed or not: the same model, the same gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.caches.dense import DenseCache
from jaxlm.model.config import NumericsConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import REMAT_POLICIES, Transformer
from tests.model.configs import CONFIGS, make, packed_rows, random_params, shapes, small
from tests.model.layouts import stack_layers


def with_numerics(model, **changes):
    numerics = dataclasses.replace(model.config.numerics, **changes)
    return Transformer(model.config.replace(numerics=numerics))


SCANNED = [n for n, c in CONFIGS.items() if c.numerics.scan_layers]
# One layer a round; a pattern with layers left over; a pattern longer than the model; experts.
SHAPES = ["base", "pattern", "long_pattern", "experts"]


@pytest.mark.parametrize("name", SHAPES)
def test_layouts_have_the_shapes_of_their_models(name):
    model, params = make(name)
    unrolled = jax.eval_shape(lambda p: unroll_layers(model.config, p), params)
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


@functools.partial(jax.jit, static_argnums=0)
def logits_and_cache(model, params):
    cache = DenseCache.init(model.config, 2, 16)
    return model.apply({"params": params}, *packed_rows(), cache)


def layers(stacks):
    """Arrays of one or more layers each, as one."""
    return np.concatenate(stacks)


@pytest.mark.parametrize("name", ["pattern", "experts"])
def test_scanned_and_unrolled_give_one_result(name):
    """The keys and values of layer i are the i-th of the cache, whatever the layout."""
    model, params = make(name)
    one = logits_and_cache(model, params)
    unrolled = with_numerics(model, scan_layers=False)
    two = logits_and_cache(unrolled, unroll_layers(model.config, jax.device_get(params)))
    assert [len(x) for x in two[1].keys] == [1] * model.config.num_layers
    one, two = ((logits, *map(layers, (cache.keys, cache.values))) for logits, cache in (one, two))
    assert np.abs(one[1]).max(axis=(1, 2, 3, 4)).all()
    for a, b in zip(one, two, strict=True):
        # The compiler may fuse across unrolled layers: float32 rounding, as against the oracle.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_every_remat_policy_is_a_choice_of_the_config():
    for name in ("none", *REMAT_POLICIES):
        assert NumericsConfig(remat=name).remat == name
    assert set(REMAT_POLICIES) == {"dots", "full"}


def mixed():
    """Two layers in a loop and one after it."""
    attention = {"layer_pattern": ("global", "sliding"), "sliding_window": 3}
    model = Transformer(small(num_layers=3, attention=attention, dropout=0.3))
    return model, random_params(abstract_params(model))


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params):
    tokens, positions, segments = packed_rows()

    def loss(p):
        rngs = {"dropout": jax.random.key(0)}
        y, _ = model.apply({"params": p}, tokens, positions, segments, rngs=rngs)
        return jnp.where(segments != 0, jax.nn.log_softmax(y)[..., 3], 0.0).sum()

    return jax.value_and_grad(loss)(params)


def test_recomputing_changes_no_gradient():
    """Dropout included: the backward pass draws the masks of the forward pass."""
    model, params = mixed()
    want = gradients(model, params)

    def close(path, a, b):
        assert np.abs(b).max() > 0, path
        # What is recomputed may be fused otherwise: rounding of 6e-8 a step, over a few dozen.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(path))

    for remat in REMAT_POLICIES:
        got = gradients(with_numerics(model, remat=remat), params)
        jax.tree_util.tree_map_with_path(close, got, want)


def test_full_remat_recomputes_every_matrix_product():
    """More products in the optimized program, and outside of the loop a fence around them: there
    some compilers would merge them with the first ones.
    """
    model, params = mixed()
    stored = gradients.lower(model, params)
    full = gradients.lower(with_numerics(model, remat="full"), params)
    once, twice = (x.compile().as_text().count(" dot(") for x in (stored, full))
    # q, k, v, out, up and gate; the result of down is not needed. In three layers of the program.
    assert twice - once >= 3 * 6
    assert "optimization_barrier" not in stored.as_text()
    assert "optimization_barrier" in full.as_text()


def test_stacking_keeps_dtypes():
    model, params = make("bfloat16_params")
    back = stack_layers(model.config, unroll_layers(model.config, jax.device_get(params)))
    assert {x.dtype for x in jax.tree.leaves(back)} == {jnp.dtype("bfloat16")}
