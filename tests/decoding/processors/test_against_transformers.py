"""Logits after settings of the same names are those of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.history import History
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.sampling import Sampling, process, warm_up
from tests.decoding.processors import make_goldens as goldens


@pytest.mark.parametrize("name", goldens.CASES)
def test_as_in_transformers(name):
    with np.load(goldens.FILE) as arrays:
        file = dict(arrays)
    tokens, logits = file["tokens"].astype(np.int32), file["logits"]
    batch = Batch(goldens.ROWS, goldens.VOCAB, goldens.STOPS, goldens.LIMIT)
    settings = {"temperature": 1.0} | goldens.CASES[name]
    sampling = Sampling.make(batch, **settings)
    prompts = jnp.asarray(tokens[:, : goldens.PROMPT]), jnp.full(goldens.ROWS, goldens.PROMPT)
    drawn = goldens.LENGTH - goldens.PROMPT
    history = History.begin(sampling.needs, prompts, goldens.VOCAB, drawn)
    new = jnp.asarray(tokens[:, goldens.PROMPT :])
    history = history.write(new, jnp.ones_like(new, bool), prompts[1])
    past = history.past(jnp.full(goldens.ROWS, drawn), prompts[1] + drawn)
    processed, _ = process(jnp.asarray(logits), sampling, past)
    got = np.asarray(warm_up(processed, sampling, past))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(file[name]))
    # a few roundings of float32
    np.testing.assert_allclose(got, file[name], rtol=1e-6, atol=1e-6)
    assert (got != logits).any()
