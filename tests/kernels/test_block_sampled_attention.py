"""The block-sampled attention kernels in TPU interpret mode against a mask over all pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.block_sampled_attention import (
    Sample,
    block_sampled_attention,
    decaying_probabilities,
    reference,
    sample_distances,
)
from kernels.block_sampled_attention.sampling import NOWHERE
from kernels.flash_attention import flash_attention
from kernels.flash_attention.blocks import Blocks
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import random
from tests.kernels.test_flash_attention import TOLERANCE, assert_near

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")


def draw(num_blocks, *distances, log_weights=None):
    weights = [0.0] * len(distances) if log_weights is None else log_weights
    drawn = jnp.asarray(distances, jnp.int32), jnp.asarray(weights, jnp.float32)
    return Sample(*drawn, num_blocks)


def with_gradients(attend, arrays, cotangents):
    """Output, log-sum-exp, dq, dk and dv."""

    def run(q, k, v):
        found, back = jax.vjp(attend, q, k, v)
        return *found, *back((cotangents[0].astype(found[0].dtype), cotangents[1]))

    return jax.jit(run)(*arrays)


def arrays(length, heads, head_dim, dtype, batch=1):
    rng, (N, K) = np.random.default_rng(0), heads
    q, k, v, d_out = (random(rng, batch, n, length, head_dim, dtype=dtype) for n in (N, K, K, N))
    return (q, k, v), (d_out, random(rng, *q.shape[:3]))


def near(found, wanted, dtype):
    for pair in zip(found, wanted, strict=True):
        assert_near(*pair, TOLERANCE[jnp.dtype(dtype).name])


def compare(
    sample, *, length=384, heads=(1, 1), head_dim=64, dtype=jnp.float32, mode=STRICT, **options
):
    x, (d_out, d_lse) = arrays(length, heads, head_dim, dtype)
    options = {"scale": head_dim**-0.5, "block": 128, "sample": sample, **options}
    if (ids := options.get("segment_ids")) is not None:
        d_lse = jnp.where(ids[:, None] == 0, 0.0, d_lse)  # that of padding is a constant
    given = x, (d_out, d_lse)
    with pltpu.force_tpu_interpret_mode(mode):
        found = with_gradients(functools.partial(block_sampled_attention, **options), *given)
    oracle = functools.partial(reference.block_sampled_attention, **options)
    near(found, with_gradients(oracle, *given), dtype)


# The first two in every run, the others with -m slow.
CASES = {
    "sinks": {
        "sample": draw(4, 2, NOWHERE, log_weights=[0.7, 0.1]),
        "sink_blocks": 1,
        "length": 500,
        "heads": (2, 1),
    },
    "packed": {
        "sample": draw(4, 1, 3, log_weights=[0.4, 0.2]),
        "segment_ids": jnp.repeat(jnp.array([[3, 1, 0]], jnp.int32), jnp.array([150, 300, 50]), 1),
        "sink_blocks": 1,
        "length": 500,
        "heads": (2, 1),
    },
    "no_sinks": {"sample": draw(4, 1, 3), "length": 512},
    "own_block_only": {"sample": draw(3)},
    "all_are_sinks": {"sample": draw(3, 1), "sink_blocks": 7},
    "bfloat16": {"sample": draw(4, 2, 3), "dtype": jnp.bfloat16, "length": 512, "sink_blocks": 1},
    "tiles_in_a_block": {"sample": draw(3, 1), "block": 256, "length": 600},
    "tiles_of_two_sizes": {"sample": draw(3, 1), "block": 512, "length": 1100},
    "dim_192": {"sample": draw(3, 1), "head_dim": 192},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number > 1 else [])
        for number, name in enumerate(CASES)
    ],
)
def test_kernels_agree_with_the_reference(name):
    compare(**CASES[name])


def test_full_probability_is_flash_attention():
    (q, k, v), _ = arrays(256, (1, 1), 64, jnp.float32)
    sample = sample_distances(jax.random.key(3), (1.0, 1.0))
    small = Blocks(128, 128, 128, 128, 256)

    @jax.jit
    def sampled(q, k, v):
        return block_sampled_attention(q, k, v, sample, scale=0.125, block=128)

    @jax.jit
    def whole(q, k, v):
        return flash_attention(q, k, v, scale=0.125, chip="v5e", blocks=(small, small))

    with pltpu.force_tpu_interpret_mode(STRICT):
        found, wanted = sampled(q, k, v), whole(q, k, v)
    near(found, wanted, jnp.float32)


def test_no_races(capfd):
    """Two cores share the grid's parallel axes, as on v4, v5p and tpu7x."""
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    compare(draw(2, 1), length=256, sink_blocks=1, mode=mode)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_no_races_between_heads_of_a_group(capfd):
    """Three blocks: drawn ones, a sink and one that the sample has no block for."""
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    compare(draw(3, 1, NOWHERE), heads=(4, 2), sink_blocks=1, mode=mode)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 640),
    head_dim=st.sampled_from([64, 80, 96, 128, 192, 256]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    sink_blocks=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
    most=st.integers(1, 5),
    probability=st.sampled_from([0.2, 0.6, 1.0]),
    packed=st.booleans(),
)
def test_many_drawn_cases(
    length, head_dim, dtype, heads, sink_blocks, seed, most, probability, packed
):
    blocks = -(-length // 128)
    probabilities = (1.0, *[probability] * (blocks - 1))
    sample = sample_distances(jax.random.key(seed), probabilities, most=most)
    sizes = {"length": length, "head_dim": head_dim, "heads": heads}
    ids = jnp.asarray(np.random.default_rng(seed).integers(0, 4, (1, length)), jnp.int32)
    packing = {"segment_ids": ids.sort()} if packed else {}
    compare(sample, **sizes, dtype=dtype, sink_blocks=sink_blocks, **packing)


def test_the_draw_follows_from_the_key():
    probabilities = decaying_probabilities(64)
    first, again, other = (sample_distances(jax.random.key(n), probabilities) for n in (1, 1, 2))
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.distances.tolist() != other.distances.tolist()
    drawn = [d for d in first.distances.tolist() if d < 64]
    assert drawn == sorted(set(drawn)) and drawn[0] == 1 and len(drawn) < 40
    padding = len(first.distances) - len(drawn)
    assert first.distances.tolist() == drawn + [NOWHERE] * padding
    log_p = np.log([probabilities[d] for d in drawn])
    np.testing.assert_allclose(first.log_weights, [*-log_p, *[0] * padding], rtol=1e-6)


def test_what_the_scores_rise_by_makes_up_for_what_is_left_out():
    """On average over draws, a distance counts as often as in full attention."""
    draws, probabilities = 4000, (1.0, 0.5, 0.2)
    keys = jax.random.split(jax.random.key(0), draws)
    sample = jax.vmap(lambda key: sample_distances(key, probabilities, most=3))(keys)
    for distance, p in enumerate(probabilities[1:], 1):
        counts = jnp.where(sample.distances == distance, jnp.exp(sample.log_weights), 0.0).sum(1)
        four_deviations = 4 * np.sqrt((1 / p - 1) / draws)
        assert abs(float(counts.mean()) - 1) <= four_deviations + 1e-6


def test_the_nearest_stay_where_places_are_few():
    sample = sample_distances(jax.random.key(0), (1.0,) * 9, most=3, reweight=False)
    assert sample.distances.tolist() == [1, 2] and not sample.log_weights.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decaying_probabilities(0), "num_blocks=0; allowed: at least 1"),
        (lambda: decaying_probabilities(4, exponent=-1), "exponent=-1; allowed: at least 0"),
        (lambda: decaying_probabilities(4, least=0), "least=0; allowed: above 0, at most 1"),
        (
            lambda: sample_distances(jax.random.key(0), (1.0, 0.0)),
            r"probabilities\[1\]=0.0; allowed: above 0, at most 1",
        ),
        (
            lambda: sample_distances(jax.random.key(0), (0.5,)),
            r"probabilities\[0\]=0.5; allowed: 1, or",
        ),
        (
            lambda: sample_distances(jax.random.key(0), (1.0,), most=0),
            "most=0; allowed: at least 1",
        ),
    ],
)
def test_what_cannot_be_drawn(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 72}, "head_dim=72; allowed: 64, 80, 96, 128, 192, 256"),
        ({"heads": (3, 2)}, r"\[batch, kv_heads, length, head_dim\], heads a multiple"),
        ({"dtype": jnp.float16}, "dtypes float16, float16, float16; allowed: all bfloat16"),
        ({"block": 100}, "block=100; allowed: 128, 256, 512, 1024"),
        ({"sink_blocks": -1}, "sink_blocks=-1; allowed: an integer >= 0"),
        ({"sink_blocks": 0.5}, "sink_blocks=0.5; allowed: an integer >= 0"),
        ({"scale": float("nan")}, "scale=nan; allowed: a finite Python number"),
        (
            {"sample": draw(3, 1, log_weights=[])},
            r"sample of int32\(1,\) and float32\(0,\); allowed",
        ),
        ({"sample": draw(4, 3)}, "sample.num_blocks=4; allowed: 3, as length=384 has of block=128"),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"sample": draw(3), **changes})


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bfloat16"), (256, "float32")])
def test_it_compiles_for_every_generation(topology, head_dim, dtype):
    """Forward and backward, grouped heads; the usual keys and the widest."""
    sizes = {"length": 32768, "heads": 2, "kv_heads": 1, "head_dim": head_dim, "dtype": dtype}
    compiles(
        "kernel_programs_attention:block_sampled_attention", {**sizes, "backward": True}, topology
    )
