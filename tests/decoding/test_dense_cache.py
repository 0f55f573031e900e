"""The dense cache: what is written is what is read, in slots of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.caches.dense import Dense, DenseCache
from tests.decoding import tiny


def test_commits_fill_slots_from_the_left():
    config = tiny.model().config
    cache = DenseCache.init(config, batch=3, capacity=7)
    shape = (config.num_layers, 3, 5, config.num_kv_heads, config.head_dim)
    k, v = jax.random.normal(jax.random.key(0), (2, *shape))
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        at = jnp.broadcast_to(jnp.arange(5)[None, part], (3, part.stop - part.start))
        cache = cache.commit((k[:, :, part], v[:, :, part]), at, at + 1)
    (keys,), (values,) = (
        jax.tree.map(lambda x: x.swapaxes(2, 3), a) for a in (cache.keys, cache.values)
    )
    np.testing.assert_array_equal(keys[:, :, :5], k)
    np.testing.assert_array_equal(values[:, :, :5], v)
    assert not np.any(keys[:, :, 5:])
    np.testing.assert_array_equal(cache.positions[0], [0, 1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(cache.segment_ids[2], [1, 2, 3, 4, 5, 0, 0])
    assert (cache.lengths.tolist(), cache.capacity) == ([5, 5, 5], 7)
    assert Dense().nbytes_of(config, 3, 7) == cache.nbytes
    assert cache.nbytes == 2 * 4 * config.num_layers * 3 * 7 * config.num_kv_heads * config.head_dim


def test_its_dtype_is_the_models_and_its_buffers_are_distinct():
    config = tiny.model().config
    config = config.replace(numerics=type(config.numerics)(dtype="bfloat16"))
    cache = DenseCache.init(config, 1, 4)
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {jnp.dtype("bfloat16")}
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    assert len(set(pointers)) == len(pointers)
    with pytest.raises(ValueError, match="capacity=0; allowed"):
        DenseCache.init(config, 1, 0)


def test_more_tokens_than_it_holds():
    """An error where the numbers are known; under jit NaN, which nobody takes for an answer."""
    config = tiny.model().config
    cache = DenseCache.init(config, batch=1, capacity=4)
    kv = jnp.ones((config.num_layers, 1, 3, config.num_kv_heads, config.head_dim))
    at = jnp.arange(3)[None]
    cache = cache.commit((kv, kv), at, at + 1)
    assert np.isfinite(cache.keys[0]).all()
    with pytest.raises(ValueError, match="6 tokens; allowed: at most capacity=4"):
        cache.commit((kv, kv), at + 3, at + 4)
    over = jax.jit(DenseCache.commit)(cache, (kv, kv), at + 3, at + 4)
    assert np.isnan(over.keys[0]).any() and np.isnan(over.values[0]).any()
