"""Clusters of keys against what they were made of, and what is told by them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters.quantize import quantize_params
from jaxlm.decoding import key_space as module
from jaxlm.decoding.key_space import KeySpace, key_overlap, keys_of
from jaxlm.model.config import EmbeddingConfig
from jaxlm.model.parameters import init_params
from tests.decoding import tiny

K, EACH = 5, 40


def separable(seed=0):
    """Keys about K far centres, and the centre of each."""
    draws = np.random.default_rng(seed)
    centers, labels = 20 * draws.normal(size=(K, 8)), draws.permutation(np.repeat(range(K), EACH))
    return (centers[labels] + draws.normal(size=(K * EACH, 8))).astype(np.float32), labels


def same_partition(a, b):
    """An adjusted Rand index of 1: the pairs of labels match one to one."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_clusters_that_are_apart_are_found(seed, monkeypatch):
    keys, labels = separable(seed)
    space = KeySpace.fit(keys, K, seed=seed)
    assert same_partition(space.cluster_ids, labels)
    for i in range(K):
        assert space.members(i) == np.flatnonzero(space.cluster_ids == i).tolist()
        np.testing.assert_allclose(space.centers[i], keys[space.members(i)].mean(0), rtol=1e-4)
    monkeypatch.setattr(module, "CHUNK", 7)
    again = KeySpace.fit(jnp.asarray(keys), K, seed=seed)
    np.testing.assert_array_equal(again.cluster_ids, space.cluster_ids)


def test_each_key_is_in_the_nearest_cluster_and_the_seed_decides():
    """At the end nothing moves: keys by their nearest centre, centres by their keys."""
    keys = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    a, b, other = (KeySpace.fit(keys, 12, iterations=200, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(a.cluster_ids, b.cluster_ids)
    assert not same_partition(a.cluster_ids, other.cluster_ids)
    apart = ((keys[:, None] - a.centers[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(a.cluster_ids, apart.argmin(1))
    means = np.stack([keys[a.members(i)].mean(0) for i in range(12)])
    np.testing.assert_allclose(a.centers, means, atol=1e-5)


def test_a_cluster_without_keys_begins_at_the_farthest_one():
    keys = np.array([[0.0], [1], [10], [30]], np.float32)
    far = np.array([0.0, 1, 10, 30], np.float32)
    means = module._means(keys, np.zeros(4, np.int32), far, np.zeros((3, 1), np.float32))
    np.testing.assert_array_equal(means, [[41 / 4], [30], [10]])


def test_normalized_keys_are_compared_by_direction():
    draws = np.random.default_rng(0)
    way = np.repeat([0, 1], 30)
    keys = np.eye(2)[way] * draws.uniform(0.1, 100, (60, 1)) + 0.01
    assert same_partition(KeySpace.fit(keys, 2, normalize=True).cluster_ids, way)
    assert not same_partition(KeySpace.fit(keys, 2).cluster_ids, way)


@pytest.mark.parametrize("tied", [False, True])
def test_keys_of_a_model_are_what_its_logits_are_made_of(tied):
    """Those of ids that the tokenizer has; near them where the head is quantized."""
    padded = tiny.TOKENIZER.vocab_size + 6
    model = tiny.model(vocab_size=padded, embedding=EmbeddingConfig(tied=tied))
    params = init_params(model, 0)
    keys = keys_of(model, params, tiny.TOKENIZER)
    hidden = jnp.ones((1, 1, 32))
    logits = model.apply({"params": params}, hidden, method="logits")[0, 0]
    np.testing.assert_allclose(keys.sum(1), logits[: len(keys)], rtol=1e-5, atol=1e-5)
    assert keys.shape == (258, 32) and len(logits) == padded
    small = quantize_params(params, "int8", tables=True)
    np.testing.assert_allclose(keys_of(model, small, tiny.TOKENIZER), keys, atol=0.01)


def test_what_is_saved_is_read(tmp_path):
    space = KeySpace.fit(separable()[0], K)
    space.save(tmp_path / "keys")
    read = KeySpace.load(tmp_path / "keys")
    np.testing.assert_array_equal(read.cluster_ids, space.cluster_ids)
    np.testing.assert_array_equal(read.centers, space.centers)
    (tmp_path / "other").write_text("{}")
    for name in ("absent", "other"):
        with pytest.raises(ValueError, match="allowed: a file that KeySpace"):
            KeySpace.load(tmp_path / name)


def test_overlap_by_hand():
    """Probabilities in proportion to 8, 4, 2, 1, and one more of an id without a cluster."""
    space = KeySpace(np.array([0, 1, 0, 1], np.int32), np.zeros((2, 1), np.float32))
    logits = jnp.log(jnp.array([[8.0, 4, 2, 1, 99], [1, 8, 4, 2, 99]]))
    np.testing.assert_allclose(key_overlap(logits, space, 4), [10 / 15, 10 / 15], rtol=1e-6)
    np.testing.assert_allclose(key_overlap(logits, space, 2), [8 / 12, 8 / 12], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_clusters": 1}, "num_clusters=1; allowed: an integer from 2 to 9"),
        ({"num_clusters": 10}, "num_clusters=10; allowed: an integer from 2 to 9"),
        ({"num_clusters": 4}, "num_clusters=4; allowed: at most 3, as no more keys differ"),
        ({"iterations": 0}, "iterations=0; allowed"),
        ({"seed": -1}, "seed=-1; allowed"),
        ({"keys": np.array([[0.0], [np.nan], [1.0]])}, r"keys\[1\] holds inf or nan; allowed"),
    ],
)
def test_what_cannot_be_clustered_is_told(given, told):
    three_kinds = np.repeat(np.array([[0.1, 0.7], [0.3, 0.3], [1.5, 0.2]], np.float32), 3, axis=0)
    with pytest.raises(ValueError, match=told):
        KeySpace.fit(**({"keys": three_kinds, "num_clusters": 3} | given))


def test_what_cannot_be_asked_is_told():
    space = KeySpace.fit(separable()[0], K)
    with pytest.raises(ValueError, match="cluster=5; allowed: an integer from 0 to 4"):
        space.members(K)
    with pytest.raises(ValueError, match="top_n=201; allowed: an integer from 1 to 200"):
        key_overlap(jnp.zeros((1, 300)), space, 201)
