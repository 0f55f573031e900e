"""Attention to quantized zones against its oracle, in TPU interpret mode."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

import kernels.quantized_decode_attention
from kernels.kv_quantize.reference import quantize_keys, quantize_values
from kernels.quantized_decode_attention import Zone, quantized_decode_attention, reference
from tests.kernels.aot import compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, RACES, assert_close, random

# float32: sums in another order, over codes + offset, up to 8 times as large as the numbers.
# bfloat16: q·scale and p·scale are rounded to 8 bits, then multiplied by codes + offset; with 2
# bits the offset is as large as the range, 3 times the numbers (other bits: less).
TOLERANCE = {"float32": 3e-5, "bfloat16": 4e-2}
STAIRCASE = ((None, 128), (8, 128), (4, 256), (2, 128))


def make(zones, seed=0, B=2, N=4, K=2, T=1, H=128, dtype="float32", group=(32, 64), segments=False):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    q = random(rng, B, N, T, H, dtype=dtype)
    found, start = [], 0
    for bits, S in zones:
        k, v = (random(rng, B, K, S, H, dtype=dtype) for _ in range(2))
        if bits:
            k, v = quantize_keys(k, bits, group[0]), quantize_values(v, bits, group[1])
        positions = jnp.broadcast_to(start + jnp.arange(S, dtype=jnp.int32), (B, S))
        found.append(Zone(k, v, positions, 1 + positions // 200 if segments else None))
        start += S
    # The first query does not see the last keys.
    q_positions = start - 20 + 10 * jnp.arange(T, dtype=jnp.int32)
    return q, found, jnp.broadcast_to(q_positions, (B, T))


def agree(q, zones, q_positions, **options):
    static = {k: v for k, v in options.items() if not isinstance(v, jax.Array)}
    traced = {k: v for k, v in options.items() if k not in static}
    run = jax.jit(
        functools.partial(quantized_decode_attention, **static, scale=0.1, interpret=INTERPRET)
    )
    actual = run(q, zones, q_positions=q_positions, **traced)
    assert actual[0].dtype == q.dtype
    expected = reference(q, zones, q_positions=q_positions, **options, scale=0.1)
    assert_close(actual, expected, TOLERANCE[str(q.dtype)])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zones", [((8, 128),), ((4, 128),), ((2, 128),)], ids=str)
def test_precisions(zones, dtype):
    agree(*make(zones, dtype=dtype))


def test_a_staircase_has_one_softmax():
    agree(*make(STAIRCASE, dtype="bfloat16", N=2, K=1))


@pytest.mark.slow
@pytest.mark.parametrize("group", [(128, 128), (16, 16)], ids=str)
def test_groups(group):
    agree(*make(((4, 256),), group=group))


def test_heads_of_64_and_a_tree_of_queries():
    agree(*make(((4, 256), (None, 128)), H=64, N=6, T=5))


def test_one_sequence_is_split():
    agree(*make(((8, 128), (4, 128)), B=1))


def test_several_blocks_of_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels.quantized_decode_attention, "BLOCK_TOKENS", 256)
    monkeypatch.setattr(kernels.quantized_decode_attention, "MOST_SCORES", 1024)
    agree(*make(((4, 512), (None, 256)), N=2))


def test_window_sinks_softcap_alibi():
    slopes = jnp.array([0.5, 0.25, 0.1, 0.01])
    agree(*make(((4, 256), (None, 128))), window=300, num_sinks=4, softcap=3.0, slopes=slopes)


def test_empty_slots_and_segments():
    q, zones, at = make(((4, 128), (8, 256)), segments=True, T=2)
    positions = zones[1].positions.at[:, 50:70].set(-1)
    zones[1] = Zone(zones[1].keys, zones[1].values, positions, zones[1].segment_ids)
    agree(q, zones, at, q_segment_ids=jnp.array([[1, 2], [2, 1]]))


def test_no_races():
    q, zones, at = make(((None, 128), (4, 128)), B=1, N=1, K=1)
    quantized_decode_attention(q, zones, q_positions=at, scale=0.1, interpret=RACES)
    assert not interpret_pallas_call.races.races_found


def test_errors_name_what_is_allowed():
    q, zones, at = make(((4, 128), (8, 128)))
    attend = functools.partial(quantized_decode_attention, q_positions=at, scale=0.1)
    with pytest.raises(ValueError, match="at least one Zone"):
        attend(q, [])
    with pytest.raises(ValueError, match="keys of 4, values of 8; allowed: equal precision"):
        attend(q, [Zone(zones[0].keys, zones[1].values, zones[0].positions)])
    with pytest.raises(ValueError, match="allowed: N a multiple of k's K=2"):
        attend(q[:, :3], zones)
    with pytest.raises(ValueError, match="S a multiple of 128"):
        k = jnp.zeros((2, 2, 100, 128))
        attend(q, [Zone(k, k, zones[0].positions[:, :100])])


@pytest.mark.slow
@hypothesis.given(st.data())
def test_anything(data):
    zone = st.tuples(st.sampled_from([None, 8, 4, 2]), st.sampled_from([128, 256, 384]))
    zones = data.draw(st.lists(zone, min_size=1, max_size=4))
    K, G = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    group = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.sampled_from([16, 32, 64]))
    q, zones, at = make(
        *(zones, data.draw(st.integers(0, 99)), data.draw(st.integers(1, 2)), K * G, K),
        T=data.draw(st.integers(1, 5)),
        H=data.draw(st.sampled_from([64, 128])),
        dtype=data.draw(st.sampled_from(["float32", "bfloat16"])),
        group=group,
    )
    agree(q, zones, at, window=data.draw(st.none() | st.integers(1, 500)))


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1", "tpu7x:2x2x1"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "sizes", [{"batch": 1, "capacity": 1 << 20}, {"batch": 8, "capacity": 2048, "queries": 16}]
)
def test_compiles(topology, bits, sizes):
    sizes = {"heads": 8, "head_dim": 128, "bits": bits, **sizes}
    compiles("kernel_programs_decode:quantized_decode_attention", sizes, topology)
