"""Each encoding against its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import positions
from jaxlm.positions import Dimensions
from jaxlm.positions.alibi import geometric_slopes
from jaxlm.positions.rope_alibi import TABLE_LENGTH, harmonic
from jaxlm.positions.sandwich import inner_product
from jaxlm.positions.sinusoidal import sinusoids
from jaxlm.positions.t5 import bucket

DIMENSIONS = Dimensions(num_heads=4, head_dim=8, d_model=32, context_length=64)


def bind(text):
    return positions.parse(text).bind(DIMENSIONS)


LONGROPE = "rope(scaling=longrope(factor=2, long=(1, 2, 3, 4), {}))"


def rotated(encoding, x, at):
    """x [head_dim] as a query and as a key at position `at` of a document of 6000 tokens."""
    x = jnp.asarray(x, jnp.float32)[None, None, None]
    where = jnp.asarray([[at]])
    turn = encoding.rotation(where, jnp.full_like(where, 6000), x.shape[-1])
    q, k = encoding.rotate_queries(x, turn), encoding.rotate_keys(x, turn)
    return np.asarray(q[0, 0, 0], np.float64), np.asarray(k[0, 0, 0], np.float64)


# --- ALiBi


def test_alibi_slopes_of_8_and_12_heads():
    np.testing.assert_array_equal(geometric_slopes(8), [2.0**-i for i in range(1, 9)])
    by_hand = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(geometric_slopes(12), by_hand, rtol=1e-7)


@given(st.integers(1, 200))
def test_alibi_has_a_distinct_slope_for_any_head_count(heads):
    slopes = geometric_slopes(heads)
    assert slopes.shape == (heads,) and len(set(slopes)) == heads
    assert (slopes > 0).all() and (slopes < 1).all()


def test_alibi_is_exact_on_long_rows():
    alibi = bind("alibi")
    d = jnp.asarray([[10**6, 10**6 + 1]])
    out = alibi.bias(alibi.head_parameters({}, 8)[0], d, d)
    np.testing.assert_array_equal(out, -0.5 * np.asarray(d, np.float32))


# --- T5


def test_t5_buckets():
    d = jnp.asarray([*range(16), 127, 128, 10**6, -3])
    got = np.asarray(bucket(d, 32, 128))
    np.testing.assert_array_equal(got, [*range(16), 31, 31, 31, 0])
    every = np.asarray(bucket(jnp.arange(200), 32, 128))
    assert (np.diff(every) >= 0).all() and set(every) == set(range(32))


def test_t5_buckets_of_both_sides():
    """Of transformers' T5Attention._relative_position_bucket(bidirectional=True), 8 and 20."""
    encoding = bind("t5(num_buckets=8, max_distance=20, bidirectional=True)")
    d = jnp.asarray([[0, 1, 2, 5, 6, 7, 30, -1, -2, -5, -6, -7, -30]])
    got = encoding.bias(jnp.arange(8.0), d, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_array_equal(got[0], [0, 1, 2, 2, 2, 3, 3, 5, 6, 6, 6, 7, 7])


def test_learned_counts_from_its_offset():
    encoding = bind("learned(table_length=6, offset=2)")
    table = {"table": jnp.arange(6.0)[:, None]}
    got = encoding.embed(table, jnp.zeros((1, 4, 1)), jnp.array([[0, 3, 4, 1]]))
    np.testing.assert_array_equal(got[0, :, 0], [2, 5, np.nan, 3])
    assert encoding.max_length == 4


@pytest.mark.parametrize(
    "text, part",
    [
        ("t5(num_buckets=10, bidirectional=True)", "num_buckets=10; allowed: a multiple of 4 >= 8"),
        ("learned(offset=-1)", "offset"),
        ("learned(table_length=2, offset=2)", "table_length=2; allowed: an integer >= 3"),
        ("t5(num_buckets=5)", "num_buckets"),
        ("t5(num_buckets=2)", "num_buckets"),
        ("t5(max_distance=16)", "max_distance"),
        ("rope(fraction=0.4)", "fraction"),
        ("rope(base=1)", "base"),
        ("rope(scaling=yarn(factor=0.5))", "factor"),
        ("rope(scaling=4)", "scaling"),
        ("kerple(kind=cubic)", "kind"),
        ("rope_alibi(slopes=steep)", "slopes"),
        ("sandwich(width=3)", "width"),
        ("fire(threshold=0)", "threshold"),
        ("learned(table_length=0)", "table_length"),
        ("lm_infinite(window=0)", "window"),
        ("lm_infinite(num_sinks=-1)", "num_sinks"),
        ("lm_infinite(window=9, ceiling_distance=8)", "ceiling_distance"),
        ("lm_infinite(learned)", "inner"),
        ("lm_infinite(sinusoidal)", "inner"),
        ("lm_infinite(lm_infinite)", "inner"),
        ("lm_infinite(fire)", "inner"),
        ("t5(max_distance=2147483648)", "max_distance"),
        ("rope(base=1e999)", "base"),
        ("rope(fraction=0.25, scaling=ntk(factor=2))", "ntk: rotated dims=2; allowed: .* >= 4"),
        (
            "rope(fraction=0.25, scaling=dynamic_ntk(factor=2, original_length=8))",
            "dynamic_ntk: rotated dims=2",
        ),
        ("rope(scaling=linear(factor=1e999))", "linear: factor=inf"),
        ("rope(scaling=yarn(factor=2, original_length=1))", "yarn: original_length=1"),
        ("rope(scaling=yarn(factor=2, original_length=4294967296))", "yarn: original_length"),
        ("rope(scaling=yarn(factor=2, original_length=8, beta_slow=0))", "yarn: beta_slow=0"),
        ("rope(scaling=yarn(factor=2, original_length=8, beta_fast=0.5))", "yarn: beta_fast=0.5"),
        (
            "rope(scaling=yarn(factor=2, original_length=8, attention_factor=-1.0))",
            "yarn: attention_factor=-1.0",
        ),
        (LONGROPE.format("original_length=1, short=(1, 1, 1, 1)"), "longrope: original_length=1"),
        (LONGROPE.format("original_length=8, short=(1, 1, 0, 1)"), "longrope: short="),
        (LONGROPE.format("original_length=8, short=(1, 1)"), "has 2 numbers; allowed: 4"),
        (
            LONGROPE.format("original_length=8, short=(1, 1, 1, 1), attention_factor=0"),
            "longrope: attention_factor=0",
        ),
        (
            "rope(scaling=llama3(factor=2, original_length=8, low_frequency_factor=4))",
            "llama3: high_frequency_factor=4.0; allowed: a number > low_frequency_factor=4",
        ),
        (
            "rope(scaling=llama3(factor=2, original_length=8, low_frequency_factor=0))",
            "llama3: low_frequency_factor=0",
        ),
        ("alibi(scale=0)", "alibi: scale=0; allowed: a number > 0"),
        ("xpos(gamma=0)", "xpos: gamma=0"),
        ("xpos(scale_base=0)", "xpos: scale_base=0"),
        ("xpos(fraction=0.4)", "xpos: fraction"),
        ("rope_alibi(strength=-1)", "strength=-1"),
        ("rope_alibi(strength=1e999)", "strength=inf"),
        ("sandwich(base=-1)", "sandwich: base=-1"),
        ("sinusoidal(base=1e999)", "sinusoidal: base=inf"),
        ("sinusoidal(scale=0)", "sinusoidal: scale=0"),
        ("fire(threshold=1e999)", "threshold=inf"),
        ("lm_infinite(window=2147483648)", "window=2147483648"),
        ("lm_infinite(num_sinks=2147483648)", "num_sinks=2147483648"),
        ("lm_infinite(ceiling_distance=2147483648)", "ceiling_distance=2147483648"),
    ],
)
def test_values_out_of_range_name_the_field(text, part):
    with pytest.raises(ValueError, match=part):
        bind(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ropee", "did you mean rope"),
        ("RoPE", r"position_encoding='RoPE' \(did you mean rope\?\)"),
        ("RoPE(base=3)", r"did you mean rope\?"),
        ("nope(3)", r"nope: 1 values without a name; allowed: 0 \(none\)"),
        ("alibi(1, 2, 3)", r"alibi: 3 values without a name; allowed: 1 \(scale"),
        ("rope(1e4, 1.0, False, None, 5, 6)", r"rope: 6 values .* allowed: 4 \(base, fraction"),
        ("rope(500000, base=3)", "rope: base=3 given again; allowed: each option once"),
        ("rope(base=3, base=3)", "rope: base=3 given again|keyword argument repeated|allowed"),
        ("rope(**{})", r"allowed: options without \* and \*\*"),
        ("rope(*(3, 4))", r"allowed: options without \* and \*\*"),
        (
            "rope(scaling=yarn)",
            r"yarn: factor, original_length missing; allowed: yarn\(factor=…, o",
        ),
        ("rope(scaling=yarn(factor=2))", "yarn: original_length missing"),
        ("rope(scaling=linear())", "linear: factor missing"),
        ("rope(scaling=longrope(2, 8))", "longrope: short, long missing"),
        (
            "rope(scaling=yarm(factor=2))",
            r"rope: scaling='yarm' \(did you mean yarn\?\); allowed: d",
        ),
        ("rope(scaling=alibi)", "rope: scaling='alibi'; allowed: dynamic_ntk, linear"),
        ("rope(scaling=alibi())", "rope: scaling='alibi'; allowed: dynamic_ntk, linear"),
        ("lm_infinite(rop)", r"lm_infinite: inner='rop' \(did you mean rope\?\); allowed: alibi"),
        ("lm_infinite(RoPE(base=3))", r"lm_infinite: inner='RoPE' \(did you mean rope\?\)"),
        ("lm_infinite(linear)", "lm_infinite: inner='linear'.*allowed: alibi"),
        ("lm_infinite(3)", "lm_infinite: inner=3; allowed: alibi"),
        ("kerple(kind=rope)", "kerple: kind='rope'; allowed: log, power"),
        ("rope(base={[]: 1})", "rope: base={\\[\\]: 1}; allowed"),
        ("rope(bass=3)", "did you mean base"),
        ("rope(", "allowed"),
        ("3", "allowed: a name"),
        ("__import__('os').system('true')", "allowed"),
        ("rope(base=open('x'))", "did you mean|allowed"),
        ("yarn(factor=2)", "allowed"),
    ],
)
def test_bad_texts_name_the_field(text, part):
    with pytest.raises(ValueError, match=part):
        bind(text)


