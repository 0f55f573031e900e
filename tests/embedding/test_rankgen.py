"""RankGen: its loss against NumPy, its batches, and that it learns what goes with what."""

import functools
import itertools

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizers import Bytes
from jaxlm.embedding.rankgen import RankGen, inbook_pairs, rankgen_loss, train_rankgen
from jaxlm.model.config import AttentionConfig, ModelConfig
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import OptimizerConfig

TOKENIZER = Bytes()
RANKER = RankGen(
    Transformer(
        ModelConfig(
            vocab_size=TOKENIZER.vocab_size,
            num_layers=2,
            d_model=32,
            context_length=64,
            attention=AttentionConfig(num_heads=4, layer_pattern=("bidirectional",)),
        )
    ),
    max_lengths=(64, 32),
)


def vectors(count, seed):
    return jax.random.normal(jax.random.key(seed), (count, 3))


def by_numpy(prefixes, suffixes, negatives=None):
    candidates = suffixes if negatives is None else np.concatenate([suffixes, negatives])
    logits = np.float64(prefixes) @ np.float64(candidates).T
    own = np.exp(np.diagonal(logits[:, : len(prefixes)]))
    return -np.log(own / np.exp(logits).sum(1)).mean()


def test_the_loss_is_that_of_numpy():
    p, s, n = vectors(4, 0), vectors(4, 1), vectors(5, 2)
    np.testing.assert_allclose(rankgen_loss(p, s), by_numpy(p, s), rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(rankgen_loss(p, s, n), by_numpy(p, s, n), rtol=1e-5)
    assert rankgen_loss(p[:1], s[:1]) == 0


def test_shards_find_their_own_among_all():
    """The loss and its gradients, of a mapped axis."""

    def sharded(*given):
        cut = [x.reshape(4, -1, 3) for x in given]
        loss = functools.partial(rankgen_loss, axis_name="data")
        return jax.vmap(loss, axis_name="data")(*cut).mean()

    given = vectors(8, 0), vectors(8, 1), vectors(4, 2)
    got = jax.value_and_grad(sharded, (0, 1, 2))(*given)
    want = jax.value_and_grad(rankgen_loss, (0, 1, 2))(*given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_role_has_its_marker_and_what_is_too_long_is_cut():
    params = RANKER.init(0)
    encode = jax.jit(RANKER.__call__)

    def vector(text, role):
        return np.asarray(encode(params, *RANKER.rows(TOKENIZER, [text], role)))[0]

    assert not np.allclose(vector("a word", "prefix"), vector("a word", "suffix"))
    long = "x" * 100
    np.testing.assert_array_equal(vector(long, "prefix"), vector(long + "y", "prefix"))
    assert RANKER.rows(TOKENIZER, [long], "suffix")[0].shape == (1, 32)
    score = RANKER.scorer(params, TOKENIZER)
    got = score("a word", ["", "or two"])
    want = [vector("a word", "prefix") @ vector(text, "suffix") for text in ("", "or two")]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    with pytest.raises(ValueError, match="role='infix'; allowed: prefix, suffix"):
        RANKER.rows(TOKENIZER, ["a"], "infix")


def test_batches_are_of_one_document_and_do_not_overlap():
    texts = [" ".join(f"{name}{i}" for i in range(200)) for name in "ab"]
    batches = list(itertools.islice(inbook_pairs(texts, 5, 12, 6, seed=3), 20))
    again = list(itertools.islice(inbook_pairs(texts, 5, 12, 6, seed=3), 20))
    assert batches == again
    names = set()
    for prefixes, suffixes in batches:
        words = " ".join([*prefixes, *suffixes]).split()
        assert len(words) == len(set(words)) == 5 * 18
        assert len({w[0] for w in words}) == 1
        names.add(words[0][0])
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            assert int(suffix.split()[0][1:]) == int(prefix.split()[-1][1:]) + 1
    assert names == {"a", "b"}
    with pytest.raises(ValueError, match="allowed: one with at least 4360"):
        next(inbook_pairs(texts, 19, 212, 6, seed=0))


@pytest.mark.slow
def test_it_learns_which_suffix_belongs_to_a_prefix():
    """A book of stretches that each keep to one word: 8 suffixes, of which chance finds 1 in 8."""
    generator = np.random.default_rng(0)
    words = np.array(["ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"])
    book = " ".join(np.repeat(generator.choice(words, 900), 9))
    pairs = inbook_pairs([book], 8, 6, 3, seed=0)
    params, losses = train_rankgen(RANKER, TOKENIZER, pairs, 150, OptimizerConfig(warmup_steps=20))
    assert np.mean(losses[:5]) > 2 and np.mean(losses[-20:]) < 1.2
    score = RANKER.scorer(params, TOKENIZER)
    suffixes = [" ".join([word] * 3) for word in words]
    found = [score(" ".join([word] * 6), suffixes).argmax() for word in words]
    assert (np.array(found) == np.arange(len(words))).mean() >= 0.7
