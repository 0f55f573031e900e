"""Heads that are known to look back are found, and no other ones."""

import numpy as np
import pytest

from jaxlm.evaluation import retrieval_heads
from jaxlm.evaluation.retrieval_heads import HeadScores, score_heads, select
from tests.evaluation.planted import planted

VOCAB, BLOCK, REPEATS = 64, 12, 3
LENGTH = BLOCK * REPEATS
SEED = 7  # with which no token is drawn twice


@pytest.mark.parametrize("scan_layers", [True, False])
def test_heads_that_look_back_are_found(monkeypatch, scan_layers):
    """An echo head also sees its own token; one that sees all alike gets as much as there is. In
    pieces of 5 queries, of which there are 24.
    """
    monkeypatch.setattr(retrieval_heads, "QUERIES", 5)
    found = score_heads(*planted(VOCAB, LENGTH, scan_layers), SEED, BLOCK, REPEATS)
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
        ({"block": 7}, "block=7; allowed: an integer >= 8"),
        ({"block": 8, "repeats": 1}, "repeats=1; allowed: an integer >= 2"),
        ({}, "block=2500; allowed: at most 9 with repeats=4 and context_length=36"),
        ({"block": 8, "exclude": range(VOCAB)}, "exclude=.*; allowed: fewer"),
    ],
)
def test_bad_settings_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        score_heads(*planted(VOCAB, LENGTH), **given)


def test_tokens_that_are_excluded_are_not_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        retrieval_heads,
        "_found",
        lambda model, params, tokens, block: drawn.append(tokens) or np.zeros((2, 2, 4)),
    )
    score_heads(*planted(VOCAB, LENGTH), 0, BLOCK, REPEATS, exclude=range(3, VOCAB))
    (tokens,) = drawn
    assert tokens.shape == (1, LENGTH) and set(np.unique(tokens)) <= {0, 1, 2}
    np.testing.assert_array_equal(tokens[:, :BLOCK], tokens[:, BLOCK : 2 * BLOCK])