# --- rope and its scalings


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_rope_against_complex_numbers(i, j):
    """Pairs as complex numbers in float64: multiplication by exp(1j·t·f)."""
    x, y = np.random.default_rng(0).normal(size=(2, 8))
    q, _ = rotated(bind("rope"), x, i)
    _, k = rotated(bind("rope"), y, j)
    f = 10000.0 ** (-np.arange(4) / 4)
    a = (x[:4] + 1j * x[4:]) * np.exp(1j * i * f)
    b = (y[:4] + 1j * y[4:]) * np.exp(1j * j * f)
    # the angle t·f has 24 bits: an absolute error of 5000·2⁻²⁴ = 3e-4 at the end of the range
    np.testing.assert_allclose(q @ k, (a * b.conj()).real.sum(), atol=2e-3)
    np.testing.assert_allclose(q @ q, x @ x, rtol=1e-5)


def test_rope_interleaved_is_a_permutation():
    x = np.random.default_rng(0).normal(size=8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    plain, _ = rotated(bind("rope"), x[order], 11)
    woven, _ = rotated(bind("rope(interleaved=True)"), x, 11)
    np.testing.assert_allclose(plain, woven[order], rtol=1e-6)


def test_partial_rope_leaves_the_rest_untouched():
    x = np.random.default_rng(0).normal(size=8).astype(np.float32)
    q, _ = rotated(bind("rope(fraction=0.25)"), x, 13)
    np.testing.assert_array_equal(q[2:], x[2:].astype(np.float64))
    assert not np.allclose(q[:2], x[:2])


def frequencies(text, width, length=1):
    rope = positions.parse(text)
    f, factor = rope.scaling.frequencies(rope.base, width, jnp.asarray([[length]]))
    return np.asarray(f, np.float64).reshape(-1), factor


def test_scalings_against_their_formulas():
    base = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    got, _ = frequencies("rope(scaling=linear(factor=4))", 16)
    np.testing.assert_allclose(got, base / 4)
    got, _ = frequencies("rope(scaling=ntk(factor=4))", 16)
    np.testing.assert_allclose(got[0], 1.0)
    np.testing.assert_allclose(got[-1], base[-1] / 4)  # the slowest pair is stretched fully
    text = "rope(scaling=dynamic_ntk(factor=2, original_length=100))"
    got, _ = frequencies(text, 16, length=50)
    np.testing.assert_allclose(got, base, rtol=1e-6)
    got, _ = frequencies(text, 16, length=300)
    grown = 10000.0 * (2 * 300 / 100 - 1) ** (16 / 14)
    np.testing.assert_allclose(got, grown ** (-np.arange(0, 16, 2) / 16), rtol=1e-5)


def test_a_scaling_under_lm_infinite_looks_no_farther_than_the_ceiling():
    """Near keys, rotated at their positions, and far ones, at the ceiling, belong to one length."""
    inner = "rope(scaling=dynamic_ntk(factor=2, original_length=100))"
    encoding = bind(f"lm_infinite(inner={inner}, window=300)")
    q = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
    at, length = jnp.asarray([[300]]), jnp.asarray([[4000]])
    near = encoding.rotate_queries(q, encoding.rotation(at, length, 8))
    np.testing.assert_array_equal(near, encoding.far_queries(q))


def test_llama3_and_yarn_keep_fast_pairs_and_stretch_slow_ones():
    base = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    got, factor = frequencies(
        "rope(base=500000.0, scaling=llama3(factor=8, original_length=8192))", 128
    )
    wavelength = 2 * np.pi / base
    assert factor == 1
    np.testing.assert_allclose(got[wavelength < 8192 / 4], base[wavelength < 8192 / 4])
    np.testing.assert_allclose(got[wavelength > 8192], base[wavelength > 8192] / 8)
    assert (got <= base).all() and (got >= base / 8).all()
    got, factor = frequencies(
        "rope(base=500000.0, scaling=yarn(factor=8, original_length=8192))", 128
    )
    np.testing.assert_allclose(factor, 0.1 * np.log(8) + 1)
    turns = 8192 * base / (2 * np.pi)
    np.testing.assert_allclose(got[turns > 40], base[turns > 40])
    np.testing.assert_allclose(got[turns < 0.8], base[turns < 0.8] / 8)


def test_longrope_switches_past_the_original_length():
    text = (
        "rope(scaling=longrope(factor=4, original_length=10, short=(1, 1, 1, 1), "
        "long=(1, 2, 4, 8)))"
    )
    base = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    short, factor = frequencies(text, 8, length=10)
    long, _ = frequencies(text, 8, length=11)
    np.testing.assert_allclose(short, base, rtol=1e-6)
    np.testing.assert_allclose(long, base / [1, 2, 4, 8], rtol=1e-6)
    np.testing.assert_allclose(factor, np.sqrt(1 + np.log(4) / np.log(10)))


# --- the others


def test_sinusoids_are_not_interleaved():
    got = np.asarray(sinusoids(jnp.asarray([[5]]), 6, 10000.0))[0, 0]
    f = 10000.0 ** (-np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(got, np.concatenate([np.sin(5 * f), np.cos(5 * f)]), rtol=1e-5)


def test_learned_positions_past_their_table():
    learned = bind("learned(table_length=4)")
    x, table = jnp.zeros((1, 4, 32)), {"table": jnp.ones((4, 32))}
    with pytest.raises(ValueError, match="length=5"):
        learned.embed(table, jnp.zeros((1, 5, 32)), jnp.zeros((1, 5), jnp.int32))
    got = np.asarray(learned.embed(table, x, jnp.asarray([[0, 3, 4, 9]])))
    assert (got[0, :2] == 1).all() and np.isnan(got[0, 2:]).all()


def test_harmonic_numbers_across_the_seam():
    exact = np.cumsum(1.0 / np.arange(1, 4 * TABLE_LENGTH))
    n = np.arange(1, 4 * TABLE_LENGTH)
    # float32 has 24 bits: H < 8 is rounded to within 5e-7
    np.testing.assert_allclose(harmonic(jnp.asarray(n)), exact, atol=1e-6)
    assert float(harmonic(jnp.asarray(0))) == 0


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "linear"])
def test_rope_alibi_scores(kind):
    encoding = bind(f"rope_alibi(kind={kind})")
    m = np.asarray(encoding.head_parameters({}, 4))
    np.testing.assert_allclose(m, [1, 1 / 2, 1 / 3, 1 / 4])
    d = jnp.asarray([[0, 1, 2, 4]])
    s = jnp.full(d.shape, 2.0)
    h = np.array([0, 1, 1.5, 1 + 1 / 2 + 1 / 3 + 1 / 4])
    want = {
        "additive": 2 - m[1] * h,
        "multiplicative": 2 / (1 + m[1] * h),
        "linear": 2 - m[1] * np.asarray(d[0]),
    }[kind]
    got = encoding.score(encoding.head_parameters({}, 4)[1], s, d, d)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_rope_alibi_of_strength_zero_is_rope():
    assert not bind("rope_alibi(strength=0)").changes_scores


