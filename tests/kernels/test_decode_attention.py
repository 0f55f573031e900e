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
    Queries,
    Scoring,
    Slots,
    attend_new,
    decode_attention,
    dense_layouts,
    fit,
    merge,
    paged_decode_attention,
    paged_layouts,
    reference,
)
from kernels.decode_attention import inputs as decode_inputs
from kernels.decode_attention.blocks import VMEM_BYTES, Cut, vmem_bytes
from tests.kernels.aot import LIKE_8B, LIKE_70B, TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, RACES, assert_close, random
from tests.marks import slow_but

# float32: sums in another order. bfloat16: weights are rounded to 8 bits before they meet the
# values, and so is the result: 2**-8 of numbers of order 1; seldom all errors go one way.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2}
FLOAT32 = {"dtype": "float32", "query_dtype": "float32"}
SMALL_BLOCKS = 128 * 128 * 4  # bytes


SCORING = Scoring(0.1)
SLOW = pytest.mark.slow


def arrays(seed=0, B=2, N=4, K=2, T=1, S=256, H=128, dtype="float32", cache=None, bias=False):
    """(q, k, v), and what is known of queries and slots."""
    rng = np.random.default_rng(seed)
    dtype, cache = jnp.dtype(dtype), jnp.dtype(cache or dtype)
    q = random(rng, B, N, T, H, dtype=dtype)
    k, v = (random(rng, B, K, S, H, dtype=cache) for _ in range(2))
    # NumPy's: what is made of them by small operations needs no programs.
    queries = Queries(np.tile(np.arange(S, S + T, dtype=np.int32), (B, 1)))
    slots = Slots(np.tile(np.arange(S, dtype=np.int32), (B, 1)))
    if bias:
        slots = slots._replace(bias=random(rng, B, N, T, S))
    return (q, k, v), queries, slots


wanted = jax.jit(reference, static_argnums=3)


def agree(inputs, queries, slots, scoring=SCORING):
    run = jax.jit(functools.partial(decode_attention, interpret=INTERPRET), static_argnums=3)
    actual = run(*inputs, scoring, queries, slots)
    expected = wanted(*inputs, scoring, queries, slots)
    assert actual[0].dtype == inputs[0].dtype
    assert actual[1].dtype == jnp.float32
    assert_close(actual, expected, TOLERANCE[str(inputs[0].dtype)])


# (sizes, scoring, lengths): the first in every run, the others with -m slow: three seconds each.
CASES = {
    "grouped_bfloat16": ({"N": 8, "dtype": "bfloat16"}, {}, None),
    "sinks_softcap_bias": (
        {"S": 300, "T": 2, "H": 64, "bias": True},
        {"window": 50, "num_sinks": 4, "softcap": 2.0},
        None,
    ),
    "ragged_two_splits": ({"B": 1, "S": 300, "N": 1, "K": 1}, {}, [140]),
    "ragged_bias_two_splits": ({"B": 1, "S": 300, "N": 6, "T": 3, "bias": True}, {}, [140]),
    "a_row_is_empty": ({"S": 300}, {}, [0, 900]),
    "window": ({"S": 300, "T": 3}, {"window": 100}, None),
    "two_splits": ({"B": 1, "S": 4224, "N": 1, "K": 1}, {}, None),
    "tree_bfloat16": ({"T": 5, "N": 6, "dtype": "bfloat16"}, {}, None),
    "float8": ({"dtype": "bfloat16", "cache": "float8_e4m3fn"}, {}, None),
    "dim_80": ({"H": 80, "S": 200}, {}, None),
    "dim_192": ({"H": 192, "T": 2}, {}, None),
    "dim_256": ({"H": 256, "dtype": "bfloat16"}, {}, None),
}
IN_EVERY_RUN = 3


@pytest.mark.parametrize(
    "name",
    slow_but(list(CASES)[:IN_EVERY_RUN], CASES),
)
def test_kernel_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    sizes, options, lengths = CASES[name]
    inputs, queries, slots = arrays(**sizes)
    if lengths is not None:
        slots = slots._replace(lengths=jnp.array(lengths))
    agree(inputs, queries, slots, Scoring(0.1, **options))


