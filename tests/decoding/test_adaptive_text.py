"""Two models that take turns, with text in and text out."""

import math

import pytest

from jaxlm import caches
from jaxlm.data.tokenizers import Bytes
from jaxlm.decoding.adaptive_text import complete_adaptive
from jaxlm.decoding.entropy_adaptive import EntropyAdaptive, generate_adaptive
from jaxlm.decoding.generate import complete
from jaxlm.decoding.request import NO_TOKEN, STOP_TOKENS
from jaxlm.decoding.sampling import Sampling
from tests.decoding import test_entropy_adaptive, tiny
from tests.decoding.test_entropy_adaptive import NEW

# As long as those of test_entropy_adaptive, whose programs these texts share.
PROMPTS = ["Emma was", [256, 70, 9], "it was all very new"]
STOPS = [257] + [NO_TOKEN] * (STOP_TOKENS - 1)
OFTEN = "entropy_adaptive(threshold=0.6, window=1, min_dwell=2)"


def models():
    return tuple((*one, tiny.TOKENIZER) for one in test_entropy_adaptive.models())


def say(prompts=PROMPTS, method=OFTEN, **settings):
    return complete_adaptive(*models(), prompts, NEW, method, **settings)


def test_texts_are_those_of_the_tokens():
    texts, spoken = say()
    assert max(spoken.switches) > 2
    ids = [[256, *b"Emma was"], [256, 70, 9], [256, *PROMPTS[2].encode()]]
    small, large = (m[:2] for m in models())
    rest = (EntropyAdaptive(0.6, 1, 2), caches.parse("dense"), Sampling.make(3), STOPS)
    want = generate_adaptive(small, large, ids, NEW, *rest)
    assert [t.token_ids for t in texts] == spoken.tokens == want.tokens
    for before, text in zip(ids, texts, strict=True):
        assert (
            text.text
            == tiny.TOKENIZER.decode([*before, *text.token_ids])[
                len(tiny.TOKENIZER.decode(before)) :
            ]
        )
        assert text.finish_reason == ("stop" if text.token_ids[-1] == 257 else "length")


def test_alone_either_says_what_complete_says():
    """With its settings: a seed, a processor of tokens, stop tokens."""
    settings = {"temperature": 0.9, "seed": 3, "no_repeat_ngram_size": 2, "stop_token_ids": [101]}
    for i, method in enumerate([EntropyAdaptive(math.inf), EntropyAdaptive(0.0, start="large")]):
        texts, spoken = say(method=method, **settings)
        assert spoken.large_fraction == i
        assert texts == complete(*models()[i], PROMPTS, NEW, **settings)


@pytest.mark.parametrize("method", [OFTEN, EntropyAdaptive(math.inf)])
def test_a_stop_string_ends_a_text_and_soon_what_is_drawn(method):
    free, _ = say(method=method)
    stop = [free[0].text[3]]
    texts, spoken = say(method=method, stop=stop)
    for text, other, drawn in zip(texts, free, spoken.tokens, strict=True):
        assert text.text == other.text.split(stop[0])[0]
        assert drawn == other.token_ids[: len(drawn)]
        assert len(drawn) < len(text.token_ids) + 16 or text.finish_reason == "length"
    assert texts[0].finish_reason == "stop" and len(spoken.tokens[0]) < NEW


def other_tokenizer():
    one = Bytes()
    one.fingerprint = "another"
    return one


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tokenizer": other_tokenizer()}, "tokenizer=bytes of the large model; allowed: that"),
        ({"method": "entropy_adaptive(treshold=1.0)"}, "did you mean threshold"),
        ({"method": "beam"}, "method='beam'; allowed: entropy_adaptive"),
        ({"stop": [""]}, "allowed: a list of non-empty strings"),
        ({"temperature": -1.0}, "temperature=-1; allowed"),
        ({"frequency_penalty": 1.0}, "allowed: of tokens alone"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed"),
    ],
)
def test_what_cannot_be_said_is_told(given, told):
    given = dict(given)
    small, large = models()
    large = (*large[:2], given.pop("tokenizer", large[2]))
    with pytest.raises(ValueError, match=told):
        complete_adaptive(small, large, PROMPTS, **given)
