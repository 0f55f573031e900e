"""Heads that keep all beside heads that fade, against a slow form of what each of them keeps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.attention import mask as masks
from jaxlm.attention.averaged import AveragedLayer
from jaxlm.attention.cached import attend_parts
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.caches.head_lists import load_heads, save_heads
from jaxlm.decoding.generate import generate
from jaxlm.model.config import AttentionConfig, NumericsConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.positions.alibi import ALiBi
from kernels.decode_attention import merge
from tests.decoding import tiny
from tests.decoding.test_drafts import SAMPLED, draw, foreknown, same
from tests.decoding.test_generate import NEW  # whose programs a test shares
from tests.kernels.interpret import random
from tests.marks import slow_but

KEEPING = ((3, 0), (2,), (), (1,))
SINKS, WINDOW, GROUP, LENGTHS = 2, 32, 16, (100, 71)
SETTINGS = f"razor(heads={KEEPING}, window={WINDOW}, group={GROUP}, num_sinks={SINKS})"


def config(scan_layers=False):
    """4 layers, 8 query heads of 4 kv heads."""
    return tiny.model().config.replace(
        num_layers=4,
        attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=8),
        numerics=NumericsConfig(scan_layers=scan_layers),
    )


def tokens():
    """Keys and values [layers, batch, length, kv_heads, head_dim], positions and segments."""
    shape = (4, len(LENGTHS), max(LENGTHS), 4, 8)
    kv = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    at = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape[1:3])
    return kv, at, (at < np.array(LENGTHS)[:, None]).astype(np.int32)


def filled(kind, kv):
    cache = kind.init(config(), len(LENGTHS), max(LENGTHS))
    return commit(cache, tuple(kv), *tokens()[1:])


@jax.jit
def commit(cache, kv, positions, segment_ids):
    return cache.commit(kv, positions, segment_ids)


@jax.jit(static_argnums=1)
def attended(view, spec, new):
    return view.attend(spec, new)


def new_tokens():
    """Two a row, which see each other in turn."""
    rng = np.random.default_rng(1)
    q, k, v = (random(rng, 2, 2, heads, 8) for heads in (8, 4, 4))
    at = jnp.asarray(np.array(LENGTHS)[:, None] + np.arange(2), jnp.int32)
    ends = (-1, 1), (0.01, 0.3)
    sinks, slopes = (jnp.asarray(np.linspace(*x, 8), jnp.float32) for x in ends)
    there = jnp.asarray(np.ones((2, 2), np.int32))
    return AttentionInputs(q, k, v, at, at, there, there, slopes, sink_logits=sinks)


SPEC = AttentionSpec(masks.causal(), 8**-0.5, score=ALiBi().score, score_form="slope")


def left(keys, values, keeps_all):
    """What is left of one head's tokens: (keys, values, positions, of how many tokens each is)."""
    n = len(keys)
    gone = [] if keeps_all else range(SINKS, SINKS + max(0, n - SINKS - WINDOW) // GROUP * GROUP)
    kept = [t for t in range(n) if t not in gone]
    found = [(keys[t], values[t], t, 1) for t in kept]
    if gone:
        at = round(np.mean(gone))
        found.append((keys[gone].mean(0), values[gone].mean(0), at, len(gone)))
    return [np.array(x) for x in zip(*found, strict=True)]


def slowly(layer, new):
    """One softmax a query, of [what is left ‖ new tokens]."""
    kv = np.asarray(tokens()[0], np.float64)[:, layer]
    new = jax.tree.map(np.asarray, new)
    out = np.zeros(new.q.shape)
    for row, head, t in np.ndindex(2, 8, 2):
        of, n = head // 2, LENGTHS[row]
        k, v, at, count = left(*(x[row, :n, of] for x in kv), of in KEEPING[layer])
        k = np.concatenate([k, new.k[row, : t + 1, of]])
        v = np.concatenate([v, new.v[row, : t + 1, of]])
        at, count = np.append(at, range(n, n + t + 1)), np.append(count, [1] * (t + 1))
        s = k @ new.q[row, t, head] * 8**-0.5
        weights = count * np.exp(s - new.head_parameters[head] * (n + t - at))
        out[row, t, head] = weights @ v / (weights.sum() + np.exp(new.sink_logits[head]))
    return out


def test_each_head_attends_to_what_it_has_kept():
    cache, new = filled(caches.parse(SETTINGS), tokens()[0]), new_tokens()
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    for layer in range(4):
        # float32 against float64
        got = attended(cache.layer(layer), SPEC, new)
        np.testing.assert_allclose(got, slowly(layer, new), rtol=0, atol=5e-6)


def test_a_mean_of_tokens_that_are_alike_is_as_good_as_they_are():
    """Without their number in its logit it would count as one."""
    kv = tokens()[0]
    kv[:, :, :, SINKS:66] = kv[:, :, :, 5:6]
    spec, new = AttentionSpec(masks.causal(), 8**-0.5), new_tokens()
    views = (filled(caches.parse(one), kv).layer(1) for one in (SETTINGS, "dense"))
    razor, dense = (attended(view, spec, new) for view in views)
    np.testing.assert_allclose(razor, dense, rtol=0, atol=5e-6)  # float32 sums in another order


def test_it_can_be_attended_to_alone_and_merged():
    """As kernels do that know nothing of it; row 1 has none."""
    rng = np.random.default_rng(5)
    k, v = (random(rng, 2, 1, 4, 8) for _ in "kv")
    count, at, there = (jnp.asarray(x, jnp.int32) for x in ([40, 0], [[20], [0]], [[1], [0]]))
    mean, new = AveragedLayer(k, v, count, at, there), new_tokens()

    @jax.jit
    def both(mean, new):
        merged = merge([mean.alone(SPEC, new), attend_reference(SPEC, new)])[0]
        return merged, attend_parts(SPEC, new, [mean.part(SPEC, new, None, None)])

    merged, one = both(mean, new)
    np.testing.assert_allclose(merged, one, rtol=0, atol=5e-6)  # float32, in another order


@pytest.mark.parametrize(
    ("encoding", "heads"),
    [
        ("rope", ((0, 1), (1, 0))),  # all: bit for bit
        ("fire", ((0,), (1,))),  # parameters of each head
        pytest.param(  # keys met in other ways
            "lm_infinite(xpos, window=16, num_sinks=2)", ((0,), (1,)), marks=pytest.mark.slow
        ),
    ],
)
def test_it_says_what_a_dense_cache_says_where_all_is_kept(encoding, heads):
    model, params = tiny.model(encoding), tiny.params(encoding)
    ids = np.random.default_rng(4).integers(0, 200, (2, 20))
    numbers = ids, np.tile(np.arange(20), (2, 1)), np.ones_like(ids)
    ids, at, there = (jnp.asarray(x, jnp.int32) for x in numbers)

    @jax.jit
    def logits(cache):
        _, kv = model.apply(
            {"params": params}, ids, at, there, method="hidden", return_kv=True, kept=cache.mask
        )
        cache = cache.commit(kv, at, there)
        given = ids[:, :3], at[:, :3] + 20, there[:, :3], cache
        return model.apply({"params": params}, *given, method="extend")[0]

    kinds = "dense", f"razor(heads={heads}, window=32)"
    dense, razor = (logits(caches.parse(kind).init(model.config, 2, 40)) for kind in kinds)
    # float32 sums in another order, through softmaxes that tiny's large weights make sharp
    np.testing.assert_allclose(razor, dense, rtol=0, atol=0 if encoding == "rope" else 1e-3)


def test_layers_in_a_loop_say_what_layers_that_are_apart_say():
    apart = tiny.model(numerics=NumericsConfig(scan_layers=False))
    ours = unroll_layers(tiny.model().config, jax.tree.map(np.asarray, tiny.params()))
    cache = "razor(heads=((1,), (0,)), window=16, group=16, num_sinks=1)"
    pairs = (tiny.model(), tiny.params()), (apart, ours)
    looped, unrolled = (
        generate(*pair, tiny.TOKENIZER, ["it was the best"], NEW, cache=cache) for pair in pairs
    )
    assert looped == unrolled
    assert looped != generate(*pairs[0], tiny.TOKENIZER, ["it was the best"], NEW)
    with pytest.raises(ValueError, match="0 to 1 heads a layer; allowed: as many in each,"):
        generate(*pairs[0], tiny.TOKENIZER, ["it"], cache="razor(heads=((), (0,)), window=32)")


@pytest.mark.parametrize(
    "inner",
    slow_but(["quantized(bits=4)"], ["ring(window=24, num_sinks=2)", "paged", "quantized(bits=4)"]),
)
def test_others_may_keep_what_retrieval_heads_keep(inner):
    """And keep it as they would alone."""
    kind = caches.parse(SETTINGS[:-1] + f", inner={inner})")
    assert caches.parse(str(kind)) == kind
    kv, new = tokens()[0], new_tokens()
    ours, alone = (filled(one, kv) for one in (kind, caches.parse(inner)))
    assert ours.mask == alone.mask
    got, want = (np.asarray(attended(cache.layer(0), SPEC, new)) for cache in (ours, alone))
    heads = np.array([0, 1, 6, 7])  # of kv heads 0 and 3
    np.testing.assert_allclose(got[:, :, heads], want[:, :, heads], rtol=0, atol=5e-6)
    assert np.abs(got - want)[:, :, 2:6].max() > 0.01


@pytest.mark.slow
def test_drafts_end_before_a_group_goes_down_in_either_part():
    """Behind 1 sink and 16 tokens one of the means takes a group of 16, behind 6 and 32 the other
    part quantizes one.
    """
    inner = "quantized(full=32, group=16, num_sinks=6)"
    kind = f"razor(heads=((1,), (0,)), window=16, group=16, num_sinks=1, inner={inner})"
    plain, _ = draw(kind, "rope", SAMPLED)
    fast, fewer = draw(kind, "rope", SAMPLED, foreknown(plain))
    same(plain, fast)
    assert fewer < len(plain[0])
    cache = caches.parse(kind).init(tiny.model().config, 90, 90)
    lengths = jnp.arange(90)
    (both,) = cache.parts
    both = tuple(dataclasses.replace(one, lengths=lengths) for one in both)
    changes = {*range(1 + 16 + 16, 200, 16), *range(6 + 32 + 16, 200, 16)}
    want = [min(c for c in changes if c > n) - n - 1 for n in range(90)]
    np.testing.assert_array_equal(dataclasses.replace(cache, parts=(both,)).appendable, want)


def test_bytes():
    """2,000 tokens: 4 of 16 heads in full; each other one's 1,024, a group and the sinks, up to
    128s, and two sums in float32.
    """
    heads = f"heads={KEEPING}, window=1024"
    head = 2 * 8 * 4  # key and value of one token, float32
    fading = 12 * (1152 + 1) * head
    razor = caches.parse(f"razor({heads})")
    assert razor.nbytes_of(config(), 3, 2000) == 3 * (4 * 2000 * head + fading)
    quantized = caches.parse(f"razor({heads}, inner=quantized(bits=4))")
    inner = caches.parse("quantized(bits=4)")
    one = inner.nbytes_of(config(), 3, 2000) // 16  # of one head of one layer
    assert quantized.nbytes_of(config(), 3, 2000) == 3 * fading + 4 * one


def test_heads_are_read_from_a_file(tmp_path):
    path = tmp_path / "heads.json"
    save_heads(path, KEEPING, config())
    assert load_heads(path, config(scan_layers=True)) == ((0, 3), (2,), (), (1,))
    kind = caches.parse(f"razor(heads={str(path)!r}, window=32)")
    assert caches.parse(str(kind)) == kind
    given = caches.parse(f"razor(heads={KEEPING}, window=32)")
    assert kind.nbytes_of(config(), 1, 400) == given.nbytes_of(config(), 1, 400)
    for changed, told in (
        (config().replace(position_encoding="alibi"), "is of another model; allowed: a file that"),
        (
            tiny.model().config,
            "heads of 4 layers; allowed: a list for each of the model's 2 layers",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            kind.init(changed, 1, 8)
    for text in ("", "[]", json.dumps({"heads": 3, "config_sha256": ""})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"allowed: a file that .*save_heads wrote"):
            kind.init(config(), 1, 8)
    path.unlink()
    with pytest.raises(ValueError, match=r"allowed: a file that .*save_heads wrote"):
        kind.init(config(), 1, 8)


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ("razor(window=32)", "razor: heads missing"),
        ("razor(heads=((0,), (4,)), window=32)", "heads of layer 1: .4,.; allowed: .* 0 to 1"),
        ("razor(heads=((0,), (1, 1)), window=32)", "heads of layer 1: .1, 1.; allowed: different"),
        ("razor(heads=((0,), 1), window=32)", "razor: heads=.*; allowed"),
        ("razor(heads=((0,),), window=32)", "heads of 1 layers; allowed: a list for each"),
        ("razor(heads=((0,), (1,)), window=40)", "razor: window=40; allowed: a multiple of group"),
        ("razor(heads=((0,), (1,)), window=32, group=8)", "razor: group=8; allowed: 16, 32"),
        ("razor(heads=((0,), (1,)), window=32, num_sinks=-1)", "razor: num_sinks=-1; allowed"),
        (
            "razor(heads=((0,), (1,)), window=32, inner=razor(heads=((0,), (1,)), window=32))",
            "razor: inner=.*; allowed: a cache that is no razor itself",
        ),
    ],
)
def test_bad_settings_are_told(cache, told):
    with pytest.raises(ValueError, match=told):
        generate(tiny.model(), {}, tiny.TOKENIZER, ["a"], cache=cache)