def test_xpos_shrinks_with_distance():
    x = np.ones(8)
    q, _ = rotated(bind("xpos"), x, 600)
    _, k = rotated(bind("xpos"), x, 100)
    f, zeta = 10000.0 ** (-np.arange(4) / 4), (np.arange(4) / 4 + 0.4) / 1.4
    want = (2 * np.cos(500 * f) * zeta ** (500 / 512)).sum()
    np.testing.assert_allclose(q @ k, want, atol=1e-3)  # angles of 600 have 24 bits


def test_xpos_of_float16_is_finite_at_any_position():
    """Only differences matter: far from the start as near it, decoding as all at once."""
    xpos, x = bind("xpos"), jnp.ones((1, 2, 1, 8), jnp.float16)
    f, zeta = 10000.0 ** (-np.arange(4) / 4), (np.arange(4) / 4 + 0.4) / 1.4
    for at in (100, 20000, 10**6):
        where = jnp.asarray([[at, at + 60]])
        turn = xpos.rotation(where, jnp.full((1, 1), at + 61), 8)
        q, k = (np.asarray(r(x, turn))[0, :, 0] for r in (xpos.rotate_queries, xpos.rotate_keys))
        want = (2 * np.cos(60 * f) * zeta ** (60 / 512)).sum()
        # Eleven bits in every one of eight terms of about 1; angles of 10⁶ have lost 1e6·2⁻²⁴.
        np.testing.assert_allclose(q[1].astype(np.float64) @ k[0], want, atol=0.02 + at * 6e-8 * 8)
    far = jnp.asarray([[0, 10**6]])
    turn = xpos.rotation(far, far[:, 1:] + 1, 8)
    for rotate in (xpos.rotate_queries, xpos.rotate_keys):
        assert np.isfinite(rotate(x, turn)).all() and np.abs(rotate(x, turn)).max() > 0


