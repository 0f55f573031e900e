"""Far beyond what a ring holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.decoding import engine
from jaxlm.decoding.sampling import Sampling, sample
from tests.decoding import tiny

NEW = 20_000
RING = "ring(window=32, num_sinks=2, slack=6)"


@pytest.mark.slow
def test_twenty_thousand_tokens_in_a_ring_of_forty():
    """Each is drawn from what one forward of the whole text says, seen through the ring's mask."""
    model, params = tiny.model(context_length=NEW + 8), tiny.params()
    cache = caches.parse(RING).init(model.config, 1, NEW + 8)
    assert cache.positions.shape == (1, 40)
    prompt = jnp.array([[5, 70, 9, 31, 3, 3, 8, 120]])
    settings, stops = Sampling.make(1, temperature=0.5, seed=3), jnp.zeros(0, jnp.int32)
    given = (prompt, jnp.array([8]))
    state = engine.prefill(model, params, given, cache, NEW, settings, stops)
    nbytes = state.cache.nbytes
    state = engine.decode(model, params, state, jnp.asarray(NEW), settings, stops)
    assert state.cache.nbytes == nbytes
    new = np.asarray(state.tokens[:, :NEW])
    assert len(np.unique(new)) > 100

    @jax.jit
    def drawn(params, text):
        at = jnp.arange(text.shape[1])[None]
        given = (text, at, jnp.ones_like(at))
        hidden, _ = model.apply({"params": params}, *given, method="hidden", kept=cache.mask)
        logits = model.apply({"params": params}, hidden, method="logits")[0]
        rows = jax.tree.map(lambda x: jnp.repeat(x, len(logits)), settings)
        return sample(logits, rows, at[0] + 1)

    text = jnp.concatenate([prompt, jnp.asarray(new)], 1)
    want = np.asarray(drawn(params, text))[7:-1]
    # The two sum in another order: of 20,000 draws a few may have two tokens as near as that.
    assert (new[0] != want).sum() <= 4
