"""Attention to quantized zones against its oracle, in TPU interpret mode."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

import kernels.quantized_decode_attention
from kernels import kv_quantize
from kernels.decode_attention.blocks import Cut
from kernels.kv_quantize.reference import quantize_keys, quantize_values
from kernels.quantized_decode_attention import (
    Queries,
    Scoring,
    Slots,
    Zone,
    divided,
    quantized_decode_attention,
    reference,
)
from tests.kernels.aot import LIKE_8B, LIKE_70B, TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, RACES, assert_close, random

# float32: sums in another order, over codes + offset, up to 8 times as large as the numbers.
# bfloat16: q·scale and p·scale are rounded to 8 bits before they meet the codes, and so is the
# result: 2**-8 of numbers of order 1; seldom all errors go one way.
TOLERANCE = {"float32": 3e-5, "bfloat16": 1.5e-2}
STAIRCASE = ((None, 128), (8, 128), (4, 128), (2, 128))
WIDE_FLOAT32 = {"head_dim": 256, "query_dtype": "float32", "group": 16}
FLOAT8 = (("float8", 128), (4, 128))


# Traced: one small operation after the other takes longer than the kernel.
to_keys = jax.jit(quantize_keys, static_argnums=(1, 2))
to_values = jax.jit(quantize_values, static_argnums=(1, 2))
to_float8 = jax.jit(kv_quantize.to_float8)


wanted = jax.jit(reference, static_argnums=2)
SCORING = Scoring(0.1)


def make(zones, seed=0, B=2, N=4, K=2, T=1, H=128, dtype="float32", group=(32, 64), more=()):
    """`more` of "segments" and "bias"."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    q = random(rng, B, N, T, H, dtype=dtype)
    found, start = [], 0
    for bits, S in zones:
        k, v = (random(rng, B, K, S, H, dtype=dtype) for _ in range(2))
        if bits == "float8":
            k, v = to_float8(k), to_float8(v)
        elif bits:
            k, v = to_keys(k, bits, group[0]), to_values(v, bits, group[1])
        positions = np.tile(np.arange(start, start + S, dtype=np.int32), (B, 1))
        slots = Slots(jnp.asarray(positions))
        if "segments" in more:
            slots = slots._replace(segment_ids=jnp.asarray(1 + positions // 200))
        if "bias" in more:
            slots = slots._replace(bias=random(rng, B, N, T, S))
        found.append(Zone(k, v, slots))
        start += S
    # The first query does not see the last keys.
    q_positions = np.tile(start - 20 + 10 * np.arange(T, dtype=np.int32), (B, 1))
    return q, found, Queries(jnp.asarray(q_positions))


def with_slots(zone, **changes):
    return dataclasses.replace(zone, slots=zone.slots._replace(**changes))


def agree(q, zones, queries, scoring=SCORING, chip="v5e"):
    run = functools.partial(quantized_decode_attention, interpret=INTERPRET, chip=chip)
    actual = jax.jit(run, static_argnums=2)(q, zones, scoring, queries)
    assert actual[0].dtype == q.dtype
    expected = wanted(q, zones, scoring, queries)
    assert_close(actual, expected, TOLERANCE[str(q.dtype)])


@pytest.mark.parametrize(
    ("zones", "dtype", "heads"),
    [
        (STAIRCASE, "bfloat16", (1, 1)),
        pytest.param(FLOAT8, "float32", (2, 1), marks=pytest.mark.slow),
        *(
            pytest.param(zones, dtype, (4, 2), marks=pytest.mark.slow)
            for zones in (STAIRCASE, FLOAT8, ((8, 128),), ((4, 128),), ((2, 128),))
            for dtype in ("float32", "bfloat16")
        ),
    ],
    ids=str,
)
def test_precisions_have_one_softmax(zones, dtype, heads):
    agree(*make(zones, dtype=dtype, B=1, N=heads[0], K=heads[1], group=(64, 64)))


def test_rows_lie_anywhere():
    """As those of a layer among those of all layers do."""
    q, zones, queries = make(((None, 128), (4, 128)), B=2, N=2, K=1)

    def stacked(x):
        x = np.asarray(x)
        return np.concatenate([np.zeros_like(x), x[::-1], np.ones_like(x)])

    def run(q, zones, rows):
        given = (q, zones, SCORING, queries)
        return quantized_decode_attention(*given, k_rows=rows, interpret=INTERPRET, chip="v5e")

    among = [
        dataclasses.replace(z, **jax.tree.map(stacked, {"keys": z.keys, "values": z.values}))
        for z in zones
    ]
    actual = jax.jit(run)(q, among, jnp.array([3, 2]))
    assert_close(actual, wanted(q, zones, SCORING, queries), TOLERANCE["float32"])


@pytest.mark.parametrize(
    "chip", ["v6e", *(pytest.param(c, marks=pytest.mark.slow) for c in ("v5e", "v4"))]
)
def test_both_widths_of_matrix_units(chip):
    """On v6e 256 tokens meet the queries in one product, elsewhere 128."""
    agree(*make(((2, 256), (4, 384)), B=1, N=2, K=1, group=(32, 64)), chip=chip)


# (heads, rows, tiles, tile): both axes in pieces, and a loop in each; then one by one.
CUTS = [
    (2, 2, 2, 16),
    *(pytest.param(c, marks=pytest.mark.slow) for c in ((2, 1, 1, 40), (1, 3, 1, 16))),
]


@pytest.mark.parametrize(
    ("S", "longest", "group", "expected"),
    [
        (32768, 8192, 64, (16384, 8192)),  # two tiles
        (32768, 1024, 64, (16384, 1024)),  # a loop
        (8192, 256, 64, (512, 256)),  # a loop's tile would start within a register: two again
        (128 * 131, 8192, 64, (128 * 131, 128)),  # no other divisor but 128: scales of two rows
        (384, 8192, 128, (384, 384)),
    ],
)
def test_blocks_and_tiles(S, longest, group, expected):
    assert divided(S, 16384, longest, group) == expected


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_queries_in_pieces(cut, monkeypatch):
    """As where VMEM is too small for the state of all: 40 rows a head."""
    monkeypatch.setattr(kernels.quantized_decode_attention, "cuts", lambda *_: [Cut(*cut)])
    q, zones, queries = make(((4, 128), (None, 128)), B=1, T=20, H=64)
    agree(q, [with_slots(z, lengths=jnp.array([100])) for z in zones], queries)


@pytest.mark.slow
@pytest.mark.parametrize("group", [(128, 128), (16, 16)], ids=str)
def test_groups(group):
    agree(*make(((4, 256),), group=group))


@pytest.mark.slow
def test_heads_of_64_and_a_tree_of_queries():
    agree(*make(((4, 256), (None, 128)), H=64, N=6, T=5))


@pytest.mark.parametrize(
    "zones",
    [
        ((2, 512),),
        pytest.param(((4, 512), (8, 384), (None, 256)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_past_the_lengths_are_not_read(zones, monkeypatch):
    """Several blocks of several tiles; what is not in use is no number, were it looked at."""
    monkeypatch.setattr(kernels.quantized_decode_attention, "BLOCK_TOKENS", 256)
    monkeypatch.setattr(kernels.quantized_decode_attention, "MOST_SCORES", 1024)
    q, zones, queries = make(zones, N=2, K=1, H=64, group=(32, 64), more=("bias",))
    first = with_slots(zones[0], lengths=jnp.array([200, 0]))
    expected = wanted(q, [first, *zones[1:]], SCORING, queries)
    nan = kv_quantize.layout.affine_from(jnp.asarray(jnp.nan), jnp.asarray(jnp.nan), 2)
    keys, values = (np.array(x.affine) for x in (first.keys, first.values))
    keys[:, :, 256 // first.keys.group :] = nan
    values[..., 256:] = nan
    first = dataclasses.replace(
        first,
        keys=dataclasses.replace(first.keys, affine=keys),
        values=dataclasses.replace(first.values, affine=values),
    )
    run = functools.partial(quantized_decode_attention, interpret=INTERPRET)
    actual = jax.jit(run, static_argnums=2)(q, [first, *zones[1:]], SCORING, queries)
    assert_close(actual, expected, TOLERANCE["float32"])


def test_window_sinks_softcap_bias_segments_and_empty_slots():
    """A bias in one zone and none in the other."""
    q, zones, queries = make(
        ((4, 256), (None, 128)), more=("segments", "bias"), B=1, N=2, K=1, T=2, H=64
    )
    empty = zones[0].slots.positions.at[:, 50:70].set(-1)
    zones = [with_slots(zones[0], positions=empty), with_slots(zones[1], bias=None)]
    queries = queries._replace(segment_ids=jnp.array([[1, 2]]))
    agree(q, zones, queries, Scoring(0.1, softcap=3.0, window=180, num_sinks=4))


@pytest.mark.parametrize(
    "zones",
    [((4, 256),), *(pytest.param(z, marks=pytest.mark.slow) for z in (STAIRCASE, FLOAT8))],
    ids=str,
)
def test_no_races(zones, monkeypatch):
    monkeypatch.setattr(kernels.quantized_decode_attention, "BLOCK_TOKENS", 128)
    q, zones, queries = make(zones, B=1, N=1, K=1, H=64, group=(32, 32))
    zones = [with_slots(zones[0], lengths=jnp.array([100])), *zones[1:]]
    run = functools.partial(quantized_decode_attention, interpret=RACES)
    jax.jit(run, static_argnums=2)(q, zones, SCORING, queries)
    assert not interpret_pallas_call.races.races_found


def test_errors_name_what_is_allowed():
    q, zones, queries = make(((4, 128), (8, 128)))

    def attend(q, zones):
        quantized_decode_attention(q, zones, SCORING, queries)

    with pytest.raises(ValueError, match="at least one Zone"):
        attend(q, [])
    with pytest.raises(ValueError, match=r"zones of S=.*; allowed: .*: fewer zones"):
        quantized_decode_attention(q, zones[:1] * 300, SCORING, queries, chip="v4")
    with pytest.raises(
        ValueError, match="keys of 4 bits, values of 8 bits; allowed: equal precision"
    ):
        attend(q, [Zone(zones[0].keys, zones[1].values, zones[0].slots)])
    with pytest.raises(ValueError, match="allowed: N a multiple of k's K=2"):
        attend(q[:, :3], zones)
    with pytest.raises(ValueError, match=r"lengths of shape \(3,\); allowed: \(2,\)"):
        attend(q, [with_slots(z, lengths=jnp.zeros(3, jnp.int32)) for z in zones])
    with pytest.raises(ValueError, match="S a multiple of 128"):
        k = jnp.zeros((2, 2, 100, 128))
        attend(q, [Zone(k, k, Slots(zones[0].slots.positions[:, :100]))])
    with pytest.raises(ValueError, match="segment_ids; allowed: of the queries and of all slots"):
        attend(q, [with_slots(z, segment_ids=jnp.ones((2, 128), jnp.int32)) for z in zones])


def replaced(zone, part, **changes):
    return dataclasses.replace(zone, **{part: dataclasses.replace(getattr(zone, part), **changes)})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "keys",
            {"group": 64},
            r"keys.affine=int32\(2, 2, 4, 128\); allowed: int32\(2, 2, 2",
        ),
        ("keys", {"group": 0}, "keys.group=0; allowed: 16, 32, 64, 128"),
        ("values", {"group": 128}, r"values.affine=int32\(2, 2, 2, 128\); allowed: int32\(2, 2, 1"),
        ("values", {"affine": jnp.zeros((2, 2, 2, 128))}, r"values.affine=float32\(2, 2, 2, 128\)"),
        (
            "keys",
            {"codes": jnp.zeros((2, 2, 16, 128), jnp.int8)},
            "codes=int8.*; allowed: int32",
        ),
        ("keys", {"codes": jnp.zeros((2, 2, 9, 128), jnp.int32)}, "rows a multiple of 16"),
        ("keys", {"bits": 3}, "keys of 3 bits, values of 4 bits; allowed: equal precision"),
    ],
)
def test_scales_that_do_not_fit_are_refused(part, change, message):
    """Else they would be read as those of other groups: wrong numbers, and no error."""
    q, [zone], queries = make(((4, 128),))
    with pytest.raises(ValueError, match=message):
        quantized_decode_attention(q, [replaced(zone, part, **change)], SCORING, queries)


def test_zones_that_do_not_belong_together_are_refused():
    q, [two], queries = make(((None, 128),))
    _, [four], _ = make(((None, 128),), K=4)
    with pytest.raises(ValueError, match="zones of K=2 and K=4; allowed: one K in all zones"):
        quantized_decode_attention(q, [two, four], SCORING, queries)
    _, [kept], _ = make((("float8", 128),))
    wrong = replaced(kept, "keys", scale=jnp.zeros((2, 2, 128, 1)))
    with pytest.raises(ValueError, match=r"keys.scale=float32\(2, 2, 128, 1\); allowed: float32\("):
        quantized_decode_attention(q, [wrong], SCORING, queries)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_anything(data):
    """Bits and sizes of zones, heads, tokens, lengths, window, sinks, soft cap, segments, bias."""
    draw = data.draw
    zone = st.tuples(st.sampled_from([None, "float8", 8, 4, 2]), st.sampled_from([128, 256, 384]))
    zones = draw(st.lists(zone, min_size=1, max_size=4))
    K, G, T = (draw(st.sampled_from(x)) for x in ((1, 2), (1, 2, 4), (1, 2, 5, 40)))
    group = draw(st.sampled_from([16, 32, 64, 128])), draw(st.sampled_from([16, 32, 64]))
    # Not larger than the smallest cache: 2 bits, head_dim 64.
    kinds = [(), ("segments",)] + [("bias",), ("bias", "segments")] * (G * T <= 9)
    q, zones, queries = make(
        *(zones, draw(st.integers(0, 99)), draw(st.integers(1, 2)), K * G, K),
        T=T,
        H=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        group=group,
        more=(more := draw(st.sampled_from(kinds))),
    )
    rng = np.random.default_rng(T)
    if "segments" in more:
        queries = queries._replace(segment_ids=jnp.asarray(rng.integers(0, 4, (len(q), T))))
    if draw(st.booleans()):
        zones = [with_slots(z, lengths=jnp.asarray(rng.integers(0, 400, len(q)))) for z in zones]
    window = draw(st.none() | st.integers(1, 500))
    sinks = draw(st.sampled_from([0, 4, 999])) if window else 0
    agree(q, zones, queries, Scoring(0.1, draw(st.none() | st.floats(0.5, 9)), window, sinks))


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        {**LIKE_8B, "batch": 8, "capacity": 32768, "ragged": True},
        {**LIKE_70B, "batch": 1, "capacity": 1 << 20},
        {**LIKE_70B, "batch": 8, "capacity": 2048, "queries": 16},
        {**LIKE_8B, "batch": 8, "capacity": 32768, "ragged": True, "biased": True},
        {**LIKE_70B, "batch": 1, "capacity": 8192, "queries": 128},
        {**LIKE_70B, "batch": 1, "capacity": 8192, "queries": 128, **WIDE_FLOAT32},
    ],
    ids=[
        *("8B_32k_ragged", "70B_1M", "70B_2k_tree", "bias"),
        *("70B_tree_of_128", "tree_of_128_float32_256"),
    ],
)
def test_compiles(topology, bits, sizes):
    compiles("kernel_programs_decode:quantized_decode_attention", {**sizes, "bits": bits}, topology)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float8_compiles(topology):
    sizes = {"batch": 8, "capacity": 32768, "heads": 8, "head_dim": 128}
    compiles("kernel_programs_decode:scaled_decode_attention", sizes, topology)


def test_numbers_of_float8_and_back():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 64)) * np.logspace(-4, 4, 3)[:, None]
    x[0, 0, 1] = 0.0
    x = x.astype(np.float32)
    kept = to_float8(x)
    error = np.abs(np.asarray(jax.jit(kv_quantize.from_float8)(kept)) - x)
    # Half of the last of three bits of a mantissa, or of the smallest number; 1e-6: float32.
    bound = np.maximum(np.abs(x) / 16, np.asarray(kept.scale)[..., None] / 1024) * (1 + 1e-6)
    assert (error <= bound).all()