def test_sandwich_is_the_inner_product_of_sinusoids():
    vectors = np.asarray(sinusoids(jnp.asarray([[900, 840]]), 128, 10000.0), np.float64)[0]
    # float32 sinusoids of positions near 900 carry 900·2⁻²⁴ each, over 128 terms
    np.testing.assert_allclose(
        inner_product(np.array([60]), 128, 10000.0), vectors[0] @ vectors[1], atol=2e-3
    )
    sandwich = bind("sandwich")
    heads = sandwich.head_parameters({}, 4)
    got = sandwich.bias(heads[3], jnp.asarray([[60]]), jnp.asarray([[900]]))
    np.testing.assert_allclose(got, inner_product(np.array([[60]]).ravel(), 128, 1e4)[None] / 8)


def test_kerple_and_fire_against_their_formulas():
    d = np.array([[0, 1, 7, 50]])
    kerple = bind("kerple")
    head = (jnp.asarray(0.7), jnp.asarray(0.3))
    got = kerple.bias(head, jnp.asarray(d), jnp.asarray(d))
    np.testing.assert_allclose(got, -0.7 * np.log1p(0.3 * d), rtol=1e-6)
    power = bind("kerple(kind=power)").bias(head, jnp.asarray(d), jnp.asarray(d))
    np.testing.assert_allclose(power, -0.7 * np.where(d > 0, d, 0.0) ** 0.3 * (d > 0), rtol=1e-6)
    fire = bind("fire(width=3)")
    shapes = fire.parameters(DIMENSIONS)
    params = {
        n: jax.random.normal(jax.random.key(i), p.shape) for i, (n, p) in enumerate(shapes.items())
    }
    params |= {"c": jnp.asarray(0.1), "threshold": jnp.asarray(20.0)}
    head = jax.tree.map(lambda a: a[2], fire.head_parameters(params, 4))
    i = np.array([[60], [10]])
    got = fire.bias(head, jnp.asarray(np.tile(d, (2, 1))), jnp.asarray(i))
    p = {n: np.asarray(v, np.float64) for n, v in params.items()}
    x = np.log1p(0.1 * d) / np.log1p(0.1 * np.maximum(20, i))
    hidden = np.maximum(x[..., None] * p["w_in"] + p["b_in"], 0)
    np.testing.assert_allclose(got, hidden @ p["w_out"][2] + p["b_out"][2], rtol=1e-5, atol=1e-5)


