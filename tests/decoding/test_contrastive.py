"""Contrastive search against its formula, with a full forward for each candidate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.decoding.request import NO_TOKEN
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.search.contrastive import Contrastive
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.marks import slow_but

PROMPTS = [[5, 70, 9], [3, 3, 8, 120, 77, 6, 1]]
NEW = 14
TOP = 5  # tokens that are compared, in most tests alike, so that they share programs


def search(settings, stop=NO_TOKEN, cache="dense"):
    """The new tokens of each row."""
    width, stops = max(map(len, PROMPTS)), jnp.asarray(np.array([stop], np.int32))
    tokens = jnp.array([p + [0] * (width - len(p)) for p in PROMPTS])
    lengths = jnp.array([len(p) for p in PROMPTS])
    model, params = tiny.model(), tiny.params()
    kept = caches.parse(cache).init(model.config, len(PROMPTS), width + NEW)
    found = settings.search(
        model, params, (tokens, lengths), kept, NEW, Sampling.make(len(tokens)), stops
    )
    rows = zip(np.asarray(found.tokens[:, 0]), np.asarray(found.lengths[:, 0]), strict=True)
    return [row[:n].tolist() for row, n in rows]


@functools.partial(jax.jit, static_argnums=0)
def forward(mask, params, rows):
    """Probabilities behind each token, and its unit hidden state, of what a cache keeps."""
    model, params = tiny.model(), {"params": params}
    at = jnp.broadcast_to(jnp.arange(rows.shape[1])[None], rows.shape)
    hidden, _ = model.apply(params, rows, at, at * 0 + 1, method="hidden", kept=mask)
    probs = jax.nn.softmax(model.apply(params, hidden, method="logits"))
    return probs, hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


def slowly(settings, prompt, mask=None):
    """Equation 5 of the paper."""
    row, room = list(prompt), max(map(len, PROMPTS)) + NEW
    padded = np.zeros((TOP, room), np.int32)
    for _ in range(NEW):
        n = len(row)
        padded[:, :n] = row
        probs = np.asarray(forward(mask, tiny.params(), padded)[0][0, n - 1])
        top = np.argsort(-probs, kind="stable")[: settings.top_k]
        padded[: len(top), n] = top
        states = np.asarray(forward(mask, tiny.params(), padded)[1])
        alike = [(states[i, n] @ states[i, :n].T).max() for i in range(len(top))]
        alpha = settings.penalty_alpha
        row.append(int(top[np.argmax((1 - alpha) * probs[top] - alpha * np.array(alike))]))
    return row[len(prompt) :]


@pytest.mark.parametrize("cache", slow_but(["ring"], SETTINGS))
def test_each_token_is_the_best_by_the_formula(cache):
    settings = Contrastive(penalty_alpha=0.6, top_k=TOP)
    mask = caches.parse(SETTINGS[cache]).init(tiny.model().config, 1, 8).mask
    want = [slowly(settings, prompt, mask) for prompt in PROMPTS]
    assert search(settings, cache=SETTINGS[cache]) == want
    assert want != search(Contrastive(penalty_alpha=0.0, top_k=TOP), cache=SETTINGS[cache])


def test_without_a_penalty_it_is_greedy():
    assert search(Contrastive(0.0, TOP)) == [slowly(Contrastive(0.0, 1), p) for p in PROMPTS]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    settings = Contrastive(penalty_alpha=0.6, top_k=TOP)
    free = search(settings)
    stop = free[0][4]
    want = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert search(settings, stop) == want
    assert len({len(row) for row in want}) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"penalty_alpha": 1.5}, r"penalty_alpha=1.5; allowed: \[0, 1\]"),
        ({"penalty_alpha": float("nan")}, r"penalty_alpha=nan; allowed: \[0, 1\]"),
        ({"top_k": 0}, "top_k=0; allowed: an integer >= 1"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        Contrastive(**settings)
