"""The penalty on clusters of tokens drawn before, by hand and within the decode loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.engine import decode
from jaxlm.decoding.generate import complete
from jaxlm.decoding.key_space import KeySpace
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.processors.clusters import ClusterPenalty
from jaxlm.decoding.processors.processor import Past
from tests.decoding import tiny

V = 258
SPACE = KeySpace((np.arange(V) % 40).astype(np.int32), np.zeros((40, 1), np.float32))
PROMPTS = [[5, 70, 9], [3, 3, 8, 120, 77, 6, 1]]


def penalty(gamma, space=SPACE, rows=2, size=V):
    return ClusterPenalty.make(Batch(rows, size), space, gamma)


def test_by_hand():
    """Three rows of the same text, a prompt of two tokens and two drawn; id 5 has no cluster."""
    space = KeySpace(np.array([0, 1, 0, 2, 1], np.int32), np.zeros((3, 1), np.float32))
    one = penalty([0.0, 1.5, math.inf], space, 3, 6)
    tokens = jnp.array([[3, 3, 2, 5, 1]] * 3)  # what comes after 4 of them means nothing
    past = Past(jnp.full(3, 2), jnp.full(3, 4), tokens)
    logits = jax.random.normal(jax.random.key(0), (3, 6))
    want = np.array(logits)
    want[1, [0, 2]] -= 1.5
    want[2, [0, 2]] = -np.inf
    np.testing.assert_array_equal(one(logits, past), want)
    np.testing.assert_array_equal(jax.nn.softmax(one(logits, past))[2, jnp.array([0, 2])], 0)


def say(*processors):
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS, 16)
    return [c.token_ids for c in complete(*given, processors=processors)]


def test_in_the_loop():
    """Off it changes nothing; at inf all tokens are of clusters of their own; other numbers take
    the same program.
    """
    plain = say()
    assert say(penalty(0.0)) == plain
    compiled = decode._cache_size()
    far, mixed = say(penalty(math.inf)), say(penalty([math.inf, 0.0]))
    for row in far:
        assert len({t % 40 for t in row}) == len(row)
    assert mixed == [far[0], plain[1]]
    assert decode._cache_size() == compiled
    assert plain[0] != far[0] and plain[1] != far[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gamma": -1.0}, r"gamma=-1; allowed: \[0, inf\]"),
        ({"gamma": math.nan}, "gamma=nan; allowed"),
        ({"gamma": [1.0, 2.0, 3.0]}, "gamma has 3 values; allowed: one, or 2"),
        ({"gamma": 1.0, "size": 99}, "key_space of 258 tokens; allowed: at most vocab_size=99"),
    ],
)
def test_bad_settings_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        penalty(**given)
