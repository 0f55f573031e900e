"""The flash attention kernels in TPU interpret mode against attention as it is written on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import HEAD_DIMS, Fire, Sinks, flash_attention, reference
from kernels.flash_attention.blocks import TABLE, Blocks, choose_blocks
from kernels.flash_attention.segments import count_up
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, races, random
from tests.marks import slow_but

# float32 sums of up to 768 terms in another order: products of float32 are exact here, as on a TPU
# they are with `jax.default_matmul_precision("highest")`. bfloat16 has 8 bits: p is rounded to it.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
SMALL = Blocks(128, 128, 128, 128, 256)
PACKED = np.repeat([1, 2, 3, 0], [130, 100, 200, 70]).astype(np.int32)
TWO = np.repeat([1, 2, 0], [40, 420, 40]).astype(np.int32)
# An id may be any number but 0 and -2³¹.
SCATTERED = np.array([-1, 0, 2, -1])[np.arange(384) // 96].astype(np.int32)

# The first in every run beside test_flash_attention_pairs.py, the others with -m slow: five seconds
# each.
CASES = {
    "fire": {"fire": True, "softcap": 3.0, "length": 300},
    "causal_ragged": {"length": 300, "blocks": (Blocks(256, 128, 128, 128, 384, early=1), SMALL)},
    "scattered": {"segment_ids": SCATTERED, "length": 384},
    "lambda_packed": {"sinks": "far", "window": 140, "segment_ids": TWO, "length": 500},
    "parts_lambda_packed": {
        "parts": 4,
        "sinks": "far",
        "window": 140,
        "segment_ids": np.repeat([1, 2, 0], [40, 420, 52]).astype(np.int32),
        "length": 512,
        "bias": True,
    },
    "packed_prefix_bias": {"prefix": 50, "bias": True, "segment_ids": PACKED, "length": 500},
    "factor": {"factor": True, "softcap": 3.0, "length": 300},
    "lookahead_softcap": {"ahead": 40, "window": 70, "softcap": 2.0},
    "packed_window": {"segment_ids": PACKED, "length": 500, "window": 90},
    "grouped_bfloat16": {"heads": (4, 2), "dtype": jnp.bfloat16, "length": 256},
    "bias": {"bias": True, "softcap": 3.0, "length": 300},
    "bias_full": {"bias": True, "ahead": None, "length": 300},
    "bias_in_three_slabs": {
        "bias": True,
        "length": 300,
        "blocks": (Blocks(384, 384, 128, 384, 384),) * 2,
    },
    "bias_bfloat16": {"bias": True, "dtype": jnp.bfloat16},
    "bias_on_v4": {"bias": True, "chip": "v4", "length": 300},
    "bias_of_alibi": {"bias": True, "learned_bias": False},
    "factor_and_bias": {"factor": True, "bias": True, "length": 300, "heads": (4, 2)},
    "factor_lambda": {
        "factor": True,
        "sinks": "far",
        "window": 140,
        "segment_ids": TWO,
        "length": 500,
        "dtype": jnp.bfloat16,
    },
    "factor_on_v4": {"factor": True, "chip": "v4", "length": 300, "head_dim": 96},
    "fire_packed": {"fire": True, "segment_ids": PACKED, "length": 500, "heads": (4, 2)},
    "fire_bfloat16": {"fire": True, "length": 600, "dtype": jnp.bfloat16, "head_dim": 128},
    "fire_full_on_v4": {"fire": True, "ahead": None, "chip": "v4", "length": 300},
    "fire_window_and_all_else": {
        "fire": True,
        "bias": True,
        "factor": True,
        "window": 200,
        "length": 500,
        "head_dim": 80,
        "blocks": (Blocks(256, 256, 256, 128, 512), Blocks(256, 256, 128, 256, 256)),
    },
    "fire_prefix": {"fire": True, "prefix": 200, "segment_ids": PACKED, "length": 500},
    "prefix": {"prefix": 200, "length": 500},
    "prefix_of_all": {"prefix": 900, "length": 300},
    "sinks": {"sinks": "near", "window": 128, "length": 500},
    "many_sinks": {
        "sinks": "near",
        "num_sinks": 130,
        "window": 256,
        "length": 500,
        "heads": (1, 1),
    },
    "lambda": {"sinks": "far", "window": 140, "length": 500, "bias": True},
    "lambda_bfloat16": {
        "sinks": "far",
        "window": 140,
        "segment_ids": TWO,
        "length": 500,
        "dtype": jnp.bfloat16,
    },
    "lambda_from_the_middle": {
        "sinks": "far",
        "window": 140,
        "segment_ids": TWO,
        "length": 500,
        "start": 2,
    },
    "full_dim_80": {"ahead": None, "length": 200, "head_dim": 80},
    "window": {"window": 200, "length": 512},
    "window_of_one_block": {"window": 128, "length": 512},
    "backward_window": {"ahead": None, "window": 100, "length": 300},
    "packed": {"segment_ids": PACKED, "length": 500},
    "packed_full": {"segment_ids": PACKED, "length": 500, "ahead": None},
    "one_head": {"heads": (1, 1)},
    "dim_96": {"head_dim": 96},
    "dim_192": {"head_dim": 192, "length": 256},
    "dim_256": {"head_dim": 256, "length": 256},
    "bfloat16_packed": {"dtype": jnp.bfloat16, "segment_ids": PACKED, "length": 500},
    "parts": {"parts": 3, "heads": (4, 2), "blocks": (Blocks(128, 128, 128, 128, 256), SMALL)},
    "parts_bias": {"parts": 2, "bias": True, "length": 512},
    "parts_prefix_packed": {
        "parts": 2,
        "prefix": 50,
        "segment_ids": np.repeat([1, 2, 3, 0], [130, 100, 200, 82]).astype(np.int32),
        "length": 512,
    },
    "parts_prefix": {"parts": 3, "prefix": 200},
    "parts_lambda": {"parts": 2, "sinks": "far", "window": 140, "length": 512},
    "parts_full": {"parts": 3, "ahead": None},
    "parts_backward_window": {"parts": 3, "ahead": None, "window": 100},
    "parts_lookahead": {"parts": 3, "ahead": 40, "window": 70, "blocks": None},
    "parts_of_longer_blocks": {
        "parts": 2,
        "length": 512,
        "window": 200,
        "blocks": (Blocks(256, 128, 128, 128, 384), SMALL),
    },
    "parts_bfloat16": {"parts": 2, "dtype": jnp.bfloat16, "length": 512},
    "own_blocks": {"length": 700, "blocks": None},
    "longer_blocks_backward": {"blocks": (SMALL, Blocks(256, 128, 128, 128, 256))},
}
IN_EVERY_RUN = ("causal_ragged", "scattered", "lambda_packed")


def arrays(length, heads, head_dim, dtype, batch=1):
    rng, (N, K) = np.random.default_rng(0), heads
    return [random(rng, batch, n, length, head_dim, dtype=dtype) for n in (N, K, K, N)]


def of_arrays(function, num_sinks, **options):
    """A function of what has a gradient."""

    def attend(x):
        far = Sinks(
            num_sinks, x.get("q_far"), x.get("k_far"), x.get("far_bias"), x.get("far_factor")
        )
        scores = {name: x.get(name) for name in ("bias", "factor", "fire")}
        sinks = far if num_sinks else None
        return function(x["q"], x["k"], x["v"], sinks=sinks, **scores, **options)

    return attend


def fire_of(positions, heads, width=12):
    """A network whose kinks lie within, before and after the range of its quotients."""
    T, rng = positions.shape[1], np.random.default_rng(3)
    numerator = jnp.log1p(0.1 * jnp.maximum(jnp.arange(1.0 - T, T), 0))
    reciprocal = 1 / jnp.log1p(0.1 * jnp.maximum(positions, 50.0))
    w_in, b_in = (random(rng, width) for _ in "wb")
    w_in, b_in = w_in.at[0].set(0), b_in.at[:8].set(-w_in[:8] * jnp.linspace(0.1, 0.99, 8))
    w_out, b_out = random(rng, heads, width), random(rng, heads)
    return Fire(numerator, reciprocal, w_in, b_in.at[0].set(0.3), w_out, b_out)


def assert_near(a, b, tolerance):
    """Relative to the largest entry."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    some = np.abs(b) < 1e30  # the log-sum-exp of nothing
    assert (a[~some] == b[~some]).all()
    np.testing.assert_allclose(a[some], b[some], atol=tolerance * np.abs(b[some]).max())


