"""The probe on a model whose next token is always drawn from the same ranking."""

import numpy as np
import pytest

from jaxlm.decoding.key_space import KeySpace
from jaxlm.decoding.rank_bias import RankBias, probe_rank_bias, rank_bias
from tests.decoding import tiny

# The quote is most probable, so that each answer is the byte that it begins with.
RANKED = '"abcdefgh'
V = tiny.TOKENIZER.vocab_size


def space_of(clusters, tokens=V):
    """Of RANKED's characters these clusters, of all others 7."""
    ids = np.full(tokens, 7, np.int32)
    ids[[ord(c) for c in RANKED]] = clusters
    return KeySpace(ids, np.zeros((8, 1), np.float32))


def probe(space, judge=lambda answer: answer in "acfg", top_n=9, top_k=3):
    return probe_rank_bias(
        *tiny.steady(RANKED), tiny.TOKENIZER, "Letters.", judge, space, top_n, top_k, 4
    )


def test_exact_numbers():
    """Ranks 1 to 3, the quote, a and b, are of clusters 0 and 1; behind them c, e and h are within
    these, and d, f and g are not; c, f and g are right.
    """
    found = probe(space_of([0, 0, 1, 1, 2, 0, 2, 3, 1]))
    assert found == RankBias(1 / 3, 2 / 3, (4 + 6 + 9) / 3, (5 + 7 + 8) / 3, 1 / 2)


def test_an_empty_group_has_no_numbers():
    assert rank_bias([0, 1, 1], [True, True, False], 1) == RankBias(None, 0.5, None, 2.5, 0.0)
    assert rank_bias([0, 0, 0], [True, True, False], 1) == RankBias(0.5, None, 2.5, None, 1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"top_n": 300}, "top_n=300; allowed: an integer from 2 to 258"),
        ({"top_k": 9}, "top_k=9; allowed: an integer from 1 to 8, below top_n"),
        ({"space": space_of([0] * 9, 264)}, "key_space='of 264 tokens'; allowed: of 258"),
    ],
)
def test_what_cannot_be_probed_is_told(given, told):
    with pytest.raises(ValueError, match=told):
        probe(**({"space": space_of([0] * 9)} | given))
