"""Documents packed into one row do not see each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.model import configs
from tests.model.configs import LENGTH, logits, packed_rows, random_params, small

# Of the two documents in a row one is longer than the trained length, the other is not.
BY_LENGTH = {
    "dynamic_ntk": "rope(scaling=dynamic_ntk(factor=2, original_length=5))",
    "longrope": "rope(scaling=longrope(factor=2, original_length=5, short=(1, 1, 1, 1), "
    "long=(1, 2, 3, 4)))",
}
NAMES = ["base", "reference", "pattern", "alibi", "learned", "sink_logits", "experts", *BY_LENGTH]


def make(name):
    if name not in BY_LENGTH:
        return configs.make(name)
    model = Transformer(small(position_encoding=BY_LENGTH[name]))
    return model, random_params(abstract_params(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_document_is_what_it_is_alone(name):
    model, params = make(name)
    tokens, positions, segments = packed_rows()
    packed = logits(model, params, tokens, positions, segments)
    for start, size, segment in ((0, 5, 1), (5, 6, 2)):
        part = slice(start, start + size)
        pad = ((0, 0), (0, LENGTH - size))
        alone = [jnp.pad(a[:1, part], pad) for a in (tokens, positions)]
        mask = jnp.pad(jnp.full((1, size), segment, jnp.int32), pad)
        # Two rows, so that the program is the packed one's.
        both = [jnp.concatenate([a, a]) for a in (*alone, mask)]
        got = logits(model, params, *both)[0, :size]
        # Sums run over the same numbers in another order: rounding, as against the oracle.
        np.testing.assert_allclose(got, packed[0, part], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_other_documents_and_padding_change_nothing(name):
    """Not by one bit."""
    model, params = make(name)
    tokens, positions, segments = packed_rows()
    want = np.asarray(logits(model, params, tokens, positions, segments))
    for changed in (0, 1, 2):
        own = np.asarray(segments == changed)
        other = jnp.where(own, (tokens + 5) % 29, tokens)
        got = np.asarray(logits(model, params, other, positions, segments))
        np.testing.assert_array_equal(got[~own], want[~own])
        assert (got[own] != want[own]).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_future_changes_nothing(name):
    model, params = make(name)
    tokens, positions, segments = packed_rows()
    want = logits(model, params, tokens, positions, segments)
    got = logits(model, params, tokens.at[:, 8:].add(1) % 29, positions, segments)
    np.testing.assert_array_equal(got[:, :8], want[:, :8])