def in_parts(parts):
    """`flash_attention` of a stretch of the queries after the other: the interpreter may hang where
    two calls run at a time.
    """

    def attend(q, k, v, *, sinks, **options):
        def of_part(own):
            q, q_far, first = own
            far = sinks and sinks._replace(q=q_far)
            return flash_attention(q, k, v, sinks=far, first_query=first, **options)

        def cut(x):
            return None if x is None else jnp.stack(jnp.split(x, parts, axis=2))

        firsts = jnp.arange(parts, dtype=jnp.int32) * (q.shape[2] // parts)
        found = jax.lax.map(of_part, (cut(q), cut(sinks and sinks.q), firsts))
        return tuple(jnp.concatenate(list(x), 2) for x in found)

    return attend


def results(function, x, cotangents, apart):
    """Outputs and gradients, in few programs: one by one, the operations around the kernels take
    longest to compile. `apart`: the backward pass has two kernels, see `in_parts`.
    """

    def go_back(back, cotangents):
        return back(cotangents)

    found, back = jax.jit(lambda x: jax.vjp(function, x))(x)
    (grads,) = (go_back if apart else jax.jit(go_back))(back, cotangents)
    return found, grads


def more_arrays(rng, x, ids, *, bias, factor, fire, far):
    """What a bias, a factor, FIRE's network or far sinks take beside q [1, heads, length, …]."""
    q, k, more = x["q"], x["k"], {}
    heads, length = q.shape[1:3]
    for name, wanted in (("bias", bias), ("factor", factor)):
        if wanted:
            more[name] = random(rng, heads, 2 * length - 1)
    if factor and far:
        more["far_factor"] = random(rng, heads)
    if fire:
        counted = count_up(jnp.ones((1, length), jnp.int32) if ids is None else ids)
        more["fire"] = fire_of(counted.astype(jnp.float32), heads)
    if far:
        more["q_far"] = random(rng, *q.shape, dtype=q.dtype)
        more["k_far"] = random(rng, *k.shape, dtype=k.dtype)
        more["far_bias"] = random(rng, heads)
    return more


def case_of(
    *,
    length=384,
    heads=(2, 1),
    head_dim=64,
    dtype=jnp.float32,
    blocks=(SMALL, SMALL),
    segment_ids=None,
    bias=False,
    learned_bias,
    factor=False,
    fire=False,
    sinks=None,
    num_sinks=4,
    start=None,
    chip="v5e",
    parts=None,
    **options,
):
    """The kernels and the oracle as functions of what has a gradient, that, and the cotangents of
    the output and of the log-sum-exp.

    `sinks`: "near" as ever, or "far" with queries, keys and a bias of their own. `start`: position
    of each document's first token; None: unsaid. `parts`: that the queries are cut into."""
    q, k, v, d_out = arrays(length, heads, head_dim, dtype)
    rng = np.random.default_rng(9)
    d_lse = random(rng, *q.shape[:3])
    ids = None if segment_ids is None else jnp.asarray(segment_ids)[None]
    if ids is not None:
        d_lse = jnp.where(ids[:, None] == 0, 0.0, d_lse)  # such a query's is a constant
    positions = None if start is None else count_up(ids) + start
    x = {"q": q, "k": k, "v": v}
    x |= more_arrays(rng, x, ids, bias=bias, factor=factor, fire=fire, far=sinks == "far")

    options |= {"scale": head_dim**-0.5, "segment_ids": ids, "positions": positions}
    num_sinks = 0 if sinks is None else num_sinks
    more = {"blocks": blocks, "learned_bias": learned_bias, "chip": chip}
    kernels = flash_attention if parts is None else in_parts(parts)
    kernel = of_arrays(kernels, num_sinks, **options, **more)
    oracle = of_arrays(reference.flash_attention, num_sinks, **options)
    return kernel, oracle, x, (d_out, d_lse)


def assert_sums_up(found, d_out, wanted, softcap):
    """The gradient of FIRE's `b_out`, which all scores have in common: a sum of gradients of both
    signs, off by two roundings of them, not of its own small value. Without a soft cap it is known
    exactly, as each row of a softmax's gradient adds up to its log-sum-exp's cotangent.

    Args:
        wanted: the oracle's output and gradient, and the log-sum-exp's cotangent.
    """
    out, b_out, d_lse = wanted
    summed = np.asarray(np.abs(d_lse) + np.abs(d_out * out).sum(-1), np.float64)
    exact = np.asarray(d_lse, np.float64).sum((0, 2)) if softcap is None else b_out
    roundings = 2 if softcap is None else 4  # the oracle's as well
    atol = roundings * np.finfo(np.float32).eps * summed.sum((0, 2)).max()
    np.testing.assert_allclose(found, exact, rtol=0, atol=atol)


def compare(*, learned_bias=True, **case):
    """Output, log-sum-exp and all gradients, the log-sum-exp's cotangent too."""
    kernel, oracle, x, (d_out, d_lse) = case_of(learned_bias=learned_bias, **case)
    found, grads = results(kernel, x, (d_out, d_lse), apart="sinks" in case)
    exact = d_out.astype(jnp.float32), d_lse
    wanted, wanted_grads = results(oracle, x, exact, apart=False)
    unlearned = ("factor", "far_factor") if learned_bias else ("factor", "far_factor", "bias")
    for name in unlearned:
        if name in x:
            assert (grads.pop(name) == 0).all()
            del wanted_grads[name]
    if "fire" in x and d_out.dtype == jnp.float32:
        d_lse = np.where(np.abs(wanted[1]) < 1e30, d_lse, 0)  # of a query that sees nothing
        of_oracle = wanted[0], wanted_grads["fire"].b_out, d_lse
        assert_sums_up(grads["fire"].b_out, d_out, of_oracle, case.get("softcap"))
        for of_all in (grads, wanted_grads):
            of_all["fire"] = of_all["fire"]._replace(b_out=None)
    leaves = (jax.tree.leaves(all_) for all_ in ((found, grads), (wanted, wanted_grads)))
    for pair in zip(*leaves, strict=True):
        assert_near(*pair, TOLERANCE[d_out.dtype.name])


@pytest.mark.parametrize("name", slow_but(IN_EVERY_RUN, CASES))
def test_kernels_agree_with_the_reference(name):
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        compare(**CASES[name])


RACED_IN_EVERY_RUN = 2
RACED = {
    "packed_grouped": {"heads": (6, 3), "segment_ids": np.repeat([1, 2], 128).astype(np.int32)},
    "first_query": {"parts": 2},
    "prefix_bias": {"prefix": 50, "bias": True},
    "sinks": {"sinks": "near", "window": 128},
    "fire": {"fire": True},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number >= RACED_IN_EVERY_RUN else [])
        for number, name in enumerate(RACED)
    ],
)
def test_no_races(name):
    """Of three kv heads: both cores have some, and were an axis parallel that must not be, they
    would share the one in the middle.
    """
    case = {"length": 256, "heads": (3, 3), "learned_bias": True, **RACED[name]}
    kernel, _, x, cotangents = case_of(**case)
    assert not races(results, kernel, x, cotangents, "sinks" in case)


