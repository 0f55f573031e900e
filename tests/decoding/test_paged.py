"""The paged cache against the dense one: what rows share is there once, and harms none of them."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.caches.dense import Dense
from jaxlm.caches.paged import Paged
from jaxlm.caches.pages import holders_of
from jaxlm.decoding.generate import generate
from tests.decoding import tiny
from tests.decoding.test_caches import attended

PAGE, ROWS, CAPACITY = 16, 4, 64
CONFIG = tiny.model().config


@jax.jit
def commit(cache, kv, positions, segment_ids):
    return cache.commit(kv, positions, segment_ids)


@jax.jit
def reorder(cache, rows):
    return cache.reorder(rows)


def tokens(seed, rows, T, counts=None, start=0):
    """Keys and values, positions, and segments that are 0 behind `counts` of each row."""
    shape = (CONFIG.num_layers, rows, T, CONFIG.num_kv_heads, CONFIG.head_dim)
    k, v = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    at = jnp.asarray(np.broadcast_to(start + np.arange(T), (rows, T)), jnp.int32)
    counts = np.full(rows, T) if counts is None else np.asarray(counts)
    there = jnp.asarray(np.arange(T) < counts[:, None], jnp.int32)
    return (jnp.asarray(k), jnp.asarray(v)), at, there


holders = jax.jit(holders_of, static_argnums=1)


def rows_of(cache):
    """What a paged cache holds, as a dense one: [layers, B, K, S, H] of keys and of values."""
    table = np.asarray(cache.table)

    def gathered(pool):
        x = np.asarray(pool)[:, table].swapaxes(2, 3)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    return [gathered(x) for x in (*cache.keys, *cache.values)]


def assert_like(cache, dense):
    np.testing.assert_array_equal(cache.lengths, dense.lengths)
    found = rows_of(cache)
    for a, b in zip(found, map(np.asarray, (*dense.keys, *dense.values)), strict=True):
        for row, length in enumerate(np.asarray(dense.lengths)):
            np.testing.assert_array_equal(a[:, row, :, :length], b[:, row, :, :length])
            assert not a[:, row, :, length:].any()  # nothing of those that had its pages before
    there = np.asarray(dense.segment_ids)[:, : cache.capacity]
    at = np.asarray(dense.positions)[:, : cache.capacity]
    np.testing.assert_array_equal(cache.segment_ids, there)
    np.testing.assert_array_equal(cache.positions, np.where(there, at, 0))
    np.testing.assert_array_equal(cache.holders, holders(cache.table, cache.holders.size))
    assert not cache.lost.any()


row_numbers = st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)
counts = st.sampled_from([1, 20]).flatmap(
    lambda T: st.tuples(st.just(T), st.lists(st.integers(0, T), min_size=ROWS, max_size=ROWS))
)
turns = st.lists(st.one_of(counts, row_numbers), min_size=1, max_size=20)


@hypothesis.given(turns)
def test_it_holds_what_the_dense_cache_holds(turns):
    """Whatever rows take in and become, with no more pages than there are entries of the table."""
    cache = Paged(PAGE).init(CONFIG, ROWS, CAPACITY)
    dense = Dense().init(CONFIG, ROWS, CAPACITY + 20)  # which has room for padding at the end
    for seed, turn in enumerate(turns):
        if isinstance(turn, list):
            cache, dense = (reorder(c, jnp.array(turn)) for c in (cache, dense))
        else:
            T, most = turn
            fitting = np.minimum(most, CAPACITY - np.asarray(dense.lengths))
            new = tokens(seed, ROWS, T, fitting)
            cache, dense = commit(cache, *new), commit(dense, *new)
        assert_like(cache, dense)


def test_rows_of_one_prompt_hold_it_once():
    """A page and a quarter; then each row's own tokens, in copies of the page that was not full."""
    prompt = tokens(0, 1, 20)
    cache, dense = (
        commit(kind.init(CONFIG, 1, 48), *prompt) for kind in (Paged(PAGE, pages=9), Dense())
    )
    page_bytes = cache.nbytes // (cache.pages + 1)
    assert cache.bytes_in_use == 2 * page_bytes
    cache, dense = (reorder(c, jnp.zeros(8, jnp.int32)) for c in (cache, dense))
    assert cache.bytes_in_use == 2 * page_bytes
    for step in (1, 2):
        new = tokens(step, 8, 1, start=19 + step)
        cache, dense = commit(cache, *new), commit(dense, *new)
        assert_like(cache, dense)
        assert cache.bytes_in_use == (1 + 8) * page_bytes
    one = reorder(cache, jnp.array([3]))
    assert one.bytes_in_use == 2 * page_bytes
    assert_like(one, reorder(dense, jnp.array([3])))


