"""Losses through a cache are those of one forward that sees what the cache keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.evaluation.through_cache import losses_through_cache
from tests.decoding import tiny
from tests.decoding.test_caches import ROUNDED, SETTINGS


@pytest.mark.parametrize("cache", sorted(set(SETTINGS) - set(ROUNDED)))
def test_losses_are_those_of_one_forward(cache):
    model, params = tiny.model(), tiny.params()
    tokens = jax.random.randint(jax.random.key(2), (2, 40), 0, model.config.vocab_size)
    kept = caches.parse(SETTINGS[cache]).init(model.config, 2, 40)
    losses = losses_through_cache(model, params, tokens, 7, kept)
    at = jnp.broadcast_to(jnp.arange(40)[None], tokens.shape)
    given = (tokens, at, jnp.ones_like(at))
    hidden, _ = model.apply({"params": params}, *given, method="hidden", kept=kept.mask)
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
    want = -jnp.take_along_axis(log_probs[:, 6:-1], tokens[:, 7:, None], 2)[..., 0]
    # float32 sums in another order, through softmaxes that tiny's large weights make sharp
    np.testing.assert_allclose(losses, want, rtol=0, atol=1e-3)