KINDS = [
    *("", "bias", "prefix", "sinks", "far", "bias far", "bias prefix"),
    *("factor", "factor far", "fire", "fire bias factor", "fire prefix"),
]
DRAWN = st.fixed_dictionaries(
    {
        "length": st.integers(2, 400),  # of one key alone, dq and dk are what cancellation leaves
        "heads": st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
        "ahead": st.one_of(st.none(), st.just(0), st.integers(0, 300)),
        "window": st.one_of(st.none(), st.integers(1, 400)),
        "softcap": st.sampled_from([None, 3.0]),
        "head_dim": st.sampled_from(HEAD_DIMS),
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
        "chip": st.sampled_from(["v5e", "v4"]),  # which turn rows in two ways
        "parts": st.sampled_from([None, None, 2, 3]),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_drawn_cases(kind):
    """A case compiles for 5 to 15 seconds, of FIRE 40: so they are few, and none is shrunk."""
    num_cases = 12 if not kind else 3 if "fire" in kind else 4

    @seed(KINDS.index(kind))
    @settings(max_examples=num_cases, phases=[Phase.generate])
    @given(
        case=DRAWN,
        cuts=st.lists(st.integers(0, 3), min_size=1, max_size=5),
        packed=st.booleans(),
        sizes=st.sampled_from([(128, 128), (256, 128), (256, 256)]),
        number=st.integers(1, 200),
    )
    def draw(case, cuts, packed, sizes, number):
        case |= {name: name in kind for name in ("bias", "factor", "fire")}
        if case["fire"]:
            case["parts"] = None
        elif case["parts"]:
            case["length"] = case["parts"] * sizes[0]
        if "prefix" in kind:
            case |= {"ahead": 0, "window": None, "prefix": number}
        if "sinks" in kind or "far" in kind:
            window = max(case["window"] or 0, number, sizes[0])
            case |= {"ahead": case["ahead"] or 0, "window": window, "num_sinks": number}
            case["sinks"] = "far" if "far" in kind else "near"
        if packed:
            T = case["length"]
            ids = np.array(cuts)[np.arange(T) * len(cuts) // T].astype(np.int32)
            case["segment_ids"] = np.sort(ids) if kind else ids
        compare(**case, blocks=(Blocks(*sizes, 128, 128, 256), Blocks(*sizes, 128, 128, 512)))
        jax.clear_caches()  # a quarter of a gigabyte

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        draw()


@pytest.mark.parametrize("chip", TABLE)
@pytest.mark.parametrize("length", [1, 128, 1000, 4096, 9000, 11 * 1024, 131072])
def test_sizes_of_blocks(chip, length):
    for b in (b for n in (128, 256, 512, 1024) for b in choose_blocks(length, chip, row_bytes=n)):
        assert b.block_q % b.tile_q == b.block_k % b.tile_k == b.stretch % b.block_k == 0
        assert b.tile_q % 128 == b.tile_k % 128 == b.block_q % b.block_k == 0
        padded = -(-length // b.stretch) * b.stretch
        assert padded <= max(2 * length, 128) and b.stretch <= 8192
    for b in choose_blocks(4 * 640, chip, 256, part=640):
        assert 640 % b.block_q == b.block_q % b.tile_q == b.stretch % b.block_k == 0


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bfloat16"), (256, "float32")])
def test_it_compiles_for_every_generation(topology, head_dim, dtype):
    """Several stretches of keys, grouped heads, backward too; the usual keys and the widest."""
    sizes = {"length": 12288, "heads": 2, "kv_heads": 1, "head_dim": head_dim, "dtype": dtype}
    sizes["backward"] = True
    compiles("kernel_programs_attention:flash_attention", sizes, topology)


@pytest.mark.tpu_aot
@needs_libtpu
def test_many_packed_rows_fit_scalar_memory():
    """In the shortest blocks, of which there are most: 2,048, each with three scalars."""
    sizes = {"rows": 8, "length": 32768, "heads": 1, "head_dim": 128, "window": 128}
    sizes["num_sinks"] = 4
    compiles("kernel_programs_attention:packed_lambda_attention", sizes, "v5e:2x2")


MORE = {
    "lambda_attention": {"length": 32768, "window": 4096, "num_sinks": 16},
    "biased_attention": {"length": 12288},
    "damped_attention": {"length": 12288},
    "fire_attention": {"length": 12288},
    "attention_of_a_part": {"length": 32768, "parts": 4, "window": 2048, "num_sinks": 16},
}


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("function", MORE)
def test_patterns_and_biases_compile_for_every_generation(topology, function):
    """With their gradients: several stretches of keys."""
    sizes = {**MORE[function], "heads": 2, "head_dim": 128, "backward": True}
    compiles(f"kernel_programs_attention:{function}", sizes, topology)
