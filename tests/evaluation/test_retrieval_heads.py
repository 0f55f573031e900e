"""Heads that are known to look back are found, and no other ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluation import retrieval_heads
from jaxlm.evaluation.retrieval_heads import HeadScores, score_heads, select
from jaxlm.model.config import AttentionConfig, ModelConfig, NumericsConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer

VOCAB, BLOCK, REPEATS = 64, 12, 3
LENGTH = BLOCK * REPEATS
TOKEN, PLACE = slice(0, VOCAB), slice(VOCAB, VOCAB + LENGTH)
BEFORE = slice(VOCAB + LENGTH, 2 * VOCAB + LENGTH)
WIDTH = BEFORE.stop
SEED = 7  # with which no token is drawn twice


def planted(scan_layers):
    """Two layers of two kv heads of two query heads each; embeddings and positions are unit
    vectors. In layer 0 query head 0 sees the token before it and says which it is, and 3 is an echo
    head; in layer 1 query head 1 is an induction head. The others see all tokens alike.
    """
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        d_model=WIDTH,
        context_length=LENGTH,
        position_encoding="learned",
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=WIDTH),
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), init_params(Transformer(config)))
    params["embedding"][:, TOKEN] = np.eye(VOCAB)
    params["position"]["table"][:, PLACE] = np.eye(LENGTH)
    block = params["layers"]["block_0"]
    block["attention_norm"]["scale"] += 1
    q, k, v, out = (block["attention"][name]["kernel"] for name in ("q", "k", "v", "out"))
    q[0, PLACE, 0, PLACE] = 5 * np.eye(LENGTH)
    k[0, PLACE, 0, PLACE] = np.eye(LENGTH, k=1)
    v[0, TOKEN, 0, BEFORE] = np.eye(VOCAB)
    out[0, 0, BEFORE, BEFORE] = np.eye(VOCAB)
    q[0, TOKEN, 3, TOKEN], k[0, TOKEN, 1, TOKEN] = 5 * np.eye(VOCAB), np.eye(VOCAB)
    q[1, TOKEN, 1, BEFORE], k[1, BEFORE, 0, BEFORE] = 20 * np.eye(VOCAB), np.eye(VOCAB)
    params = jax.tree.map(jnp.asarray, params)
    if scan_layers:
        return Transformer(config), params
    apart = config.replace(numerics=NumericsConfig(scan_layers=False))
    return Transformer(apart), unroll_layers(config, params)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_heads_that_look_back_are_found(monkeypatch, scan_layers):
    """An echo head also sees its own token; one that sees all alike gets as much as there is. In
    pieces of 5 queries, of which there are 24.
    """
    monkeypatch.setattr(retrieval_heads, "QUERIES", 5)
    found = score_heads(*planted(scan_layers), SEED, BLOCK, REPEATS)
    earlier = np.arange(BLOCK, LENGTH) // BLOCK
    alike = (earlier / np.arange(BLOCK + 1, LENGTH + 1)).mean()
    echo = [[alike, (1 / 2 + 2 / 3) / 2], [alike, alike]]
    # sharp softmaxes, whose other weights are below e^-20
    np.testing.assert_allclose(found.echo, echo, rtol=0, atol=1e-4)
    both = (1 / 2 + 1 / 3) / (LENGTH - BLOCK)  # the first token of all seems to follow itself
    induction = [[alike, alike], [1 - both, alike]]
    np.testing.assert_allclose(found.induction, induction, rtol=0, atol=1e-4)
    assert select(found, 0.25, 0.25) == ((1,), (0,))


def test_the_best_heads_of_all_layers_are_selected():
    """By either score; 12 heads."""
    echo = np.array([[0.1, 0.9, 0.2], [0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.1, 0.1, 0.1]])
    induction = np.array([[0.5, 0.1, 0.5], [0.1, 0.1, 0.5], [0.1, 0.1, 0.1], [0.1, 0.7, 0.1]])
    found = HeadScores(echo, induction)
    assert select(found) == ((0, 1), (), (), (1,))  # 1.68 and 0.12 of them, the latter at least 1
    assert select(found, 0.125, 0) == ((0,), (), (), (1,))  # 1.5 are 2
    assert select(found, 0.25, 0.16) == ((0, 1, 2), (), (0,), (1,))
    assert select(found, 0, 0) == ((),) * 4
    assert select(found, 1, 0) == ((0, 1, 2),) * 4
    with pytest.raises(ValueError, match=r"echo_ratio=1.5; allowed: a number in \[0, 1\]"):
        select(found, 0.1, 1.5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"block": 7}, "block=7; allowed: a number >= 8"),
        ({"block": 8, "repeats": 1}, "repeats=1; allowed: a number >= 2"),
        ({}, "block=2500; allowed: at most 9 with repeats=4 and context_length=36"),
        ({"block": 8, "exclude": range(VOCAB)}, "exclude=.*; allowed: fewer"),
    ],
)
def test_bad_settings_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        score_heads(*planted(True), **given)


def test_tokens_that_are_excluded_are_not_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        retrieval_heads,
        "_found",
        lambda model, params, tokens, block: drawn.append(tokens) or np.zeros((2, 2, 4)),
    )
    score_heads(*planted(True), 0, BLOCK, REPEATS, exclude=range(3, VOCAB))
    (tokens,) = drawn
    assert tokens.shape == (1, LENGTH) and set(np.unique(tokens)) <= {0, 1, 2}
    np.testing.assert_array_equal(tokens[:, :BLOCK], tokens[:, BLOCK : 2 * BLOCK])