# (heads, rows, tiles, tile): both axes in pieces, and a loop in each; then one by one.
CUTS = [(2, 2, 2, 16), *(pytest.param(c, marks=SLOW) for c in ((2, 1, 1, 40), (1, 3, 1, 16)))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_queries_in_pieces(cut, monkeypatch):
    """As where VMEM is too small for the state of all: 40 rows a head."""
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    monkeypatch.setattr(kernels.decode_attention, "cuts", lambda *_: [Cut(*cut)])
    inputs, queries, slots = arrays(T=20, S=300, bias=True)
    agree(inputs, queries, slots._replace(lengths=jnp.array([290, 130])), Scoring(0.1, window=99))


def test_a_ring_of_packed_documents_with_padding():
    """Slots in another order, some empty; one query is padding, one document is unseen."""
    inputs, queries, slots = arrays(T=3, bias=True)
    k_segments = np.tile(np.repeat(np.arange(4, dtype=np.int32), 64), (2, 1))
    positions = np.roll(slots.positions, 77, 1)
    positions[:, 50:60] = -1
    slots = slots._replace(positions=positions, segment_ids=np.roll(k_segments, 77, 1))
    queries = queries._replace(segment_ids=np.array([[1, 2, 3], [3, 0, 1]], np.int32))
    agree(inputs, queries, slots)


def test_a_layer_is_read_where_it_lies():
    (q, *kv), queries, slots = arrays(N=2, K=1)
    k, v = map(np.asarray, kv)
    others = np.full_like(k, np.nan)
    stacked = [np.stack([others, x, others]).reshape(6, 1, 256, 128) for x in (k, v)]

    def run(q, keys, values, rows):
        return decode_attention(
            *(q, keys, values, SCORING, queries, slots), k_rows=rows, interpret=INTERPRET
        )

    actual = jax.jit(run)(q, *stacked, jnp.array([3, 2]))
    assert_close(actual, wanted(q, k[::-1], v[::-1], SCORING, queries, slots), 1e-5)


@pytest.mark.slow
def test_a_query_that_sees_nothing_gives_zeros():
    inputs, queries, slots = arrays()
    slots = Slots(jnp.full((2, 256), -1))
    out, lse = decode_attention(*inputs, SCORING, queries, slots, interpret=INTERPRET)
    assert (out == 0).all()
    assert (lse < -1e38).all()
    assert jnp.isfinite(lse).all()


@pytest.mark.parametrize(
    ("page", "ragged"),
    [
        (64, True),
        *(pytest.param(page, ragged, marks=SLOW) for page in (16, 128, 256) for ragged in (0, 1)),
    ],
)
def test_pages(page, ragged, monkeypatch):
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    rng = np.random.default_rng(0)
    # Of a page of 256 a block is a half.
    B, K, pages, H = 2, 2, 512 // page + 1, 64
    if page == 256:
        monkeypatch.setattr(kernels.decode_attention, "WORKED_OUT", vmem_bytes("v5e") - (1 << 20))
    pool = [random(rng, B * pages + 3, K, page, H) for _ in range(2)]
    table = rng.permutation(B * pages + 3)[: B * pages].reshape(B, pages).astype(np.int32)
    dense = [np.asarray(x)[table].swapaxes(1, 2).reshape(B, K, -1, H) for x in pool]
    (q, _, _), queries, slots = arrays(S=pages * page, N=4, H=H, T=2, bias=ragged)
    slots = slots._replace(lengths=jnp.array([530, 40]) if ragged else None)
    run = functools.partial(paged_decode_attention, interpret=INTERPRET)
    actual = jax.jit(run, static_argnums=4)(q, *pool, table, SCORING, queries, slots)
    assert_close(actual, wanted(q, *dense, SCORING, queries, slots), 1e-5)


def test_a_tree_and_the_cache_have_one_softmax():
    """Merged, the parts are attention to [cache ‖ new tokens]."""
    B, N, K, T, S = 2, 4, 2, 6, 256
    (q, k, v), _, slots = arrays(T=T, bias=True)
    rng = np.random.default_rng(1)
    shapes = (B, K, T, 128), (B, K, T, 128), (B, N, T, T)
    new_k, new_v, new_bias = (rng.normal(size=s).astype(np.float32) for s in shapes)
    parents = [-1, 0, 0, 1, 1, 2]
    depth = [0, 1, 1, 2, 2, 2]
    mask = np.eye(T, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    at = np.tile(S + np.array(depth, np.int32), (B, 1))
    scoring = Scoring(0.1, softcap=3.0)

    @jax.jit
    def run(q, k, v, slots):
        given = (q, k, v, scoring, Queries(at), slots)
        cached = decode_attention(*given, interpret=INTERPRET)
        new = attend_new(q, new_k, new_v, mask, scale=0.1, softcap=3.0, bias=new_bias)
        return merge([cached, new])

    out, lse = map(np.asarray, run(q, k, v, slots))
    q, k, v, bias = map(np.asarray, (q, k, v, slots.bias))

    # One token at a time, its ancestors as if they were in the cache.
    for t in (5,):
        seen, one = np.flatnonzero(mask[t]), slice(t, t + 1)
        expected = wanted(
            q[:, :, one],
            np.concatenate([k, new_k[:, :, seen]], 2),
            np.concatenate([v, new_v[:, :, seen]], 2),
            scoring,
            Queries(at[:, one]),
            Slots(
                np.concatenate([slots.positions, at[:, seen]], 1),
                bias=np.concatenate([bias[:, :, one], new_bias[:, :, one, seen]], 3),
            ),
        )
        assert_close((out[:, :, one], lse[:, :, one]), expected, 1e-5)


@pytest.mark.slow
def test_twice_the_same_bits():
    inputs, queries, slots = arrays(T=2)
    run = functools.partial(decode_attention, interpret=INTERPRET)
    run = jax.jit(run, static_argnums=3)
    one, two = (run(*inputs, SCORING, queries, slots) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "form", ["dense", *(pytest.param(f, marks=SLOW) for f in ("ring", "paged", "float8", "pieces"))]
)
def test_no_races(form, monkeypatch):
    """Several blocks, with lengths; two cores share sequences, splits and pieces."""
    monkeypatch.setattr(kernels.decode_attention, "BLOCK_BYTES", SMALL_BLOCKS)
    if form == "pieces":
        monkeypatch.setattr(kernels.decode_attention, "cuts", lambda *_: [Cut(2, 2, 2, 16)])
    sizes = {"T": 20, "N": 4, "K": 2} if form == "pieces" else {"N": 1, "K": 1}
    cache = "float8_e4m3fn" if form == "float8" else None
    (q, k, v), queries, slots = arrays(B=1, S=300, H=64, cache=cache, **sizes)
    slots = slots._replace(lengths=jnp.array([200]))
    if form == "ring":
        slots = slots._replace(positions=np.roll(slots.positions, 77, 1), lengths=None)
    run, call = decode_attention, (q, k, v)
    if form == "paged":
        pool = random(np.random.default_rng(0), 5, 1, 64, 64)
        run, call = paged_decode_attention, (q, pool, -pool, jnp.array([[4, 1, 2, 0, 3]]))
        slots = slots._replace(positions=jnp.arange(320, dtype=jnp.int32)[None])
    run = functools.partial(run, interpret=RACES)
    jax.jit(run, static_argnums=len(call))(*call, SCORING, queries, slots)
    assert not interpret_pallas_call.races.races_found


INT = jnp.int32
MOST_PAGES = 32121  # of eight sequences
# What is wrong of (sizes, queries, slots, k_rows), and what the error says.
BAD_CALLS = [
    ({"N": 3}, {}, {}, "allowed: N a multiple of k's K=2"),
    ({"T": 129}, {}, {}, "allowed: T from 1 to 128"),
    ({"T": 0}, {}, {}, "allowed: no axis of length 0"),
    ({"S": 0}, {}, {}, "allowed: no axis of length 0"),
    ({"H": 260}, {}, {}, "allowed: H a multiple of 8 up to 256"),
    ({"cache": "int8"}, {}, {}, "k.dtype=int8; allowed: bfloat16"),
    ({}, {}, {"lengths": jnp.zeros(3, INT)}, r"slots.lengths of shape \(3,\); allowed: \(2,\)"),
    ({}, {}, {"lengths": jnp.zeros(2)}, "slots.lengths.dtype=float32; allowed: int32"),
    ({}, {}, {"positions": jnp.zeros((2, 9), INT)}, r"slots.positions of shape \(2, 9\); allowed"),
    ({}, {}, {"positions": jnp.zeros((2, 256))}, "slots.positions.dtype=float32; allowed: int32"),
    ({}, {"positions": jnp.zeros((1, 1), INT)}, {}, r"queries.positions of shape \(1, 1\)"),
    ({}, {"positions": jnp.zeros((2, 1))}, {}, "queries.positions.dtype=float32; allowed: int32"),
    ({}, {"segment_ids": jnp.ones((2, 3), INT)}, {}, r"queries.segment_ids of shape \(2, 3\)"),
    ({}, {}, {"segment_ids": jnp.ones((2, 256), INT)}, "segment_ids; allowed: of the queries and"),
    ({}, {}, {"bias": jnp.zeros((2, 1, 1, 256))}, r"bias of shape .*; allowed: \(2, 4, 1, 256\)"),
    ({}, {}, {"bias": jnp.zeros((2, 4, 1, 256), jnp.bfloat16)}, "bias.dtype=bfloat16; allowed"),
    (
        {"T": 9, "H": 8, "bias": True},
        *({}, {}),
        "bias of 144 bytes a slot; allowed: at most 128, those of its keys and values",
    ),
]


@pytest.mark.parametrize(("sizes", "changed", "slots", "message"), BAD_CALLS)
def test_errors_name_what_is_allowed(sizes, changed, slots, message):
    inputs, queries, whole = arrays(**sizes)
    with pytest.raises(ValueError, match=message):
        decode_attention(*inputs, SCORING, queries._replace(**changed), whole._replace(**slots))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": jnp.zeros((2, 2, 256, 128), jnp.bfloat16)}, "v.dtype=bfloat16; allowed: k's, float"),
        ({"k": jnp.zeros((2, 256))}, r"k=\(2, 256\), v=.*; allowed: .* rank 4"),
        ({"k_rows": jnp.zeros(5, INT)}, r"k_rows of shape \(5,\); allowed: \(2,\)"),
        ({"k_rows": jnp.zeros(2)}, "k_rows.dtype=float32; allowed: int32"),
    ],
)
def test_keys_and_values_that_do_not_fit_are_refused(change, message):
    (q, k, v), queries, slots = arrays()
    call = {"q": q, "k": k, "v": v, "scoring": SCORING, "queries": queries, "slots": slots}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**call, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0; allowed: None or an integer from 1 to 2147483647"),
        ({"window": 1.5}, "window=1.5; allowed: None or an integer from 1 to 2147483647"),
        ({"window": 2**31}, "window=2147483648; allowed: None or an integer from 1 to"),
        ({"num_sinks": 4}, "num_sinks=4; allowed: 0 where there is no window"),
        ({"num_sinks": -1, "window": 5}, "num_sinks=-1; allowed: an integer from 0 to 2147483647"),
        ({"softcap": 0.0}, "softcap=0.0; allowed: None or a finite number > 0"),
        ({"scale": float("nan")}, "scale=nan; allowed: a finite number"),
    ],
)
def test_scorings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**{"scale": 0.1, **options})


