"""Sampling against exact distributions, worked out slowly in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.decoding.processors.truncation import truncate
from jaxlm.decoding.sampling import Sampling, sample


def kept(logits, top_k, top_p):
    """Indices that survive: sort, keep k (ties of the kth too), keep until the mass reaches p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        kth = logits[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if logits[i] >= kth]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    mass, chosen = 0.0, []
    for i, q in zip(order, p, strict=True):
        if mass >= top_p:
            break
        chosen.append(i)
        mass += q
    lowest = min(logits[i] for i in chosen)
    return {i for i in order if logits[i] >= lowest}  # equal logits stay together


@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    st.integers(0, 14),
    st.floats(0.05, 1.0),
)
def test_truncate_against_the_definition(values, top_k, top_p):
    logits = np.asarray(values, np.float64) / 2
    # One shape, whose programs are few: what is impossible changes nothing.
    padded = np.pad(logits, (0, 12 - len(logits)), constant_values=-np.inf)
    cut = truncate(
        jnp.asarray(padded[None], jnp.float32),
        jnp.asarray([top_k]),
        jnp.asarray([top_p], jnp.float32),
    )
    got = set(np.flatnonzero(np.isfinite(cut[0])).tolist())
    # Where p falls on a cumulated mass to within float32, either answer is right.
    allowed = [kept(logits, top_k, np.clip(top_p + e, 1e-9, 1)) for e in (-1e-6, 0, 1e-6)]
    assert got in allowed
    np.testing.assert_array_equal(np.asarray(cut)[0, list(got)], logits[list(got)])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 4, 1.0), (2.0, 5, 0.7)]
)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    logits = np.array([1.0, 0.2, -0.5, 2.0, 0.0, -3.0, 1.4, 0.9])
    warm = logits / temperature
    alive = sorted(kept(warm, top_k, top_p))
    p = np.zeros(8)
    p[alive] = np.exp(warm[alive])
    p /= p.sum()
    n = 4000
    sampling = Sampling.make(n, temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    drawn = sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 8)), sampling, jnp.full(n, 3)
    )
    counts = np.bincount(np.asarray(drawn), minlength=8)
    assert counts[p == 0].sum() == 0
    chi2 = (((counts - n * p) ** 2)[alive] / (n * p[alive])).sum()
    # 99.99 % quantiles of chi-square with 1 … 7 degrees of freedom
    bound = [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88][len(alive) - 2]
    assert chi2 < bound


def test_rows_have_settings_of_their_own():
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    mixed = Sampling.make(4, temperature=[0, 1, 1, 0], top_k=[0, 1, 0, 0], seed=[1, 2, 3, 4])
    drawn = np.asarray(sample(logits, mixed, jnp.arange(4)))
    best = np.asarray(logits.argmax(-1))
    assert (drawn[[0, 1, 3]] == best[[0, 1, 3]]).all()
    for row in range(4):
        settings = jax.tree.map(lambda a, row=row: a[row : row + 1], mixed)
        alone = sample(logits[row : row + 1], settings, jnp.asarray([row]))
        assert int(alone[0]) == drawn[row]


def test_top_p_of_1_cuts_nothing_whatever_the_other_rows_use():
    """The mass before the rarest of many tokens is rounded to 1 and more."""
    logits = jax.random.normal(jax.random.key(1), (2, 30_000)) * 4
    probs = jax.nn.softmax(-jnp.sort(-logits), axis=-1)
    assert bool((jnp.cumsum(probs, axis=-1) - probs >= 1).any())  # else this shows nothing
    cut = truncate(logits, jnp.array([0, 0]), jnp.array([1.0, 0.5]))
    np.testing.assert_array_equal(cut[0], logits[0])
    assert not np.isfinite(cut[1]).all()
    cut = truncate(logits, jnp.array([7, 0]), jnp.array([1.0, 1.0]))
    assert np.isfinite(cut).sum(-1).tolist() == [7, 30_000]


@pytest.mark.parametrize("top_p", [1e-46, 1e-40, 0, -1, 1.01, float("nan")])
def test_a_top_p_that_float32_has_not_is_refused(top_p):
    """It would count as 0: no token would be left, and the first of the vocabulary drawn."""
    with pytest.raises(ValueError, match=r"top_p=.*; allowed: \[1.175494351e-38, 1\]"):
        Sampling.make(2, temperature=1, top_p=[0.5, top_p])


def test_the_smallest_top_p_keeps_the_most_probable_token():
    logits = jax.random.normal(jax.random.key(0), (1, 50))
    smallest = Sampling.make(1, temperature=1, top_p=float(np.finfo(np.float32).tiny))
    assert int(sample(logits, smallest, jnp.arange(1))[0]) == int(logits.argmax())


def test_a_draw_depends_on_seed_and_position():
    logits = jnp.zeros((64, 1000))
    one = Sampling.make(64, temperature=1, seed=[7] * 64)
    by_position = np.asarray(sample(logits, one, jnp.arange(64)))
    assert len(set(by_position.tolist())) > 50
    np.testing.assert_array_equal(by_position, sample(logits, one, jnp.arange(64)))
    same = np.asarray(sample(logits, one, jnp.zeros(64, jnp.int32)))
    assert len(set(same.tolist())) == 1
