"""Draws follow the exact distribution of every setting, by a chi-square test with fixed seeds."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import gammaincc

from jaxlm.decoding.history import History
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.sampling import Sampling, sample
from tests.decoding.processors.oracles import CASES, LIMIT, STOPS, probs

N, V, TEMPERATURE = 4000, 11, 0.8
PROMPT, OUTPUT = [2, 0, 1], [4, 0, 4, 1, 0]
LOGITS = np.array([1.9, 0.2, -0.5, 2.0, 1.5, -1.0, 1.4, 0.9, 1.1, -0.2, 0.6])
TRUNCATIONS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# One is no choice at all.
DRAWN = {name: value for name, (_, (_, value, *_)) in CASES.items() if name[:6] != "forced"}


def draws(**settings):
    """Counts of N draws, each by a row with a seed of its own."""
    sampling = Sampling.make(Batch(N, V, STOPS, LIMIT), seed=17, **settings)
    prompts = jnp.broadcast_to(jnp.array([PROMPT]), (N, len(PROMPT))), jnp.full(N, len(PROMPT))
    history = History.begin(sampling.needs, prompts, V, len(OUTPUT))
    new = jnp.broadcast_to(jnp.array([OUTPUT]), (N, len(OUTPUT)))
    history = history.write(new, new >= 0, prompts[1])
    length = prompts[1] + len(OUTPUT)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[None], jnp.float32), (N, V))
    drawn = sample(logits, sampling, length, history.past(length - len(PROMPT), length))
    return np.bincount(np.asarray(drawn), minlength=V)


def p_value(counts, p):
    """Of counts as far from N · p as these; 0 where something was drawn that cannot be."""
    if counts[p == 0].any():
        return 0.0
    there = p > 0
    chi2 = ((counts - N * p)[there] ** 2 / (N * p[there])).sum()
    return float(gammaincc((there.sum() - 1) / 2, chi2 / 2))


def exact(name, value):
    oracle = CASES[name][0]
    if name in TRUNCATIONS:
        return probs(oracle(LOGITS / TEMPERATURE, PROMPT, OUTPUT, value))
    return probs(oracle(LOGITS, PROMPT, OUTPUT, value) / TEMPERATURE)


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_exact_distribution(name):
    p = exact(name, DRAWN[name])
    assert (p > 0).sum() > 1
    counts = draws(temperature=TEMPERATURE, **{name: DRAWN[name]})
    # 0.01 for all of them together (Bonferroni)
    assert p_value(counts, p) > 0.01 / len(DRAWN)


def test_another_distribution_is_told_from_it():
    counts = draws(temperature=TEMPERATURE, frequency_penalty=0.5)
    for name, value in (("presence_penalty", 0.5), ("frequency_penalty", 0.9), ("min_p", 0.2)):
        assert p_value(counts, exact(name, value)) < 1e-6
    assert p_value(counts, exact("frequency_penalty", 0.5)) > 0.01
