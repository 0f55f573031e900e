"""A step of decoding reads and writes its cache where it lies."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm import caches
from jaxlm.decoding import engine
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.config import NumericsConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.transformer import Transformer
from tests.decoding import tiny
from tests.marks import slow_but

SLOTS = 8192
RING = f"ring(window={SLOTS - 20})"


@pytest.mark.parametrize(
    "cache", slow_but([RING, "quantized(group=16)"], ["dense", RING, "quantized(group=16)"])
)
def test_no_layer_of_a_cache_is_copied(cache):
    """Layers apart: less than one layer's keys beside the arguments, which are donated."""
    scanned = tiny.model(context_length=SLOTS)
    model = Transformer(scanned.config.replace(numerics=NumericsConfig(scan_layers=False)))
    params = unroll_layers(scanned.config, tiny.params())
    kept = caches.parse(cache).init(model.config, 1, SLOTS)
    rest = (Sampling.make(1), jnp.zeros(0, jnp.int32))
    prompt = (jnp.ones((1, 16), jnp.int32), jnp.array([16]))
    state = engine.prefill(model, params, prompt, kept, 32, *rest)
    leaves, tree = jax.tree.flatten(state)

    def decode(params, leaves):
        state = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(engine.decode(model, params, state, jnp.asarray(32), *rest))

    compiled = jax.jit(decode, donate_argnums=1).lower(params, leaves).compile()
    keys = SLOTS * model.config.num_kv_heads * model.config.head_dim * 4
    assert compiled.memory_analysis().temp_size_in_bytes < keys
