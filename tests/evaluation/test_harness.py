"""What of the lm-eval adapter needs no lm-eval; with it, and transformers: test_harness_live.py."""

import importlib.util

import pytest

import jaxlm
from jaxlm.data.optional import MissingPackageError
from jaxlm.data.tokenizers import HuggingFace
from jaxlm.evaluation import harness
from tests.decoding import tiny


def words(**config):
    """A tokenizer of words, of which <b>, </s> and | are special."""
    import tokenizers

    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "<b>": 2, "</s>": 3}, unk_token="a")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<b>", "</s>"])
    return HuggingFace(inner.to_str().encode(), config, "words")


@pytest.mark.parametrize(
    ("tokenizer", "text", "start", "ids"),
    [
        (tiny.TOKENIZER, "ab", True, [256, 97, 98]),
        (tiny.TOKENIZER, "ab", False, [97, 98]),
        (words(), "a b", True, [0, 1]),
        (words(), "a</s>b", True, [0, 3, 1]),
        (words(bos_token="<b>", add_bos_token=True), "a", True, [2, 0]),
        (words(bos_token="<b>", add_bos_token=True), "<b>a", True, [2, 0]),
    ],
)
def test_texts_as_tokens(tokenizer, text, start, ids):
    assert harness.encode(tokenizer, text, start) == ids


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [(tiny.TOKENIZER, 256), (words(), 3), (words(bos_token="<b>", add_bos_token=False), 2)],
)
def test_what_stands_before_a_text(tokenizer, token):
    assert harness.prefix_token(tokenizer) == token


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {"stop": [], "max_new_tokens": 256, "temperature": 0.0}),
        (
            {"until": "\n", "max_gen_toks": 8, "do_sample": False, "temperature": 0.7},
            {"stop": ["\n"], "max_new_tokens": 8, "temperature": 0.0},
        ),
        (
            {"until": ["Q:", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9},
            {"stop": ["Q:"], "max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9},
        ),
    ],
)
def test_settings_of_a_task(given, settings):
    assert harness.generation_settings(given) == settings


def test_an_unknown_setting_of_a_task():
    with pytest.raises(ValueError, match="generation_kwargs: num_beams; allowed: until"):
        harness.generation_settings({"num_beams": 4})


def test_answers_are_those_of_generate():
    """In their order, whatever the batches; what is too long loses its start."""
    model, params = tiny.model(), tiny.params()
    contexts = ["Emma was", "It", "a much longer prompt, of more tokens than there is room for"]
    given = [{"max_gen_toks": 20, "until": ["e"]}, {"max_gen_toks": 12}, {"max_gen_toks": 12}]
    rows = [harness.encode(tiny.TOKENIZER, context) for context in contexts]
    assert len(rows[2]) > 40
    want = [
        *jaxlm.generate(model, params, tiny.TOKENIZER, rows[:1], 20, stop=["e"]),
        *jaxlm.generate(model, params, tiny.TOKENIZER, [rows[1], rows[2][-28:]], 12),
    ]
    asked = list(zip(contexts, given, strict=True))
    assert harness.answer(model, params, tiny.TOKENIZER, asked, 2, 40) == want
    with pytest.raises(ValueError, match="max_gen_toks=40; allowed: less than max_length=40"):
        harness.answer(model, params, tiny.TOKENIZER, [("a", {"max_gen_toks": 40})], 2, 40)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_without_lm_eval():
    with pytest.raises(MissingPackageError, match=r"needs lm_eval: pip install -e '.\[harness\]'"):
        harness.harness_model(tiny.model(), {}, tiny.TOKENIZER)