def test_a_pool_of_all_that_rows_could_need_grows_with_their_number():
    cache = Paged(PAGE).init(CONFIG, 1, 40)
    assert cache.pages == 3
    more = cache.reorder(jnp.zeros(8, jnp.int32))
    assert more.pages == more.reorder(jnp.array([3])).pages == 24
    assert more.keys[0].shape[1] == 25
    assert Paged(PAGE, pages=9).init(CONFIG, 1, 40).reorder(jnp.zeros(8, jnp.int32)).pages == 9


def test_the_last_to_write_keeps_the_page_unless_another_row_holds_it():
    cache = commit(Paged(PAGE).init(CONFIG, ROWS, CAPACITY), *tokens(0, ROWS, 1))
    cache = reorder(cache, jnp.zeros(ROWS, jnp.int32))
    (page,) = set(np.asarray(cache.table)[:, 0])
    for wrote, keeper in (([1, 1, 1, 1], 3), ([1, 0, 1, 1], 1)):
        firsts = np.asarray(commit(cache, *tokens(1, ROWS, 1, wrote)).table)[:, 0]
        assert firsts[keeper] == page and len(set(firsts)) == ROWS


def test_what_lay_in_a_page_is_gone():
    """A row that found NaN in pages given back, or in those of others, would be NaN too."""
    cache = Paged(PAGE).init(CONFIG, ROWS, CAPACITY)
    new = tokens(0, ROWS, 1)

    def spoilt(x):
        x = np.array(x)
        x[:, 1:] = np.nan
        return jnp.asarray(x)

    nan = [tuple(map(spoilt, xs)) for xs in (cache.keys, cache.values)]
    found = commit(dataclasses.replace(cache, keys=nan[0], values=nan[1]), *new)
    assert_like(found, commit(Dense().init(CONFIG, ROWS, CAPACITY + 20), *new))
    assert np.isfinite(attended(found.layer(0), ROWS)).all()


def test_a_pool_that_is_too_small():
    """An error where it is known; under jit NaN in a row that is short of a page, and it alone."""
    small = Paged(PAGE, pages=ROWS)
    cache = commit(small.init(CONFIG, ROWS, CAPACITY), *tokens(0, ROWS, 20, [15] * ROWS))
    new = tokens(1, ROWS, 20, [1, 2, 1, 1])
    with pytest.raises(ValueError, match="pages=4; allowed: more, as these tokens need more than"):
        cache.commit(*new)
    short = commit(cache, *new)
    np.testing.assert_array_equal(short.lost, [False, True, False, False])
    nan = np.isnan(attended(short.layer(0), ROWS))
    assert nan[1].all() and not nan[[0, 2, 3]].any()
    free = commit(reorder(short, jnp.array([0, 0, 1, 0])), *tokens(2, ROWS, 20, [0, 0, 1, 0]))
    np.testing.assert_array_equal(free.lost, [False, False, True, False])
    with pytest.raises(ValueError, match="49 tokens; allowed: at most capacity=48"):
        Paged(PAGE).init(CONFIG, 1, 40).commit(*tokens(0, 1, 49))
    assert small.holds([64]) and not small.holds([65])  # whatever `capacity` they were made for
    with pytest.raises(ValueError, match="pages=4; allowed: more, as these tokens need more than"):
        small.init(CONFIG, 1, 80).commit(*tokens(0, 1, 65))


@pytest.mark.parametrize("page", [0, -128, 8, 24, 130])
def test_pages_that_the_kernel_does_not_take(page):
    with pytest.raises(ValueError, match=f"page={page}; allowed: 16, 32, 64 or a multiple of 128"):
        Paged(page)
    with pytest.raises(ValueError, match="pages=0; allowed: None or an integer >= 1"):
        Paged(pages=0)


@pytest.mark.slow
def test_the_text_is_that_of_the_dense_cache():
    texts = ["it was the best of times", "no"]
    tight = "paged(page=16, pages=7)"  # four for the longer text and three for the shorter
    run = functools.partial(generate, tiny.model(), tiny.params(), tiny.TOKENIZER, texts, 30)
    assert run(cache="paged(page=16)") == run(cache=tight) == run(cache="dense")
