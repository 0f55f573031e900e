"""Scores of continuations against full logits, pair by pair, and NumPy's log-softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluation.scoring import score_continuations
from jaxlm.model.parameters import init_params
from jaxlm.model.scores import CHUNK
from jaxlm.training.compiles import count_compiles
from tests.decoding import tiny
from tests.marks import slow_but

MOST = 2 * CHUNK + 22


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)[0]


def log_probs(model, params, rows):
    """Of every next token, [8, MOST, vocab]; rows are padded on the right, which changes none."""
    tokens = np.zeros((8, MOST), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    x = np.asarray(all_logits(model, params, jnp.asarray(tokens)), np.float64)
    p = x - x.max(-1, keepdims=True)
    return p - np.log(np.exp(p).sum(-1, keepdims=True))


# A table of MOST rows: padding must not ask for more.
@pytest.mark.parametrize(
    "encoding", slow_but(["learned"], ["learned", "lm_infinite(window=8, num_sinks=2)"])
)
def test_scores_are_those_of_full_logits(encoding):
    model = tiny.model(encoding, context_length=MOST)
    params = jax.tree.map(lambda x: 3 * x, init_params(model, 0))
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (3, 9), (20, 17), (40, 1), (MOST, 30), (1, MOST), (2, 2)]
    pairs = [tuple(rng.integers(0, 256, n).tolist() for n in size) for size in sizes]
    best = log_probs(model, params, [pairs[2][0]])[0, sizes[2][0] - 1].argmax()
    pairs.append((pairs[2][0], [int(best)]))  # what greedy decoding says
    with count_compiles() as compiled:
        got = score_continuations(model, params, pairs, batch_size=3)
    assert compiled["_score"] <= 3  # by power of two of the rows' and the continuations' lengths
    rows = [[*context, *said][-(MOST + 1) :] for context, said in pairs]
    p = log_probs(model, params, [row[:-1] for row in rows])
    want, greedy = [], []
    for i, (_, said) in enumerate(pairs):
        end = len(rows[i]) - 1
        own = p[i, end - len(said) : end]
        want.append(own[np.arange(len(said)), said].sum())
        greedy.append(bool((own.argmax(-1) == said).all()))
    # float32: logits of about 30, and sums of at most 150 terms, are right to 1e-6
    np.testing.assert_allclose([score for score, _ in got], want, rtol=1e-5, atol=1e-5)
    assert [top for _, top in got] == greedy == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (([], [1]), {}, "of 0 and 1 tokens; allowed: at least 1, and 1 to max_length=64"),
        (([1], []), {}, "of 1 and 0 tokens"),
        (([1], [1] * 9), {"max_length": 8}, "of 1 and 9 tokens; .*max_length=8"),
        (([1], [1]), {"batch_size": 0}, "batch_size=0; allowed: a number >= 1"),
        (([1], [1]), {"max_length": 65}, "max_length=65; allowed: 1 to 64"),
    ],
)
def test_what_cannot_be_scored(pair, options, message):
    with pytest.raises(ValueError, match=message):
        score_continuations(tiny.model("learned"), {}, [pair], **options)
