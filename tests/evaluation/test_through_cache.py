"""Losses through a cache are those of one forward that sees what the cache keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.evaluation.loss import evaluate_loss_by_position
from jaxlm.evaluation.through_cache import losses_through_cache
from jaxlm.model.config import AttentionConfig
from tests.decoding import tiny
from tests.decoding.test_caches import ROUNDED, SETTINGS


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_one_forward(model, kind, params, tokens):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    kept = kind.init(model.config, len(tokens), tokens.shape[1] - 1).mask
    given = (tokens, at, jnp.ones_like(at))
    hidden, _ = model.apply({"params": params}, *given, method="hidden", kept=kept)
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
    return -jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], 2)[..., 0]


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("cache", sorted(set(SETTINGS) - set(ROUNDED)))
def test_losses_are_those_of_one_forward(cache, chunk):
    """A text whose last chunk is not full."""
    model, params = tiny.model(), tiny.params()
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 40), np.int32)
    tokens = jax.device_put(tokens)
    kind = caches.parse(SETTINGS[cache])
    want = of_one_forward(model, kind, params, tokens)
    losses = losses_through_cache(model, params, tokens, 7, kind, chunk)
    # float32 sums in another order, through softmaxes that tiny's large weights make sharp
    np.testing.assert_allclose(losses, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("length", [5, 90])
def test_loss_by_position_through_a_cache(length):
    """Of a ring, that of a model whose mask keeps as little; texts shorter and longer than what is
    read at once.
    """
    windows = np.random.default_rng(3).integers(0, 256, (2, length + 1))
    given = (tiny.params(), windows, 8)
    ring = caches.parse("ring(window=16, num_sinks=0)")
    got = evaluate_loss_by_position(tiny.model(), *given, cache=ring)
    attention = AttentionConfig(4, 2, layer_pattern=("sliding",), sliding_window=16)
    want = evaluate_loss_by_position(tiny.model(attention=attention), *given)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
