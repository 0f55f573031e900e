"""The flash attention kernels in TPU interpret mode against attention as it is written on paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import flash_attention, reference
from kernels.flash_attention.blocks import TABLE, Blocks, choose_blocks
from kernels.flash_attention.pattern import Band
from kernels.flash_attention.segments import block_bounds
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu

# float32 sums of up to 768 terms in another order; bfloat16 has 8 bits, and p is rounded to it.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
SMALL = Blocks(128, 128, 128, 128, 256)
PACKED = np.repeat([1, 2, 3, 0], [130, 100, 200, 70]).astype(np.int32)
SCATTERED = np.array([0, 5, 2, 5])[np.arange(384) // 96].astype(np.int32)

# The first in every run, the others with -m slow: five seconds each.
CASES = {
    "causal_ragged": {"length": 300, "blocks": (Blocks(256, 128, 128, 128, 384), SMALL)},
    "lookahead_softcap": {"ahead": 40, "window": 70, "softcap": 2.0},
    "packed_window": {"segment_ids": PACKED, "length": 500, "window": 90},
    "grouped_bfloat16": {"heads": (4, 2), "dtype": jnp.bfloat16, "length": 256},
    "full_dim_80": {"ahead": None, "length": 200, "head_dim": 80},
    "window": {"window": 200, "length": 512},
    "window_of_one_block": {"window": 128, "length": 512},
    "backward_window": {"ahead": None, "window": 100, "length": 300},
    "packed": {"segment_ids": PACKED, "length": 500},
    "packed_full": {"segment_ids": PACKED, "length": 500, "ahead": None},
    "scattered": {"segment_ids": SCATTERED, "length": 384},
    "one_head": {"heads": (1, 1)},
    "dim_96": {"head_dim": 96},
    "dim_192": {"head_dim": 192, "length": 256},
    "dim_256": {"head_dim": 256, "length": 256},
    "bfloat16_packed": {"dtype": jnp.bfloat16, "segment_ids": PACKED, "length": 500},
    "own_blocks": {"length": 700, "blocks": None},
    "longer_blocks_backward": {"blocks": (SMALL, Blocks(256, 128, 128, 128, 256))},
}
IN_EVERY_RUN = 5


def arrays(length, heads, head_dim, dtype, batch=1):
    N, K = heads
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(N, length, head_dim), *[(K, length, head_dim)] * 2, (N, length, head_dim)]
    return [jax.random.normal(k, (batch, *s), dtype) for k, s in zip(keys, shapes, strict=True)]


def compare(
    *, length=384, heads=(2, 1), head_dim=64, dtype=jnp.float32, blocks=(SMALL, SMALL), **options
):
    """Output, log-sum-exp and all gradients, the log-sum-exp's cotangent too."""
    q, k, v, d_out = arrays(length, heads, head_dim, dtype)
    d_lse = jax.random.normal(jax.random.key(9), q.shape[:3])
    ids = options.pop("segment_ids", None)
    ids = None if ids is None else jnp.asarray(ids)[None]
    if ids is not None:
        d_lse = jnp.where(ids[:, None] == 0, 0.0, d_lse)  # such a query's is a constant
    options["scale"] = head_dim**-0.5
    kernel = functools.partial(flash_attention, segment_ids=ids, blocks=blocks, **options)
    oracle = functools.partial(reference.flash_attention, segment_ids=ids, **options)
    found, back = jax.vjp(kernel, q, k, v)
    wanted, wanted_back = jax.vjp(oracle, q, k, v)
    pairs = list(zip(found, wanted, strict=True))
    grads = back((d_out, d_lse)), wanted_back((d_out.astype(jnp.float32), d_lse))
    for pair in [*pairs, *zip(*grads, strict=True)]:
        a, b = (np.asarray(x, np.float32) for x in pair)
        some = np.abs(b) < 1e30  # the log-sum-exp of nothing
        assert (a[~some] == b[~some]).all()
        np.testing.assert_allclose(a[some], b[some], atol=TOLERANCE[dtype] * np.abs(b[some]).max())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number >= IN_EVERY_RUN else [])
        for number, name in enumerate(CASES)
    ],
)
def test_kernels_agree_with_the_reference(name):
    parameters = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    with pltpu.force_tpu_interpret_mode(parameters):
        compare(**CASES[name])


