"""Methods of search behind the one door."""

import pytest

from jaxlm.decoding import search
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
    """A row alone says the same; a stop string cuts; penalties count."""
    parsed = search.parse(method)
    assert search.parse(str(parsed)) == parsed
    free = say(method=method)
    assert [len(c.token_ids) for c in free] == [12, 12]
    assert {c.finish_reason for c in free} == {"length"}
    assert say(PROMPTS[:1], method=method)[0].token_ids == free[0].token_ids
    (cut,) = say(PROMPTS[:1], method=method, stop=[free[0].text[4:6]])
    assert free[0].text.startswith(cut.text) and len(cut.text) <= 4
    assert cut.finish_reason == "stop"
    once = say(method=method, no_repeat_ngram_size=1)
    assert all(len(set(c.token_ids)) == 12 for c in once)
    assert any(len(set(c.token_ids)) < 12 for c in free)


def test_the_best_come_first_and_no_text_twice():
    found = say(PROMPTS[:1], method=SETTINGS["beam"], n=4)
    scores = [c.score for c in found]
    assert scores == sorted(scores, reverse=True) and len({c.text for c in found}) >= 3
    texts = generate(
        tiny.model(), tiny.params(), tiny.TOKENIZER, PROMPTS[:1], 12, method=SETTINGS["beam"]
    )
    assert texts == [found[0].text]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "bean"}, "method='bean' .did you mean beam"),
        ({"method": "beam(num_beams=5)", "n": 6}, "n=6 with method=.*; allowed: up to 5"),
        ({"method": "beam", "best_of": 3}, "best_of=3 with method='beam'; allowed: None"),
        ({"method": "beam", "logprobs": 2}, "logprobs=2 with method='beam'; allowed: None"),
        ({"method": "beam", "temperature": 1.0}, "method='beam'; allowed: no temperature"),
        ({"method": "beam", "cache": "paged(page=16, pages=9)"}, "that holds 8 texts of up to 37"),
        ({"method": "contrastive(top_k=300)"}, "top_k=300; allowed: at most vocab_size"),
    ],
)
def test_what_has_no_meaning_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        say(**options)
