"""Search over sampled segments: its extremes are drawing, and the best of many draws."""

import pytest

from jaxlm.decoding.generate import complete
from jaxlm.decoding.search.reranked import Reranked, complete_reranked
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.marks import slow_but

PROMPTS = ["it was the best of times", "no"]
DRAWS = {"temperature": 1.0, "top_p": 0.9, "seed": 5}


def few_high_bytes(prompt, texts):
    """What the search is to bring about."""
    return [-sum(ord(c) > 127 for c in text) for text in texts]


def search(reranked, prompts=PROMPTS, new=16, scorer=few_high_bytes, **options):
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, prompts, scorer, reranked, new)
    return complete_reranked(*given, **(DRAWS | options))


def drawn(new=16, **options):
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS, new)
    return complete(*given, **(DRAWS | options))


def test_one_sample_of_one_text_is_drawing():
    found = search(Reranked(1, 1, 5))
    assert [f.token_ids for (f,) in found] == [c.token_ids for c in drawn()]


def test_one_segment_is_the_best_of_many():
    found = search(Reranked(1, 8, 16))  # as many rows as of two texts with four samples each
    want = drawn(best_of=8, scorer=few_high_bytes)
    assert [f.text for (f,) in found] == [c.text for c in want]


@pytest.mark.parametrize("cache", slow_but(["dense"], ["dense", "paged"]))
def test_texts_come_with_their_scores_best_first(cache):
    """Whatever keeps the past; a row says the same beside itself as beside another."""
    found = search(Reranked(2, 4, 4), cache=SETTINGS[cache])
    for prompt, texts in zip(PROMPTS, found, strict=True):
        scores = [c.score for c in texts]
        assert len(texts) == 2 and scores == sorted(scores, reverse=True)
        assert scores == few_high_bytes(prompt, [c.text for c in texts])
        assert {len(c.token_ids) for c in texts} == {16}
    alone = search(Reranked(2, 4, 4), PROMPTS[:1] * 2, cache=SETTINGS[cache])
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in found[0]]


def test_texts_that_have_ended_stay():
    """A scorer that likes short texts keeps one that ends early through all later segments."""
    eos = tiny.TOKENIZER.eos_id

    def short(prompt, texts):
        return [-len(text) for text in texts]

    often = {"logit_bias": {eos: 6.0}, "min_new_tokens": 2}
    one_character_each = {"suppress_tokens": list(range(128, 256))}
    found = search(Reranked(2, 4, 3), scorer=short, **often, **one_character_each)
    for texts in found:
        assert texts[0].finish_reason == "stop" and len(texts[0].token_ids) < 16
        for one in texts:
            assert (one.finish_reason == "stop") == (one.token_ids[-1] == eos)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((0, 1, 1), "beam_size=0; allowed"),
        ((1, 0, 1), "num_samples=0; allowed"),
        ((1, 1, 0), "segment_length=0; allowed"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        Reranked(*settings)


def test_a_scorer_must_score_each():
    with pytest.raises(ValueError, match="scorer gave 1 scores; allowed: 8"):
        search(Reranked(1, 8, 16), scorer=lambda prompt, texts: [0.0])