def test_no_races(capfd):
    """Two cores share the grid's parallel axes, as on v4, v5p and tpu7x."""
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(parameters):
        ids = np.repeat([1, 2], 128).astype(np.int32)
        compare(length=256, heads=(4, 2), segment_ids=ids)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 600),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    ahead=st.one_of(st.none(), st.just(0), st.integers(0, 300)),
    window=st.one_of(st.none(), st.integers(1, 400)),
    softcap=st.sampled_from([None, 3.0]),
    cuts=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    packed=st.booleans(),
    sizes=st.sampled_from([(128, 128), (256, 128), (256, 256)]),
)
def test_many_drawn_cases(length, heads, ahead, window, softcap, cuts, packed, sizes):
    ids = np.array(cuts)[np.arange(length) * len(cuts) // length].astype(np.int32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        compare(
            length=length,
            heads=heads,
            ahead=ahead,
            window=window,
            softcap=softcap,
            segment_ids=ids if packed else None,
            blocks=(Blocks(*sizes, 128, 128, 256), Blocks(*sizes, 128, 128, 512)),
        )


@settings(deadline=None)
@given(
    ahead=st.one_of(st.none(), st.integers(0, 20)),
    window=st.one_of(st.none(), st.integers(1, 20)),
    block_k=st.integers(1, 4),
    ratio=st.integers(1, 3),
    num_blocks_q=st.integers(1, 6),
)
def test_every_visible_pair_is_visited_once(ahead, window, block_k, ratio, num_blocks_q):
    block_q = block_k * ratio
    band = Band(ahead, window, block_q, block_k, num_blocks_q, num_blocks_q * ratio)
    T = num_blocks_q * block_q
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    seen = np.ones((T, T), bool)
    seen &= (j - i <= ahead) if ahead is not None else True
    seen &= (i - j < window) if window is not None else True
    assert band.num_pairs(T) == seen.sum()
    for block in range(num_blocks_q):
        rows = seen[block * block_q : (block + 1) * block_q]
        whole = range(*(int(x) for x in band.whole(block)))
        edges = [block * ratio + e for e in band.edges()]
        edges = [kb for kb in edges if 0 <= kb < band.num_blocks_k]
        tiles = rows.reshape(block_q, -1, block_k)
        assert list(whole) == [kb for kb in range(band.num_blocks_k) if tiles[:, kb].all()]
        partly = [kb for kb in range(band.num_blocks_k) if tiles[:, kb].any()]
        assert sorted([*whole, *edges]) == partly
        if partly:
            first, last = (int(x) for x in band.visible_blocks(block))
            assert (first, last) == (partly[0], partly[-1])


def test_bounds_of_packed_rows():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0, 0], [7, 0, 7, 0, 0, 0, 4, 4, 4, 4, 4, 7]])
    bounds = block_bounds(ids.astype(jnp.int32), block_q=3, block_k=2)
    assert bounds.tolist() == [
        [[0, 2], [1, 4], [2, 4], [0, 0]],
        [[0, 6], [0, 0], [3, 6], [0, 6]],
    ]


@pytest.mark.parametrize("chip", TABLE)
@pytest.mark.parametrize("length", [1, 128, 1000, 4096, 9000, 11 * 1024, 131072])
def test_sizes_of_blocks(chip, length):
    for b in (b for n in (128, 256, 512, 1024) for b in choose_blocks(length, chip, row_bytes=n)):
        assert b.block_q % b.tile_q == b.block_k % b.tile_k == b.stretch % b.block_k == 0
        assert b.tile_q % 128 == b.tile_k % 128 == b.block_q % b.block_k == 0
        padded = -(-length // b.stretch) * b.stretch
        assert padded <= max(2 * length, 128) and b.stretch <= 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 72}, "head_dim=72; allowed: 64, 80, 96, 128, 192, 256"),
        ({"heads": (3, 2)}, r"\[batch, kv_heads, length, head_dim\], heads a multiple"),
        ({"dtype": jnp.float16}, "dtypes float16, float16, float16; allowed: all bfloat16"),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        compare(**changes)


def test_an_unknown_chip():
    with pytest.raises(ValueError, match="chip='v9'; allowed: v4, v5e, v5p, v6e, tpu7x"):
        choose_blocks(128, "v9", 256)


def test_segment_ids_of_another_shape():
    q, k, v, _ = arrays(128, (2, 1), 64, jnp.float32)
    ids = jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"segment_ids of shape \(1, 5\); allowed: \(1, 128\)"):
        flash_attention(q, k, v, ids, scale=1.0)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bfloat16"), (256, "float32")])
def test_it_compiles_for_every_generation(topology, head_dim, dtype):
    """Several stretches of keys, grouped heads, backward too; the usual keys and the widest."""
    sizes = {"length": 12288, "heads": 2, "kv_heads": 1, "head_dim": head_dim, "dtype": dtype}
    sizes["backward"] = True
    compiles("kernel_programs_attention:flash_attention", sizes, topology)
