"""EncoderDecoder: what it refuses, shares and keeps; its logits are held to transformers' in
tests/interop/test_encoder_decoders.py.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.caches.crossed import CrossedCache
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import abstract_params, logical_axes
from jaxlm.sharding.mesh import RULES
from tests.decoding import tiny
from tests.model.configs import VOCAB, random_params, small

SEES_ALL = {"layer_pattern": ("bidirectional",)}
CROSSED = {"layer_pattern": ("crossed",)}


def pair(encoding="rope", vocab=VOCAB, **changes):
    """Two encoder layers and three decoder layers."""
    changes = {"position_encoding": encoding, "vocab_size": vocab, **changes}
    tied = {"embedding": {"tied": True}}
    return jaxlm.EncoderDecoderConfig(
        small(attention=SEES_ALL, **changes, **tied),
        small(attention=CROSSED, num_layers=3, **changes),
        start_token=2,
    )


@functools.cache
def make():
    model = jaxlm.EncoderDecoder(pair())
    return model, random_params(abstract_params(model))


def tokens(length, seed=0):
    drawn = np.random.default_rng(seed).integers(0, VOCAB, (2, length), np.int32)
    return jax.device_put(drawn)


def changed(tokens, at):
    """Other tokens there."""
    tokens = np.array(tokens)
    tokens[:, at] = (tokens[:, at] + 1) % VOCAB
    return tokens


def ids_of(*rows):
    return np.array(rows, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, source, targets, segment_ids=None):
    return model.apply({"params": params}, source, targets, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, *source):
    return model.apply({"params": params}, *source, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, *arrays):
    return model.apply({"params": params}, *arrays, method="decode")


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ({}, {"d_model": 64}, r"model.decoder: d_model=64; allowed: the encoder's 32"),
        ({}, {"vocab_size": 30}, r"model.decoder: vocab_size=30; allowed: the encoder's 29"),
        (
            {},
            {"numerics": jaxlm.NumericsConfig(dtype="bfloat16")},
            r"model.decoder: numerics=.*bfloat16.*; allowed: the encoder's",
        ),
        (
            {},
            {"attention": jaxlm.AttentionConfig(num_heads=4)},
            r"model.decoder: layer_pattern=\('global',\); allowed: crossed",
        ),
        (
            {"attention": jaxlm.AttentionConfig(num_heads=4, layer_pattern=("crossed",))},
            {},
            r"model.encoder: layer_pattern=\('crossed',\); allowed: global, sliding, bidir",
        ),
        (
            {"embedding": jaxlm.EmbeddingConfig()},
            {},
            r"model.encoder: tied=False; allowed: True: an encoder has no head",
        ),
    ],
)
def test_halves_that_do_not_fit(encoder, decoder, message):
    config = pair()
    with pytest.raises(ValueError, match=message):
        config.replace(
            encoder=config.encoder.replace(**encoder), decoder=config.decoder.replace(**decoder)
        )


def test_bad_start_token():
    with pytest.raises(ValueError, match=r"start_token=29; allowed: 0 to 28"):
        pair().replace(start_token=29)


def test_dict_round_trip():
    config = pair()
    again = jaxlm.EncoderDecoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_one_embedding_serves_both():
    shapes = abstract_params(make()[0])
    assert set(shapes) == {"encoder", "decoder"}
    assert "embedding" in shapes["encoder"]
    assert "embedding" not in shapes["decoder"]
    assert shapes["decoder"]["head"].shape == (32, VOCAB)


def test_fresh_parameters_and_axes():
    model, _ = make()
    params = jaxlm.init_params(model, 0)
    assert jaxlm.count_params(params) == jaxlm.count_params(abstract_params(model))
    for spec in jax.tree.leaves(logical_axes(model), is_leaf=lambda x: hasattr(x, "index")):
        assert set(spec) <= {*RULES, None}


def test_decoding_token_by_token_is_the_whole():
    model, params = make()
    source, targets = tokens(7), tokens(6, 1)
    ids = ids_of([1] * 7, [0] * 2 + [1] * 5)
    whole = logits(model, params, source, targets, ids)
    hidden = encode(model, params, source, ids)
    cache = jax.jit(lambda: CrossedCache.init(model.config.decoder, 2, 6))()
    first, cache = decode(model, params, np.asarray(targets)[:, :1], hidden, ids, cache)
    assert cache.source.hidden is None
    got = [first]
    for i in range(1, 6):
        y, cache = decode(model, params, np.asarray(targets)[:, i : i + 1], None, None, cache)
        got.append(y)
    # Sums over other shapes run in another order, over five layers.
    np.testing.assert_allclose(np.concatenate(got, 1), whole, rtol=0, atol=2e-5)


def test_what_is_seen():
    """A decoder's token sees all of the source and no later token; padding is seen by none."""
    model, params = make()
    source, targets, ids = tokens(7), tokens(6, 1), ids_of(*[[1] * 6 + [0]] * 2)

    def run(*given):
        return np.asarray(logits(model, params, *given, ids))

    base = run(source, targets)
    later = run(source, changed(targets, 4))
    np.testing.assert_array_equal(base[:, :4], later[:, :4])
    assert (base[:, 4:] != later[:, 4:]).any()
    np.testing.assert_array_equal(base, run(changed(source, 6), targets))
    assert (base[:, 0] != run(changed(source, 5), targets)[:, 0]).any()


