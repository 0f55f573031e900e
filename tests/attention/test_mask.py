"""The mask algebra against dense arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.attention.mask import AttentionMask, Interval, causal, chunked
from tests.attention.cases import MASKS

LENGTH = 24


# Chunk lengths divide one another, so that any two intervals can be combined. Strategies draw plain
# dictionaries: the run-time type checker uses `random`, which Hypothesis forbids while it draws.
bounds = st.lists(
    st.fixed_dictionaries(
        {
            "ahead": st.sampled_from([None, 0, 3]),
            "window": st.sampled_from([None, 1, 5]),
            "below": st.sampled_from([None, 0, 2, 9]),
            "chunk": st.sampled_from([None, 2, 4, 8]),
        }
    ),
    min_size=1,
    max_size=3,
)


def union(bounds):
    return AttentionMask(tuple(Interval(**each) for each in bounds))


def dense(mask):
    positions = jnp.arange(LENGTH)
    return np.asarray(mask.to_dense(positions, positions))


@given(bounds, bounds)
def test_and_is_intersection_or_is_union(a, b):
    a, b = union(a), union(b)
    np.testing.assert_array_equal(dense(a & b), dense(a) & dense(b))
    np.testing.assert_array_equal(dense(a | b), dense(a) | dense(b))


@given(bounds, st.lists(st.integers(0, LENGTH - 1), min_size=4, max_size=4))
def test_touches_and_covers_never_err_on_the_wrong_side(mask, ends):
    mask = union(mask)
    (i, i_end), (j, j_end) = sorted(ends[:2]), sorted(ends[2:])
    tile = dense(mask)[i : i_end + 1, j : j_end + 1]
    assert mask.touches(i, i_end, j, j_end) or not tile.any()
    assert not mask.covers(i, i_end, j, j_end) or tile.all()


@given(bounds, st.integers(0, LENGTH - 1), st.integers(0, LENGTH - 1))
def test_touches_and_covers_are_exact_on_a_single_pair(mask, i, j):
    mask = union(mask)
    seen = dense(mask)[i, j]
    assert mask.touches(i, i, j, j) == seen
    assert mask.covers(i, i, j, j) == seen


@pytest.mark.parametrize("name", MASKS)
def test_constructors_match_their_formula(name):
    mask, formula = MASKS[name]
    i = np.arange(80)
    positions = jnp.arange(80)
    want = formula(i[:, None], i[None, :])
    np.testing.assert_array_equal(mask.to_dense(positions, positions), want)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("ahead", -1, 0), ("window", 0, 1), ("below", -1, 0), ("chunk", 0, 1)],
)
def test_bad_bounds_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}={value}.*>= {allowed}"):
        Interval(**{field: value})


def test_chunks_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match=r"chunk=4 & chunk=6.*one must divide the other"):
        causal() & chunked(4) & chunked(6)


def test_equal_masks_are_equal_keys():
    assert hash(causal() & chunked(4)) == hash(chunked(4) & causal())
    assert causal() | causal() == causal()


def test_empty_union_is_refused():
    with pytest.raises(ValueError, match="at least one Interval"):
        AttentionMask(())
