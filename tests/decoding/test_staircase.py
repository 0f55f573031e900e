"""Zones: what lies where, at which precision, and how it is read."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.attention import zoned
from jaxlm.caches.dense import DenseCache
from jaxlm.caches.zones import slots_of
from kernels.kv_quantize.layout import GROUPS, affine_from, bounds, codes_for, scale_and_minimum
from kernels.kv_quantize.reference import dequantize_keys, dequantize_values
from kernels.quantized_decode_attention import divided
from tests.decoding import tiny
from tests.marks import slow_but

# Groups that are a part of a word's run, whole runs, and a ring that forgets.
SETTINGS = (
    "staircase(full=16, steps=((8, 16), (4, 32), (2, None)), group=16, num_sinks=3)",
    "quantized(bits=4, full=32, group=32, num_sinks=0)",
    "quantized(bits=2, full=16, group=16, num_sinks=1, window=40)",
)
# And one that ends in a mean, which holds no token that an oracle could find.
AVERAGED = "staircase(full=16, steps=((8, 32), (0, None)), group=16, num_sinks=3)"
LENGTHS = (180, 151)
SIZES = (5, 40)  # of commits, beside those of one token; each is a program


dequantized = jax.jit(lambda keys, values: (dequantize_keys(keys), dequantize_values(values)))


@pytest.fixture(params=SETTINGS)
def kind(request):
    return caches.parse(request.param)


def tokens():
    """Keys and values [layers, batch, length, kv_heads, head_dim], positions and segments."""
    c = tiny.model().config
    shape = (c.num_layers, len(LENGTHS), max(LENGTHS), c.num_kv_heads, c.head_dim)
    kv = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    at = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape[1:3])
    return kv, at, (at < np.array(LENGTHS)[:, None]).astype(np.int32)


@jax.jit
def commit(cache, kv, positions, segment_ids):
    return cache.commit(kv, positions, segment_ids)


@functools.cache
def committed(kind, sizes, capacity=LENGTHS[0]):
    """After commits of these sizes, of one token from there on; rows of two lengths."""
    kv, at, there = tokens()
    cache, start = kind.init(tiny.model().config, len(LENGTHS), capacity), 0
    sizes = iter(sizes)
    while start < max(LENGTHS):
        size = next(sizes, 1)
        size = size if start + size <= max(LENGTHS) else 1
        part = slice(start, start + size)
        cache = commit(cache, tuple(kv[:, :, :, part]), at[:, part], there[:, part])
        start += size
    return cache


@functools.partial(jax.jit, static_argnums=(1, 2))
def coded(x, bits, axis):
    """Codes with a scale along an axis, that, and what a code of 0 is."""
    scale, minimum = scale_and_minimum(affine_from(*bounds(x, axis), bits))
    scale, minimum = (jnp.expand_dims(a, axis) for a in (scale, minimum))
    return codes_for(x, scale, minimum, bits), scale, minimum


def rounded(x, bits, axis):
    """Numbers as their codes say them, and the most by which they may differ."""
    y, scale, minimum = (np.asarray(a) for a in coded(x, bits, axis))
    return y * scale + minimum, np.broadcast_to(scale / 2, x.shape)


def oracle(kind, row):
    """Token by token. Lists of (position, keys, values, bounds of both), one for each zone; a group
    that is complete pushes the oldest one on.
    """
    kind = getattr(kind, "staircase", kind)
    (keys, values), g = tokens()[0][:, :, row], kind.group
    channels = np.gcd(g, keys.shape[-1])
    sinks, now, zones = [], [], [[] for _ in range(1 + len(kind.steps))]
    room = [kind.full] + [kind.window or 1000 if n is None else n for _, n in kind.steps]
    for t in range(LENGTHS[row]):
        token = (t, keys[:, t], values[:, t], 0.0, 0.0)
        if t < kind.num_sinks:
            sinks.append(token)
            continue
        now.append(token)
        if len(now) < g:
            continue
        moving, now = now, []
        for z in range(len(zones)):
            if z:
                moving = requantized(moving, kind.steps[z - 1][0], channels)
            zones[z] += moving
            if len(zones[z]) <= room[z]:
                break
            moving, zones[z] = zones[z][:g], zones[z][g:]
    return [sinks + zones[0] + now, *zones[1:]]


def requantized(group, bits, channels):
    at, k, v, k_bound, v_bound = (list(x) for x in zip(*group, strict=True))
    k, k_more = rounded(np.stack(k), bits, 0)
    v = np.stack(v)
    split = v.reshape(*v.shape[:-1], -1, channels)
    split, v_more = (x.reshape(v.shape) for x in rounded(split, bits, -1))
    bounds_of = [
        [a + b for a, b in zip(x, y, strict=True)]
        for x, y in ((k_bound, k_more), (v_bound, v_more))
    ]
    return list(zip(at, k, split, *bounds_of, strict=True))


def numbers(cache):
    """Of each zone: keys, values [layers, B, K, S, H], positions, segments."""
    full = cache.full
    yield full.keys[0], full.values[0], full.positions, full.segment_ids
    for zone in cache.zones:
        yield *dequantized(zone.keys[0], zone.values[0]), zone.positions, zone.segment_ids


def test_a_history_is_what_an_oracle_keeps(kind):
    cache = committed(kind, (40, 40))
    kv, _, _ = tokens()
    for row in range(len(LENGTHS)):
        for zone, want in zip(numbers(cache), oracle(kind, row), strict=True):
            k, v, at, there = (np.asarray(x) for x in zone)
            slots = {int(at[row, s]): s for s in np.flatnonzero(there[row])}
            kept = [x[0] for x in want]
            if kind.window is None:
                assert sorted(slots) == kept
            else:  # the oracle forgets nothing
                assert set(slots) <= set(kept)
                assert set(range(LENGTHS[row] - kind.window + 1, LENGTHS[row])) & set(kept) <= set(
                    slots
                )
            for t, keys, values, k_bound, v_bound in want:
                if t not in slots:
                    continue
                # float32 rounding, of numbers below 8
                for x, y, bound, original in (
                    (k, keys, k_bound, kv[0]),
                    (v, values, v_bound, kv[1]),
                ):
                    got = x[:, row, :, slots[t]]
                    np.testing.assert_allclose(got, y, rtol=0, atol=2e-6)
                    assert np.all(np.abs(got - original[:, row, t]) <= bound + 2e-6)


@pytest.mark.parametrize("size", slow_but([40], SIZES))
@hypothesis.given(which=st.lists(st.booleans(), max_size=30))
@hypothesis.settings(max_examples=4)
@hypothesis.example(which=[True] * 3)
def test_how_many_tokens_come_at_a_time_changes_no_bit(size, which):
    sizes = tuple(size if several else 1 for several in which)
    for settings in (*SETTINGS, AVERAGED):
        one, many = (committed(caches.parse(settings), s) for s in ((), sizes))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_mean_is_that_of_all_tokens_behind_the_last_zone():
    kv, at, _ = tokens()
    mean = committed(caches.parse(AVERAGED), (40, 40)).zones[-1]
    for row, n in enumerate(LENGTHS):
        end = 3 + ((n - 3) // 16 - 3) * 16  # behind the sinks, before 3 groups and one not complete
        assert mean.count[row] == end - 3
        np.testing.assert_allclose(mean.position[row], at[row, 3:end].mean(), rtol=1e-6)
        for sums, x in zip((mean.keys[0], mean.values[0]), kv, strict=True):
            want = x[:, row, 3:end].mean(1)
            # 8 bits of numbers below 5: half a step is below 0.02, and in the mean far less
            np.testing.assert_allclose(sums[:, row, :, 0] / (end - 3), want, rtol=0, atol=5e-3)


def dense(cache):
    """The same numbers, each in a slot of its own; those out of the window are left out."""
    keys, values, at, there = (
        jnp.concatenate(x, 3 if x[0].ndim > 2 else 1) for x in zip(*numbers(cache), strict=True)
    )
    kind = cache.kind
    if kind.window is not None:
        far = cache.lengths[:, None] - at >= kind.window
        there = jnp.where(far & (at >= kind.num_sinks), 0, there)
    return DenseCache((keys,), (values,), at, there, cache.lengths)


@pytest.mark.parametrize(
    ("settings", "encoding"),
    slow_but(
        [(SETTINGS[0], "rope"), (SETTINGS[0], "xpos"), (SETTINGS[2], "rope")],
        [
            (SETTINGS[0], "rope"),
            (SETTINGS[0], "alibi"),
            (SETTINGS[0], "xpos"),  # keys are kept unrotated
            (SETTINGS[0], "lm_infinite(rope, window=60, num_sinks=3)"),  # and met at a ceiling
            (SETTINGS[2], "rope"),
            ("quantized(full=16, group=16)", "rope"),
        ],
    ),
)
def test_a_model_sees_what_a_dense_cache_of_the_same_numbers_shows(monkeypatch, settings, encoding):
    """Also in blocks of tokens, here of 128, where there are more of them than are in one."""
    monkeypatch.setattr(zoned, "TOKENS", 128)
    model, params = tiny.model(encoding), tiny.params(encoding)
    cache = committed(caches.parse(settings), (40,) * 4, 400)
    ids = jnp.array([[65], [66]])
    at, there = cache.lengths[:, None], jnp.ones_like(ids)

    @jax.jit
    def logits(cache):
        return model.apply({"params": params}, ids, at, there, cache, method="extend")[0]

    # float32 sums in another order, through softmaxes that tiny's large weights make sharp
    np.testing.assert_allclose(logits(cache), logits(dense(cache)), rtol=0, atol=1e-3)


def test_drafts_end_before_a_group_goes_down(kind):
    """`appendable` tokens leave what is there as it is, and the one after them does not."""
    kv, at, there = tokens()
    cache, told, changed = kind.init(tiny.model().config, len(LENGTHS), 180), [], []
    for t in range(100):
        told.append(int(cache.appendable[0]))
        part = slice(t, t + 1)
        after = commit(cache, tuple(kv[:, :, :, part]), at[:, part], there[:, part])
        pairs = zip(jax.tree.leaves(cache.zones), jax.tree.leaves(after.zones), strict=True)
        if any(np.any(a != b) for a, b in pairs):
            changed.append(t)
        cache = after
    assert len(changed) >= 2
    for t in range(changed[-1] + 1):
        assert t + told[t] == min(c for c in changed if c >= t)


def test_bytes():
    """Of 2,000 tokens in 2 layers of 2 heads of 8: whole zones, with scales of 4 bytes for 32 keys
    of a channel and for the 8 channels of a value.
    """
    config = tiny.model().config
    full = 2 * 2 * 2 * 8 * 4 * 256  # 128 tokens and a group and the sinks, up to 128s
    numbers = lambda tokens, bits: tokens * 2 * 2 * (2 * bits + 8 * 4 / 32 + 4)  # noqa: E731
    staircase, quantized = (caches.parse(name) for name in ("staircase", "quantized(bits=4)"))
    # 1,996 tokens behind the sinks, less 128 and 512: 1,356, up to 256s.
    zones = numbers(512, 8) + numbers(1536, 4)
    assert staircase.nbytes_of(config, 1, 2000) == full + zones
    assert quantized.nbytes_of(config, 1, 2000) == full + numbers(2048, 4)
    assert staircase.nbytes_of(config, 3, 20) == 3 * full / 2
    window = caches.parse("quantized(window=1024)")
    assert window.nbytes_of(config, 1, 10**6) == full + numbers(896, 8)


def test_more_tokens_than_it_holds():
    """An error where the numbers are known; under jit NaN, which nobody takes for an answer. A
    window holds any number, and so does a mean.
    """
    kv, at, there = tokens()
    cache = committed(caches.parse(SETTINGS[0]), (40,) * 4)
    part = jax.tree.map(jnp.asarray, (tuple(kv[:, :, :, :1]), at[:, :1], there[:, :1]))
    with pytest.raises(ValueError, match="181 tokens; allowed: at most capacity=180"):
        cache.commit(*part)
    assert np.isnan(commit(cache, *part).full.keys[0]).any()
    for settings in (SETTINGS[2], AVERAGED):
        rolling = committed(caches.parse(settings), (), 100)
        assert rolling.lengths.tolist() == list(LENGTHS)
        assert np.isfinite(rolling.full.keys[0]).all()


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ("staircase(group=0)", "group=0; allowed: 16, 32, 64, 128"),
        ("staircase(group=24)", "group=24; allowed: 16, 32, 64, 128"),
        ("staircase(full=16)", "full=16; allowed: a multiple of group=32"),
        ("staircase(full=100)", "full=100; allowed"),
        ("staircase(steps=())", "allowed: bits of 8, 4, 2, 0 that fall"),
        ("staircase(steps=((4, 64), (8, None)))", "bits of 8, 4, 2, 0 that fall"),
        ("staircase(steps=((6, None),))", "bits of 8, 4, 2, 0 that fall"),
        ("staircase(steps=((8, 40), (4, None)))", "a multiple of group=32"),
        ("staircase(steps=((8, None), (4, None)))", "the last for None"),
        ("staircase(steps=((8, 64),))", "the last for None"),
        ("staircase(steps=8)", "steps=8; allowed"),
        ("staircase(num_sinks=-1)", "num_sinks=-1; allowed"),
        ("staircase(window=600)", "window=600; allowed: an integer >= 4738"),
        ("staircase(steps=((0, 64), (0, None)))", "bits of 8, 4, 2, 0 that fall"),
        ("staircase(steps=((0, None),), window=600)", "window=600; allowed: None with a step of 0"),
        ("quantized(bits=3)", "bits=3; allowed: 8, 4, 2"),
        ("quantized(bits=0)", "quantized: bits=0; allowed: 8, 4, 2"),
        ("quantized(window=128)", "quantized: window=128; allowed: an integer >= 130"),
        ("quantized(full=100)", "quantized: full=100; allowed: a multiple of group=32"),
        ("quantized(group=24)", "quantized: group=24; allowed: 16, 32, 64, 128"),
    ],
)
def test_bad_settings_are_told(cache, told):
    with pytest.raises(ValueError, match=told):
        caches.parse(cache)


@hypothesis.given(st.integers(1, 1 << 20), st.sampled_from(GROUPS))
def test_slots_can_be_cut_into_blocks(blocks, group):
    """Few are wasted, and kernels find blocks of about a thousand tokens."""
    slots, tokens = slots_of(blocks, group), blocks * group
    assert tokens <= slots < max(tokens * 17 / 16, tokens + 8 * group, tokens + 128)
    block, _ = divided(slots, 1024, 1024, group)
    assert block <= 1024 and (block >= 256 or block == slots)
