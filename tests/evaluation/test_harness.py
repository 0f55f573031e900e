"""What of the lm-eval adapter needs no lm-eval; with it, and transformers: test_harness_live.py."""

import importlib.util
import types

import jax
import numpy as np
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


class NoStart(type(tiny.TOKENIZER)):
    """Bytes, of which no text has one in front: the end token stands before an empty one."""

    bos_id = None


def test_an_answer_to_nothing():
    model, params, tokenizer = tiny.model(), tiny.params(), NoStart()
    want = jaxlm.generate(model, params, tokenizer, [[tokenizer.eos_id]], 8)
    assert want != jaxlm.generate(model, params, tokenizer, [[0]], 8)
    assert harness.answer(model, params, tokenizer, [("", {"max_gen_toks": 8})], 1, 40) == want


def rolling_windows(token_list, prefix_token, max_seq_len, context_len):
    """lm-eval's: each window's targets go on where the last one's ended, and what is read before
    the first of them is as long as the window has room for.
    """
    assert context_len == 1
    done = 0
    while done < len(token_list):
        end = min(done + max_seq_len, len(token_list))
        read = [prefix_token, *token_list][max(end - max_seq_len, 0) : end]
        yield read, token_list[done:end]
        done = end


def disjoint(pair):
    read, targets = pair
    return read[: len(read) - len(targets) + 1], targets


@pytest.mark.parametrize("tokenizer", [tiny.TOKENIZER, NoStart()])
def test_a_rolling_text_is_the_sum_of_its_windows(monkeypatch, tokenizer):
    """In windows of eight tokens."""
    fake = types.SimpleNamespace(
        get_rolling_token_windows=rolling_windows,
        make_disjoint_window=disjoint,
        tqdm=lambda steps, **_: steps,
    )
    monkeypatch.setattr(harness, "optional", lambda *_: fake)
    model, params = tiny.model(), tiny.params()
    asked = harness.HarnessMethods(model, params, tokenizer, 2, 8)
    texts = ["she had not been there", "it was", "the best of times"]
    requests = [types.SimpleNamespace(args=(text,)) for text in texts]
    want = []
    for text in texts:
        ids, total = harness.encode(tokenizer, text), 0.0
        whole = [harness.prefix_token(tokenizer), *ids]
        for done in range(0, len(ids), 8):
            end = min(done + 8, len(ids))
            for at in range(done, end):
                logits = tiny.next_logits(model, params, whole[max(end - 8, 0) : at + 1])
                total += float(jax.nn.log_softmax(logits)[whole[at + 1]])
        want.append(total)
    # float32 sums of two programs
    np.testing.assert_allclose(asked.loglikelihood_rolling(requests, True), want, rtol=1e-5)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize(
    ("said", "left", "trimmed"),
    [("It is", "It is", "It is"), ("It is ", "It is ", "It is"), (" It is", "It is", "It is")],
)
def test_a_last_turn_left_open(trim, said, left, trimmed):
    """As transformers' continue_final_message, whether or not the template trims what is said."""
    template = f"{{% for m in messages %}}<{{{{ m.content{trim} }}}}>{{% endfor %}}"
    model, params = tiny.model(), tiny.params()
    asked = harness.HarnessMethods(model, params, words(chat_template=template), 1, 8)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    kept = said[: len(said) - len(said.lstrip())] + left  # what the template wrote before it
    want = f"<Hi><{trimmed if trim else kept}"
    assert asked.apply_chat_template(talk, add_generation_prompt=False) == want


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_without_lm_eval():
    with pytest.raises(MissingPackageError, match=r"needs lm_eval: pip install -e '.\[harness\]'"):
        harness.harness_model(tiny.model(), {}, tiny.TOKENIZER)
