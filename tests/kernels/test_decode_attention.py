"""Decode attention against its oracle, in TPU interpret mode."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

import kernels.decode_attention
from kernels.decode_attention import (
    attend_new,
    decode_attention,
    merge,
    paged_decode_attention,
    reference,
)
from tests.kernels.aot import LIKE_8B, LIKE_70B, TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, RACES, assert_close, random

# float32: sums in another order. bfloat16: weights are rounded to 8 bits before they meet the
# values, and so is the result: 2**-8 of numbers of order 1; seldom all errors go one way.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2}
SLOPES = jnp.array([0.5, 0.25, 0.1, 0.01])
SMALL_BLOCKS = 128 * 128 * 4  # bytes


def arrays(seed=0, B=2, N=4, K=2, T=1, S=256, H=128, dtype="float32", cache=None):
    rng = np.random.default_rng(seed)
    dtype, cache = jnp.dtype(dtype), jnp.dtype(cache or dtype)
    q = random(rng, B, N, T, H, dtype=dtype)
    k, v = (random(rng, B, K, S, H).astype(cache) for _ in range(2))
    positions = {
        "q_positions": jnp.full((B, T), S, jnp.int32) + jnp.arange(T, dtype=jnp.int32)[None],
        "k_positions": jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)),
    }
    return (q, k, v), positions


def agree(inputs, options):
    arguments = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in options.items() if k not in arguments}
    run = jax.jit(functools.partial(decode_attention, **static, scale=0.1, interpret=INTERPRET))
    actual = run(*inputs, **arguments)
    expected = jax.jit(functools.partial(reference, **static, scale=0.1))(*inputs, **arguments)
    assert actual[0].dtype == inputs[0].dtype
    assert actual[1].dtype == jnp.float32
    assert_close(actual, expected, TOLERANCE[str(inputs[0].dtype)])


# (sizes, options): the first in every run, the others with -m slow: three seconds each.
CASES = {
    "grouped_bfloat16": ({"N": 8, "dtype": "bfloat16"}, {}),
    "sinks_softcap_alibi": (
        {"S": 300, "T": 2, "H": 64},
        {"window": 50, "num_sinks": 4, "softcap": 2.0, "slopes": SLOPES},
    ),
    "ragged_two_splits": ({"B": 1, "S": 300, "N": 1, "K": 1}, {"lengths": jnp.array([140])}),
    "a_row_is_empty": ({"S": 300}, {"lengths": jnp.array([0, 900])}),
    "window": ({"S": 300, "T": 3}, {"window": 100}),
    "two_splits": ({"B": 1, "S": 4224, "N": 1, "K": 1}, {}),
    "tree_bfloat16": ({"T": 5, "N": 6, "dtype": "bfloat16"}, {}),
    "float8": ({"dtype": "bfloat16", "cache": "float8_e4m3fn"}, {}),
    "dim_80": ({"H": 80, "S": 200}, {}),
    "dim_192": ({"H": 192, "T": 2}, {}),
    "dim_256": ({"H": 256, "dtype": "bfloat16"}, {}),
}
IN_EVERY_RUN = 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number >= IN_EVERY_RUN else [])
        for number, name in enumerate(CASES)
    ],
)
def test_kernel_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    sizes, options = CASES[name]
    inputs, positions = arrays(**sizes)
    agree(inputs, {**positions, **options})


def test_a_ring_of_packed_documents_with_padding():
    """Slots in another order, some empty; one query is padding, one document is unseen."""
    inputs, positions = arrays(T=3)
    slots = jnp.roll(positions["k_positions"], 77, 1).at[:, 50:60].set(-1)
    k_segments = jnp.broadcast_to(jnp.repeat(jnp.array([0, 1, 2, 3]), 64), (2, 256))
    segments = {
        "q_segment_ids": jnp.array([[1, 2, 3], [3, 0, 1]]),
        "k_segment_ids": jnp.roll(k_segments, 77, 1),
    }
    agree(inputs, {**positions, "k_positions": slots, **segments})


def test_a_layer_is_read_where_it_lies():
    (q, k, v), positions = arrays(N=2, K=1)
    others = jnp.full_like(k, jnp.nan)
    stacked = [jnp.stack([others, x, others]).reshape(6, 1, 256, 128) for x in (k, v)]
    run = functools.partial(decode_attention, **positions, scale=0.1, interpret=INTERPRET)
    actual = jax.jit(run)(q, *stacked, k_rows=jnp.array([3, 2]))
    expected = reference(q, k[::-1], v[::-1], **positions, scale=0.1)
    assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_a_query_that_sees_nothing_gives_zeros():
    inputs, positions = arrays()
    out, lse = decode_attention(
        *inputs,
        **{**positions, "k_positions": jnp.full((2, 256), -1)},
        scale=0.1,
        interpret=INTERPRET,
    )
    assert (out == 0).all()
    assert (lse < -1e38).all()
    assert jnp.isfinite(lse).all()


@pytest.mark.parametrize(
    ("page", "ragged"),
    [(64, True), *(pytest.param(p, r, marks=pytest.mark.slow) for p in (16, 128) for r in (0, 1))],
)
def test_pages(page, ragged, monkeypatch):
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    rng = np.random.default_rng(0)
    B, K, pages, H = 2, 1, 512 // page + 1, 64
    pool = [random(rng, B * pages + 3, K, page, H) for _ in range(2)]
    table = jnp.asarray(rng.permutation(B * pages + 3)[: B * pages].reshape(B, pages))
    dense = [x[table].swapaxes(1, 2).reshape(B, K, -1, H) for x in pool]
    (q, _, _), positions = arrays(S=pages * page, N=2, H=H, T=2)
    lengths = jnp.array([530, 40]) if ragged else None
    run = jax.jit(functools.partial(paged_decode_attention, scale=0.1, interpret=INTERPRET))
    actual = run(q, *pool, table, **positions, lengths=lengths)
    assert_close(actual, reference(q, *dense, **positions, lengths=lengths, scale=0.1), 1e-5)


def test_a_tree_and_the_cache_have_one_softmax():
    """Merged, the parts are attention to [cache ‖ new tokens]."""
    B, K, T, S = 2, 2, 6, 256
    (q, k, v), positions = arrays(T=T)
    rng = np.random.default_rng(1)
    new_k, new_v = (random(rng, B, K, T, 128) for _ in range(2))
    parents = [-1, 0, 0, 1, 1, 2]
    depth = [0, 1, 1, 2, 2, 2]
    mask = np.eye(T, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    q_positions = S + jnp.broadcast_to(jnp.array(depth), (B, T))
    options = {"scale": 0.1, "softcap": 3.0, "slopes": SLOPES}
    run = functools.partial(decode_attention, **options, interpret=INTERPRET)
    cached = jax.jit(run)(q, k, v, **{**positions, "q_positions": q_positions})
    new = attend_new(q, new_k, new_v, jnp.asarray(mask), **options, positions=q_positions)
    out, lse = merge([cached, new])

    # One token at a time, its ancestors as if they were in the cache.
    for t in (5,):
        seen = np.flatnonzero(mask[t])
        expected = reference(
            q[:, :, t : t + 1],
            jnp.concatenate([k, new_k[:, :, seen]], 2),
            jnp.concatenate([v, new_v[:, :, seen]], 2),
            q_positions=q_positions[:, t : t + 1],
            k_positions=jnp.concatenate([positions["k_positions"], q_positions[:, seen]], 1),
            **options,
        )
        assert_close((out[:, :, t : t + 1], lse[:, :, t : t + 1]), expected, 1e-5)


@pytest.mark.slow
def test_twice_the_same_bits():
    inputs, positions = arrays(T=2)
    run = jax.jit(functools.partial(decode_attention, scale=0.1, interpret=INTERPRET))
    one, two = run(*inputs, **positions), run(*inputs, **positions)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_no_races(monkeypatch):
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    inputs, positions = arrays(B=1, S=300, N=1, K=1)
    run = jax.jit(functools.partial(decode_attention, scale=0.1, interpret=RACES))
    run(*inputs, **positions, lengths=jnp.array([200]))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"N": 3}, {}, "allowed: N a multiple of k's K=2"),
        ({"T": 129}, {}, "allowed: T from 1 to 128"),
        ({"H": 260}, {}, "allowed: H a multiple of 8 up to 256"),
        ({"cache": "int8"}, {}, "k.dtype=int8; allowed: bfloat16"),
        ({}, {"window": 0}, "window=0; allowed"),
        ({}, {"num_sinks": 4}, "num_sinks=4; allowed"),
        ({}, {"lengths": jnp.zeros(3, jnp.int32)}, r"lengths of shape \(3,\); allowed: \(2,\)"),
    ],
)
def test_errors_name_what_is_allowed(sizes, options, message):
    inputs, positions = arrays(**sizes)
    with pytest.raises(ValueError, match=message):
        decode_attention(*inputs, **positions, **options, scale=0.1)


def test_pages_of_an_odd_size_are_refused():
    (q, k, v), positions = arrays()
    table = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="allowed: pages of 16, 32, 64 or a multiple of 128"):
        paged_decode_attention(q, k[:, :, :48], v[:, :, :48], table, **positions, scale=0.1)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_anything(data):
    draw = data.draw
    K, G = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    S = draw(st.integers(1, 600))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    inputs, positions = arrays(
        *(draw(st.integers(0, 99)), draw(st.integers(1, 3)), K * G, K),
        *(draw(st.integers(1, 9)), S, draw(st.sampled_from([64, 80, 128, 192])), dtype),
    )
    options = {
        "window": draw(st.none() | st.integers(1, S)),
        "softcap": draw(st.none() | st.floats(0.5, 9)),
    }
    if options["window"]:
        options["num_sinks"] = draw(st.integers(0, 9))
    if draw(st.booleans()):
        options["slopes"] = jnp.linspace(0.01, 1, K * G)
    if draw(st.booleans()):
        lengths = st.lists(
            st.integers(0, S + 300), min_size=len(inputs[0]), max_size=len(inputs[0])
        )
        options["lengths"] = jnp.array(draw(lengths))
    agree(inputs, {**positions, **options})


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "sizes",
    [
        {**LIKE_8B, "batch": 8, "capacity": 32768, "ragged": True},
        {**LIKE_70B, "batch": 1, "capacity": 1 << 20},
        {**LIKE_70B, "batch": 8, "capacity": 32768, "queries": 16},
        {**LIKE_8B, "batch": 8, "capacity": 32768, "dtype": "float8_e4m3fn"},
        {**LIKE_8B, "batch": 1, "capacity": 2000, "head_dim": 80, "queries": 128},
    ],
    ids=["8B_32k_ragged", "70B_1M", "70B_32k_tree", "8B_32k_float8", "odd"],
)
def test_compiles(topology, sizes):
    compiles("kernel_programs_decode:decode_attention", sizes, topology)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "sizes",
    [
        {**LIKE_8B, "batch": 8, "capacity": 32768, "page": 64},
        {**LIKE_70B, "batch": 1, "capacity": 1 << 20, "page": 128},
    ],
    ids=["8B_32k", "70B_1M"],
)
def test_pages_compile(topology, sizes):
    compiles("kernel_programs_decode:paged_decode", sizes, topology)