@pytest.mark.parametrize(
    ("page", "pool", "table", "message"),
    [
        (48, 3, jnp.zeros((2, 1), INT), "pages of 16, 32, 64 or a multiple of 128 tokens, not 48"),
        (0, 3, jnp.zeros((2, 1), INT), "allowed: no axis of length 0"),
        (64, 0, jnp.zeros((2, 1), INT), "allowed: no axis of length 0"),
        (64, 3, jnp.zeros((2, 0), INT), r"page_table=\(2, 0\); allowed"),
        (64, 3, jnp.zeros(2, INT), r"page_table=\(2,\); allowed"),
        (64, 3, jnp.zeros((3, 1), INT), r"page_table of shape \(3, 1\); allowed: \(2, 1\)"),
        (64, 3, jnp.zeros((2, 1)), "page_table.dtype=float32; allowed: int32"),
    ],
)
def test_pages_that_make_no_sense_are_refused(page, pool, table, message):
    (q, _, _), queries, _ = arrays()
    k, slots = jnp.zeros((pool, 2, page, 128)), Slots(jnp.zeros((2, page), jnp.int32))
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(q, k, k, table, SCORING, queries, slots)


def test_a_table_that_scalar_memory_does_not_hold():
    """The most pages of eight sequences, and one more; `test_pages_compile` has the former."""

    def run(pages):
        shapes = (8, 1, 1, 128), (9, 1, 16, 128), (8, pages), (8, 1), (8, pages * 16)
        q, k, *integers = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        table, i, j = (jax.ShapeDtypeStruct(x.shape, INT) for x in integers)
        return jax.eval_shape(
            lambda q, k, table, i, j: paged_decode_attention(
                *(q, k, k, table, SCORING, Queries(i), Slots(j)), interpret=INTERPRET
            ),
            *(q, k, table, i, j),
        )

    assert run(MOST_PAGES)[0].shape == (8, 1, 1, 128)
    with pytest.raises(ValueError, match=r"page_table=\(8, 32122\): 1.* allowed: at most 1032192"):
        run(MOST_PAGES + 1)


