"""Attention to an encoder's output against plain loops in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.cross_attention import CrossAttention, Source
from tests.model.configs import random_params, small

CASES = {
    "grouped": {},
    "biases": {"qkv_bias": True, "out_bias": True, "num_kv_heads": None},
    "scale_and_softcap": {"scale": 0.7, "softcap": 0.9, "head_dim": 12},
    "reference": {"implementation": "reference"},
}


def given(name):
    """The config, a decoder's states [2, 5, D], an encoder's [2, 9, D], and segments of both."""
    config = small(attention={"layer_pattern": ("crossed",), **CASES[name]})
    keys = jax.random.split(jax.random.key(0))
    x, hidden = (jax.random.normal(k, (2, n, 32)) for k, n in zip(keys, (5, 9), strict=True))
    ids = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 3]])  # the last one sees nothing
    source = Source(jnp.array([[1] * 4 + [2] * 5, [1] * 6 + [0] * 3]), hidden)
    module = CrossAttention(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, ids, source)["params"]
    params = random_params(jax.tree.map(lambda b: b.value, shapes, is_leaf=is_box))
    return config, module, params, (x, ids, source)


def is_box(x):
    return hasattr(x, "unbox")


def oracle(config, p, x, ids, source):
    a, out = config.attention, []
    encoded = (np.asarray(source.hidden), np.asarray(source.segment_ids))
    for row, own, hidden, others in zip(x, ids, *encoded, strict=True):
        q, k, v = (
            np.einsum("td,dnh->tnh", y, p[n]["kernel"]) + p[n].get("bias", 0.0)
            for n, y in (("q", row), ("k", hidden), ("v", hidden))
        )
        mixed = np.zeros_like(q)
        for t, n in np.ndindex(q.shape[:2]):
            seen = [s for s in range(len(hidden)) if others[s] == own[t] and others[s]]
            group = n * k.shape[1] // q.shape[1]
            scores = np.array([q[t, n] @ k[s, group] for s in seen])
            scores = scores * (config.head_dim**-0.5 if a.scale is None else a.scale)
            if a.softcap is not None:
                scores = a.softcap * np.tanh(scores / a.softcap)
            if seen:
                weights = np.exp(scores) / math.fsum(np.exp(scores))
                mixed[t, n] = weights @ v[seen, group]
        out.append(np.einsum("tnh,nhd->td", mixed, p["out"]["kernel"]) + p["out"].get("bias", 0.0))
    return np.array(out)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracle(name):
    config, module, params, arrays = given(name)
    got, (keys, values) = module.apply({"params": params}, *arrays)
    exact = jax.tree.map(lambda y: np.asarray(y, np.float64), params)
    want = oracle(config, exact, *map(np.asarray, arrays[:2]), arrays[2])
    # float32: sums of 32 terms, three products one after another.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    # The keys and values that it gives take the place of what they were made of.
    kept = dataclasses.replace(arrays[2], hidden=None, keys=keys, values=values)
    again, _ = module.apply({"params": params}, *arrays[:2], kept)
    np.testing.assert_allclose(again, got, rtol=0, atol=2e-6 * np.abs(want).max())
