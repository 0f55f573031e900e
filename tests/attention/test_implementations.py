"""Every implementation of attention against the float64 oracle, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.attention import oracle
from tests.attention.cases import (
    IMPLEMENTATIONS,
    Case,
    assert_close,
    build,
    cases,
    value_and_gradients,
)
from tests.marks import slow_but

every = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def weights(problem):
    out, lse = oracle.attend(problem)
    rng = np.random.default_rng(7)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape) * np.isfinite(lse)
    return out, lse, d_out.astype(np.float32), d_lse.astype(np.float32)


def check(name, case):
    spec, x, problem = build(case)
    out, lse, d_out, d_lse = weights(problem)
    (got_out, got_lse), grads = value_and_gradients(
        IMPLEMENTATIONS[name], spec, x, jnp.asarray(d_out), jnp.asarray(d_lse)
    )
    assert got_out.dtype == x.q.dtype and got_lse.dtype == jnp.float32
    assert_close(got_out, out, "out")
    blind = np.isneginf(lse)
    assert (np.asarray(got_lse)[blind] < -1e38).all()
    assert (np.asarray(got_out)[blind] == 0).all()
    assert_close(np.where(blind, 0.0, got_lse), np.where(blind, 0.0, lse), "lse")
    want = oracle.gradients(problem, d_out.astype(np.float64), d_lse.astype(np.float64))
    assert sorted(grads) == sorted(want)
    for array, gradient in grads.items():
        assert_close(gradient, want[array], f"gradient of {array}")


MUCH = Case(mask="lambda", ceiling=10, far=True, score="table", softcap=2.5, sinks=True)


@every
@pytest.mark.parametrize(
    "case",
    [
        MUCH,
        Case(mask="prefix", score="multiplicative", sizes=(1, 97, 97, 6, 2, 4)),
        Case(mask="sinks", score="by_query", aligned=False, sizes=(2, 7, 61, 4, 2, 8)),
    ],
    ids=lambda case: case.mask,
)
def test_chosen_cases(name, case):
    check(name, case)


@pytest.mark.parametrize("name", slow_but(["blockwise_small_tiles"], IMPLEMENTATIONS))
@given(case=cases())
@settings(max_examples=6)
def test_drawn_cases(name, case):
    check(name, case)


@pytest.mark.slow
@every
@given(case=cases())
@settings(max_examples=250, derandomize=False)
def test_many_drawn_cases(name, case):
    check(name, case)
    jax.clear_caches()  # a process may hold so many compiled programs and no more


UNIT = 2.0**-8  # largest relative rounding of bfloat16, which has eight significant bits


@every
def test_bfloat16_stays_within_its_roundings(name):
    """Inputs are exact in bfloat16, so only what is stored in it between two products rounds.

    out: p (or p / sum) and the result, each to UNIT. Gradients: p, ds and the result to UNIT; and
    ds = p·(do·v - do·out) sees the rounding of the saved out.
    """
    spec, x, problem = build(Case(mask="lambda", sizes=(1, 97, 97, 4, 2, 8)))
    arrays, wide = {}, dict(problem.arrays)
    for array in ("q", "k", "v"):
        arrays[array] = getattr(x, array).astype(jnp.bfloat16)
        wide[array] = np.asarray(arrays[array], np.float64)
    x, problem = dataclasses.replace(x, **arrays), dataclasses.replace(problem, arrays=wide)
    out, lse, d_out, _ = weights(problem)
    d_out = np.asarray(jnp.asarray(d_out).astype(jnp.bfloat16), np.float64)
    (got, got_lse), grads = value_and_gradients(
        IMPLEMENTATIONS[name], spec, x, jnp.asarray(d_out, jnp.bfloat16), jnp.zeros(lse.shape)
    )
    assert got.dtype == jnp.bfloat16 and got_lse.dtype == jnp.float32
    assert_close(np.where(np.isneginf(lse), 0, got_lse), np.where(np.isneginf(lse), 0, lse))
    want = oracle.gradients(problem, d_out, np.zeros(lse.shape))
    bounds = oracle.rounding_bounds(problem, d_out, UNIT)
    for array, exact in {"out": out, **{n: want[n] for n in ("q", "k", "v")}}.items():
        error = np.abs(np.asarray(got if array == "out" else grads[array], np.float64) - exact)
        # float32's own roundings come on top, a thousandth of bfloat16's.
        assert (error <= 1.01 * bounds[array] + 1e-6).all(), array


@every
def test_twice_is_bit_equal(name):
    spec, x, _ = build(MUCH)
    args = (IMPLEMENTATIONS[name], spec, x, x.q, x.q[..., 0])
    jax.tree.map(
        np.testing.assert_array_equal, value_and_gradients(*args), value_and_gradients(*args)
    )