@jax.jit
def scores_of(queries, slots):
    """Of eight queries at these positions and of slots."""
    rows = decode_inputs.describe_rows(Queries(queries), 1, 8)[0]
    keys = decode_inputs.describe_keys(Slots(slots), 128)[0]
    return SCORING(jnp.zeros((8, 128)), rows, keys, None)


@pytest.mark.parametrize("position", [-1, -2, -(2**31)])
def test_a_query_below_zero_sees_no_empty_slot(position):
    """The description of rows and keys, by the kernel's own rule: no difference wraps around."""
    slots = np.array([[-1, 0, 5, 2**31 - 2]], np.int32)
    assert (scores_of(np.full((1, 8), position, np.int32), slots) == -np.inf).all()


def test_the_last_position_sees_no_empty_slot():
    """Empty slots are described by it."""
    seen = scores_of(np.full((1, 8), 2**31 - 1, np.int32), np.array([[-1, 0]], np.int32)) == 0
    assert seen[:, 1].all() and seen.sum() == 8


def test_blocks_in_use():
    """None below 0, no more than there are: no sum wraps around."""
    lengths = np.array([-3, 0, 1, 128, 129, 300, 2**31 - 1], np.int32)
    found = jax.jit(decode_inputs.blocks_in_use, static_argnums=(1, 2))(lengths, 300, 128)
    assert found.tolist() == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("chip", VMEM_BYTES)
