"""Methods of search behind the one door."""

import math

import pytest

from jaxlm.decoding import search
from jaxlm.decoding.completion import NOT_FOUND
from jaxlm.decoding.generate import complete, generate
from tests.decoding import tiny
from tests.marks import slow_but

PROMPTS = ["it was the best of times", "no"]
# As the registry's text forms.
SETTINGS = {
    "beam": "beam(num_beams=4, num_beam_groups=2)",
    "contrastive": "contrastive(penalty_alpha=0.5)",
}


def test_each_method_has_settings_here():
    assert set(SETTINGS) == set(search.available())


def say(prompts=PROMPTS, new=12, **options):
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, prompts, new)
    return complete(*given, **options)


@pytest.mark.parametrize("method", slow_but([SETTINGS["beam"]], SETTINGS.values()))
def test_texts_end_where_they_are_told_to(method):
    """A row says the same beside itself; a stop string cuts; penalties count."""
    parsed = search.parse(method)
    assert search.parse(str(parsed)) == parsed
    free = say(method=method)
    assert [len(c.token_ids) for c in free] == [12, 12]
    assert {c.finish_reason for c in free} == {"length"}
    twice = say(PROMPTS[:1] * 2, method=method)
    assert [c.token_ids for c in twice] == [free[0].token_ids] * 2
    (cut, _) = say(method=method, stop=[free[0].text[4:6]])
    assert free[0].text.startswith(cut.text) and len(cut.text) <= 4
    assert cut.finish_reason == "stop"
    once = say(method=method, no_repeat_ngram_size=1)
    assert all(len(set(c.token_ids)) == 12 for c in once)
    assert any(len(set(c.token_ids)) < 12 for c in free)


def test_the_best_come_first_and_no_text_twice():
    found = say(method=SETTINGS["beam"], n=4)[:4]
    scores = [c.score for c in found]
    assert scores == sorted(scores, reverse=True) and len({c.text for c in found}) >= 3
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS, 12)
    assert generate(*given, method=SETTINGS["beam"])[0] == found[0].text


def test_long_texts_of_a_low_score_are_texts():
    """With a penalty of -5 it is a sum times 60**5."""
    (best, other) = say(PROMPTS[:1], 60, method="beam(num_beams=2, length_penalty=-5)", n=2)
    assert len(best.token_ids) > 0 and len(other.token_ids) > 0
    assert other.score <= best.score < -1e9


def test_each_prompt_has_as_many_texts():
    """Where there are no more, empty ones."""
    one, none, *others = say(method="beam(num_beams=2)", n=2, allowed_token_ids=[[65], None])
    assert set(one.token_ids) == {65} and none == NOT_FOUND
    assert len(others) == 2 and all(len(c.token_ids) == 12 for c in others)


def test_contrastive_search_says_what_is_allowed_where_that_is_less_than_it_compares():
    method = "contrastive(penalty_alpha=0.9, top_k=4)"
    found = say(method=method, allowed_token_ids=[65, 66])
    assert all(set(c.token_ids) <= {65, 66} and math.isfinite(c.score) for c in found)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "bean"}, "method='bean' .did you mean beam"),
        ({"method": "beam(num_beams=5)", "n": 6}, "n=6 with method=.*; allowed: up to 5"),
        ({"method": "beam", "best_of": 3}, "best_of=3 with method='beam'; allowed: None"),
        ({"method": "beam", "logprobs": 2}, "logprobs=2 with method='beam'; allowed: None"),
        ({"method": "beam", "temperature": 1.0}, "method='beam'; allowed: no temperature"),
        ({"method": "contrastive", "top_k": 8}, "allowed: no temperature, top_k, top_p or other"),
        ({"method": "beam", "top_p": 0.5}, "allowed: no temperature, top_k, top_p or other"),
        ({"method": "beam", "length_penalty": 2.0}, "length_penalty=2.0 with .*; allowed: None"),
        (
            {"method": "beam(length_penalty=-6)"},
            "length_penalty=-6; allowed: a number from -5 to 5",
        ),
        ({"method": "beam(num_beams=9_900_000)"}, "19800000 × 48 tokens would take"),
        ({"method": "beam", "cache": "paged(page=16, pages=9)"}, "that holds 8 texts of up to 37"),
        ({"method": "contrastive(top_k=300)"}, "top_k=300; allowed: at most vocab_size"),
    ],
)
def test_what_has_no_meaning_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        say(**options)