def test_packed_pairs_are_what_they_are_alone():
    """Segment i of the targets sees segment i of the source; both pairs are as long, for one
    program.
    """
    model, params = make()
    source, targets = np.asarray(tokens(8))[:1], np.asarray(tokens(6, 1))[:1]
    s_ids, t_ids = ids_of([1] * 4 + [2] * 4), ids_of([1] * 3 + [2] * 3)
    s_at, t_at = ids_of([0, 1, 2, 3] * 2), ids_of([0, 1, 2] * 2)
    hidden = encode(model, params, source, s_ids, s_at)
    packed, _ = decode(model, params, targets, hidden, s_ids, None, t_at, t_ids)
    packed = np.asarray(packed)
    for s, t in ((slice(0, 4), slice(0, 3)), (slice(4, 8), slice(3, 6))):
        alone = logits(model, params, source[:, s], targets[:, t])
        # Sums over other shapes run in another order, over five layers.
        np.testing.assert_allclose(packed[:, t], alone, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", [{"scan_layers": False}, {"remat": "full"}])
def test_layouts_give_one_result(numerics):
    model, params = make()
    config = model.config
    changed = {
        n: c.replace(numerics=dataclasses.replace(c.numerics, **numerics))
        for n, c in (("encoder", config.encoder), ("decoder", config.decoder))
    }
    other = jaxlm.EncoderDecoder(config.replace(**changed))
    own = params
    if "scan_layers" in numerics:
        own = {n: unroll_layers(getattr(config, n), params[n]) for n in params}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, params):
        def loss(params):
            y = model.apply({"params": params}, tokens(7), tokens(6, 1))
            return jax.nn.log_softmax(y)[..., 3].sum()

        return jax.value_and_grad(loss)(params)

    (want, d_want), (got, d_got) = gradients(model, params), gradients(other, own)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    if "scan_layers" in numerics:
        d_want = {n: unroll_layers(getattr(config, n), d_want[n]) for n in d_want}
    for a, b in zip(jax.tree.leaves(d_got), jax.tree.leaves(d_want), strict=True):
        assert np.abs(b).max() > 0
        # What is recomputed or unrolled may be fused otherwise: float32 rounding.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_errors_at_the_door():
    model, params = make()
    with pytest.raises(ValueError, match=r"hidden=None; allowed: what `encode` gave"):
        model.apply({"params": params}, tokens(3), method="decode")
    decoder = jaxlm.Transformer(model.config.decoder)
    with pytest.raises(ValueError, match=r"source is absent; allowed: an encoder's output"):
        decoder.init(jax.random.key(0), tokens(3))
    plain = jaxlm.Transformer(small())
    with pytest.raises(ValueError, match=r"token_types is given; allowed: None with num_token"):
        plain.init(jax.random.key(0), tokens(3), token_types=tokens(3))


def test_generate_checks_both_ends():
    config = pair("learned", tiny.TOKENIZER.vocab_size)
    model = jaxlm.EncoderDecoder(config)
    params = jaxlm.init_params(model, 0)
    with pytest.raises(ValueError, match=r"prompt = 22; allowed: at most 16 with position_enc"):
        jaxlm.generate(model, params, tiny.TOKENIZER, ["x" * 20], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"max_new_tokens = 17; allowed: at most 16 with posi"):
        jaxlm.generate(model, params, tiny.TOKENIZER, ["x"], max_new_tokens=17)
    settings = {"max_new_tokens": 9, "temperature": 1.0, "seed": [3, 4]}
    both = jaxlm.generate(model, params, tiny.TOKENIZER, ["abc", "a longer"], **settings)
    settings["seed"] = 4
    assert jaxlm.generate(model, params, tiny.TOKENIZER, ["a longer"], **settings) == both[1:]
