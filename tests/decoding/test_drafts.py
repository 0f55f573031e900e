"""Drafts change how many tokens come at a time, and never which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.decoding import engine
from jaxlm.decoding.drafters.plain import PLAIN
from jaxlm.decoding.processors import chain
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.request import NO_TOKEN
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.tree import Draft, ancestors
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.marks import slow_but

PROMPTS = [[5, 70, 9], [3, 3, 8, 120, 77, 6, 1]]
NEW = 30


@dataclasses.dataclass(frozen=True)
class Foreknown:
    """Three guesses of the next token, one of them right, and two of the one after; but at every
    fourth position none is right.

    Attributes:
        texts: all tokens of each row, by position.
    """

    texts: tuple[tuple[int, ...], ...]
    depth: int = 2

    def propose(self, last, lengths):
        texts = jnp.asarray(self.texts)
        at = lengths[:, None] + jnp.arange(2)[None]
        right = jnp.take_along_axis(texts, jnp.minimum(at, texts.shape[1] - 1), 1)
        right = jnp.where(at % 4 == 0, 0, right)
        one, two = right[:, :1], right[:, 1:]
        tokens = jnp.concatenate([last[:, None], one + 1, one, one + 2, two, two + 1], 1)
        parents = jnp.broadcast_to(jnp.array([[-1, 0, 0, 0, 2, 2]]), tokens.shape)
        return Draft(tokens, parents, jnp.ones_like(tokens, bool), self.depth)


def draw(cache, encoding, settings, drafter=PLAIN, stops=()):
    """The new tokens of each row, and how many steps they took."""
    model, params = tiny.model(encoding), tiny.params(encoding)
    width = max(map(len, PROMPTS))
    tokens = np.array([p + [0] * (width - len(p)) for p in PROMPTS], np.int32)
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    # As large with drafts as without, and as many stop tokens: most programs are then the same.
    cache = caches.parse(cache).init(model.config, len(PROMPTS), width + NEW + Foreknown.depth)
    batch = Batch(len(PROMPTS), model.config.vocab_size, tuple(stops), NEW)
    stops = np.array(stops or (NO_TOKEN,), np.int32)
    sampling = Sampling.make(batch, **settings)
    rest = (sampling, stops, drafter)
    state = engine.prefill(model, params, (tokens, lengths), cache, NEW, *rest)
    state = engine.decode(model, params, state, jnp.asarray(NEW), *rest)
    rows = zip(np.asarray(state.tokens), np.asarray(state.drawn), strict=True)
    return [row[:n] for row, n in rows], int(state.steps)


def foreknown(new):
    """A drafter that has seen these tokens."""
    texts = [[*p, *map(int, t)] for p, t in zip(PROMPTS, new, strict=True)]
    longest = max(map(len, texts))
    return Foreknown(tuple(tuple(t + [0] * (longest - len(t))) for t in texts))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 3}


ENCODINGS = [("rope", {}), ("alibi", {}), ("learned", {}), ("nope", SAMPLED)]
# Every cache, and every encoding on one that keeps all and on one that forgets.
PAIRS = [(cache, "rope", SAMPLED) for cache in SETTINGS]
PAIRS += [("dense", *one) for one in ENCODINGS]
PAIRS += [("ring", *one) for one in ENCODINGS[1:]]
KEPT = [("quantized", "rope", SAMPLED), ("ring", "rope", SAMPLED), ("dense", "alibi", {})]


@pytest.mark.parametrize(("cache", "encoding", "settings"), slow_but(KEPT, PAIRS))
def test_the_same_tokens_in_fewer_steps(cache, encoding, settings):
    plain, steps = draw(SETTINGS[cache], encoding, settings)
    fast, fewer = draw(SETTINGS[cache], encoding, settings, foreknown(plain))
    same(plain, fast)
    assert steps == NEW - 1
    # Of four positions three are foreknown, two at most a step; rows wait for the slower one.
    assert fewer <= steps * 2 / 3


# Of every processor one row at least wants something; what is drawn shows it.
PROCESSED = SAMPLED | {
    "repetition_penalty": [1.5, 1.0],
    "frequency_penalty": [0.0, 0.4],
    "presence_penalty": 0.3,
    "no_repeat_ngram_size": [2, 1],
    "min_new_tokens": [20, 5],
    "logit_bias": {ord(" "): 9.0, ord("e"): 9.0, ord("t"): 8.0, ord("a"): 8.0},
    "sequence_bias": [{(ord("e"), ord("a")): 5.0}, None],
    "bad_words_ids": [[ord(" ")] * 2, [ord("e"), ord("t")], [ord("a"), ord(" "), ord("e")]],
    "allowed_token_ids": [list(range(160)), None],
    "suppress_tokens": [None, list(range(40, 90))],
    "begin_suppress_tokens": [ord("e")],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": [200, None],
    "min_p": [0.01, 0.0],
    "typical_p": [0.9, 1.0],
    "epsilon_cutoff": [0.0, 0.01],
    "eta_cutoff": [0.001, 0.01],
}


def add_to_last(logits, past):
    rows = jnp.arange(logits.shape[0])
    return logits.at[rows, past.tokens[rows, past.lengths - 1] // 2].add(3.0)


def test_processors_see_what_a_draft_has_on_its_way():
    assert set(PROCESSED) >= set(chain.available())
    settings, stops = PROCESSED | {"processors": [add_to_last]}, [ord("t")]
    plain, steps = draw("dense", "rope", settings, stops=stops)
    fast, fewer = draw("dense", "rope", settings, foreknown(plain), stops)
    same(plain, fast)
    assert fewer < steps and plain[0][-1] in (200, ord("t"))


def test_a_stop_token_within_a_draft_ends_its_row():
    plain, _ = draw("dense", "rope", SAMPLED)
    stop = int(plain[0][10])
    want = [row[: list(row).index(stop) + 1] if stop in row else row for row in plain]
    for drafter in (PLAIN, foreknown(plain)):
        same(want, draw("dense", "rope", SAMPLED, drafter, [stop])[0])


def test_nodes_see_their_way_from_the_root():
    parents = np.array([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 0]], np.int32)
    ones = np.ones_like(parents)
    given = (jnp.asarray(x) for x in (ones, parents, ones == 1))
    depths, way = map(np.asarray, jax.jit(ancestors)(Draft(*given, depth=3)))
    np.testing.assert_array_equal(depths, [[0, 1, 1, 2, 3], [0, 1, 2, 3, 1]])
    np.testing.assert_array_equal(way[0, 4], [True, True, False, True, True])
    np.testing.assert_array_equal(way[1, 4], [True, False, False, False, True])