def test_all_shapes_fit_every_chip(chip):
    """The widest and longest of each kind: the smallest blocks and pieces are small enough."""
    for K, G, T, biased in ((1, 256, 128, False), (64, 2, 128, False), (8, 4, 128, True)):
        q = jax.ShapeDtypeStruct((1, K * G, T, 256), jnp.float32)
        k = jax.ShapeDtypeStruct((1, K, 1 << 20, 256), jnp.float32)
        pool = jax.ShapeDtypeStruct((9, K, 1 << 16, 256), jnp.float32)
        for layouts in (dense_layouts(k, False), paged_layouts(pool, 16, False)):
            layout, cut = fit(layouts, q, k, biased, vmem_bytes(chip))
            assert cut.all_rows >= G * T
            assert K % (cut.heads * layout.heads) == 0


def test_an_unknown_chip_is_refused():
    inputs, queries, slots = arrays()
    with pytest.raises(ValueError, match="chip='v3'; allowed: v4, v5e"):
        decode_attention(*inputs, SCORING, queries, slots, chip="v3")


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_anything(data):
    """Heads, tokens, lengths, window, sinks, segments and bias, of a cache, a ring or pages."""
    draw = data.draw
    K, G, B, page = (
        draw(st.sampled_from(x)) for x in ((1, 2, 3), (1, 2, 4), (1, 3), (16, 64, 256))
    )
    form = draw(st.sampled_from(["dense", "ring", "pages"]))
    S = page * draw(st.integers(1, 600 // page)) if form == "pages" else draw(st.integers(1, 600))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    (q, k, v), queries, slots = arrays(
        *(draw(st.integers(0, 99)), B, K * G, K, draw(st.sampled_from([1, 2, 5, 9, 40])), S),
        *(draw(st.sampled_from([64, 80, 128, 192])), dtype),
        bias=draw(st.booleans()) and G <= 2,
    )
    rng = np.random.default_rng(S)
    if not decode_inputs.bias_fits(*q.shape[1:3], 2 * K * k.shape[3] * k.dtype.itemsize):
        slots = slots._replace(bias=None)
    if form == "ring":
        turned = jnp.roll(slots.positions, draw(st.integers(0, S)), 1)
        slots = slots._replace(positions=jnp.where(rng.random((B, S)) < 0.1, -1, turned))
    if draw(st.booleans()):  # below 0, among the keys and after them
        queries = Queries(jnp.asarray(rng.integers(-2, S + 9, (B, q.shape[2]))))
    if draw(st.booleans()):
        queries = queries._replace(segment_ids=jnp.asarray(rng.integers(0, 3, (B, q.shape[2]))))
        slots = slots._replace(segment_ids=jnp.asarray(np.sort(rng.integers(0, 3, (B, S)))))
    if draw(st.booleans()):
        slots = slots._replace(lengths=jnp.asarray(rng.integers(0, S + 300, B)))
    window = draw(st.none() | st.integers(1, S + 9))
    sinks = draw(st.sampled_from([0, 4, 999])) if window else 0
    scoring = Scoring(0.1, draw(st.none() | st.floats(0.5, 9)), window, sinks)
    if form != "pages":
        return agree((q, k, v), queries, slots, scoring)
    # A pool of fewer pages than the rows have: some are in several places.
    table = jnp.asarray(rng.integers(0, 5, (B, S // page)))
    pool = [random(rng, 5, K, page, k.shape[3], dtype=k.dtype) for _ in "kv"]
    dense = [x[table].swapaxes(1, 2).reshape(k.shape) for x in pool]
    run = functools.partial(paged_decode_attention, interpret=INTERPRET)
    actual = jax.jit(run, static_argnums=4)(q, *pool, table, scoring, queries, slots)
    expected = reference(q, *dense, scoring, queries, slots)
    return assert_close(actual, expected, TOLERANCE[dtype])


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
        {**LIKE_8B, "batch": 8, "capacity": 32768, "ragged": True, "biased": True},
        {**LIKE_70B, "batch": 1, "capacity": 2000, "queries": 16, "biased": True},
        {**LIKE_70B, "batch": 1, "capacity": 1 << 20, "queries": 128},
        {**LIKE_70B, "batch": 1, "capacity": 8200, "queries": 128, "head_dim": 256, **FLOAT32},
    ],
    ids=[
        *("8B_32k_ragged", "70B_1M", "70B_32k_tree", "8B_32k_float8", "odd", "bias", "bias_tree"),
        *("70B_tree_of_128", "tree_of_128_float32_256"),
    ],
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
        {**LIKE_8B, "batch": 2, "capacity": 8192, "page": 2048, "head_dim": 256, **FLOAT32},
        {"heads": 1, "head_dim": 128, "batch": 8, "capacity": MOST_PAGES * 16, "page": 16},
    ],
    ids=["8B_32k", "70B_1M", "long_pages", "most_pages"],
)
def test_pages_compile(topology, sizes):
    compiles("kernel_programs_decode:paged_decode", sizes, topology)