def test_lm_infinite_meets_far_keys_at_the_ceiling():
    """RoPE's far logit is that of distance exactly C, whatever the true distance."""
    encoding = bind("lm_infinite(window=16)")
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    qf = encoding.far_queries(jnp.asarray(q)[None, None, None])[0, 0, 0]
    kf = encoding.far_keys(jnp.asarray(k)[None, None, None])[0, 0, 0]
    at_c, _ = rotated(bind("rope"), q, 16)
    np.testing.assert_allclose(float(qf @ kf), at_c @ k, rtol=1e-5)
    assert encoding.ceiling == 16


def test_lm_infinite_warns_once_of_more_sinks_than_window(caplog):
    for _ in range(2):
        bind("lm_infinite(window=5, num_sinks=5)")
        bind("lm_infinite(window=5, num_sinks=4)")
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "num_sinks=5 with window=5" in told[0]


def test_nested_encodings_may_be_text():
    want = positions.parse("lm_infinite(rope(scaling=linear(factor=2)), window=8)")
    inner = positions.get("rope", scaling="linear(factor=2)")
    assert positions.get("lm_infinite", inner="rope(scaling='linear(2)')", window=8) == want
    assert positions.parse("lm_infinite(window=8)", inner=inner) == want
    assert positions.parse(positions.get("lm_infinite", window=8), inner=inner) == want
