"""Vectors of texts: by hand from one text's hidden states, whatever the batch."""

import functools
import itertools

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.embedding.embed import _pooled
from tests.decoding import tiny
from tests.marks import slow_but

TEXTS = ["a", "some words", "", "a rather longer text of some forty bytes", "ünïcode", "b" * 20]


@functools.cache
def encoder(encoding="learned"):
    attention = jaxlm.AttentionConfig(num_heads=4, layer_pattern=("bidirectional",))
    model = tiny.model(encoding, attention=attention)
    return model, jaxlm.init_params(model, 0)


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    slow_but(
        [("mean", True), ("cls", False)],
        itertools.product(["mean", "cls"], [True, False]),
    ),
)
def test_vectors_are_those_of_each_text_alone(pooling, normalize):
    model, params = encoder()
    got = jaxlm.embed(
        model, params, tiny.TOKENIZER, TEXTS, pooling, normalize, prefix="q: ", batch_size=4
    )
    assert got.shape == (len(TEXTS), 32) and got.dtype == np.float32
    alone = jax.jit(functools.partial(model.apply, method="hidden"))
    # In one program: behind the shorter texts are places that are of no text.
    ids = [[256, *tiny.TOKENIZER.encode("q: " + text), 257] for text in TEXTS]
    at = np.arange(max(map(len, ids)), dtype=np.int32)[None]
    for row, vector in zip(ids, got, strict=True):
        there = (at < len(row)).astype(np.int32)
        tokens = np.zeros_like(at)
        tokens[0, : len(row)] = row
        hidden, _ = alone({"params": params}, tokens, at * there, there)
        want = np.asarray(hidden, np.float64)[0, : len(row)]
        want = want.mean(0) if pooling == "mean" else want[0]
        want = want / np.linalg.norm(want) if normalize else want
        # float32 sums of other lengths, over two layers.
        np.testing.assert_allclose(vector, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_program_for_each_bucket():
    model, params = encoder("rope")
    _pooled.clear_cache()
    texts = ["x" * n for n in range(1, 100)]
    jaxlm.embed(model, params, tiny.TOKENIZER, texts, batch_size=8)
    assert _pooled._cache_size() == 4  # of 16, 32, 64 and 128 tokens


def test_long_texts_are_cut_only_when_asked():
    model, params = encoder()
    with pytest.raises(ValueError, match=r"'x{20}'… has 102 tokens; allowed: at most 64, or set"):
        jaxlm.embed(model, params, tiny.TOKENIZER, ["x" * 100])
    cut = jaxlm.embed(model, params, tiny.TOKENIZER, ["x" * 100], max_length=12)
    np.testing.assert_array_equal(
        cut, jaxlm.embed(model, params, tiny.TOKENIZER, ["x" * 10], max_length=64)
    )


def test_a_causal_model_has_vectors_too():
    model, params = tiny.model(), jax.tree.map(lambda x: x, tiny.params())
    assert jaxlm.embed(model, params, tiny.TOKENIZER, ["a", "b"]).shape == (2, 32)
    assert jaxlm.embed(model, params, tiny.TOKENIZER, []).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": "one"}, "texts='one'; allowed: a list of strings"),
        ({"pooling": "max"}, "pooling='max'; allowed: mean, cls"),
        ({"max_length": 1}, "max_length=1; allowed: None or an integer >= 2"),
        ({"batch_size": 0}, "batch_size=0; allowed: a number >= 1"),
    ],
)
def test_bad_settings(change, message):
    model, params = encoder()
    given = {"texts": ["a"]} | change
    with pytest.raises(ValueError, match=message):
        jaxlm.embed(model, params, tiny.TOKENIZER, **given)
