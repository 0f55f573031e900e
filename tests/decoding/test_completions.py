"""What is told of each continuation, how many there are, and where they end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.decoding.generate import complete, generate, stream
from jaxlm.decoding.request import make_request
from jaxlm.decoding.stop_strings import cut_at_stop, surely_said
from jaxlm.model.parameters import abstract_params
from jaxlm.model.scores import token_scores
from jaxlm.training.compiles import count_compiles
from tests.decoding import tiny
from tests.model.test_encoder_decoder import pair, random_params

PROMPTS = ["Emma was", "It"]
NEW = 24
SAMPLED = {"max_new_tokens": NEW, "temperature": 1.0}


def said(prompts=PROMPTS, call=complete, **settings):
    return call(tiny.model(), tiny.params(), tiny.TOKENIZER, prompts, **{**SAMPLED, **settings})


def ids(prompt):
    return [tiny.TOKENIZER.bos_id, *tiny.TOKENIZER.encode(prompt)]


def test_logprobs_are_those_of_a_scoring_pass():
    """Of the model alone, whatever processors do to its logits."""
    model, params = tiny.model(), tiny.params()

    @jax.jit
    def forward(params, rows):
        given = {"params": params}, rows, jnp.arange(rows.shape[1])[None], jnp.ones_like(rows)
        hidden, _ = model.apply(*given, method="hidden")
        scores, _ = token_scores(model, params, hidden[:, :-1], rows[:, 1:])
        return scores, model.apply({"params": params}, hidden, method="logits")

    for prompt, got in zip(PROMPTS, said(logprobs=4, seed=3, repetition_penalty=1.5), strict=True):
        row, start = [*ids(prompt), *got.token_ids], len(ids(prompt))
        padded = np.array([row + [0] * (40 - len(row))], np.int32)  # one program for both
        scores, logits = (np.asarray(x, np.float64)[0] for x in forward(params, padded))
        scores, logits = (x[start - 1 : len(row) - 1] for x in (scores, logits))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, (token, told) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
            best = np.argsort(-logprobs[i])[:4].tolist()
            assert list(told) == list(dict.fromkeys([token, *best]))
            # float32 through caches of another shape; tiny's weights make the softmaxes sharp
            np.testing.assert_allclose(told[token], scores[i], rtol=0, atol=1e-3)
            np.testing.assert_allclose(list(told.values()), logprobs[i, list(told)], atol=1e-3)
        assert got.score == sum(p[t] for p, t in zip(got.logprobs, got.token_ids, strict=True))
        assert got.text == tiny.TOKENIZER.decode(got.token_ids)


def test_what_is_not_asked_for_is_not_computed():
    request = make_request(tiny.model(), tiny.TOKENIZER, PROMPTS, NEW, {})
    state = request.start(tiny.model(), tiny.params())
    assert state.logprobs is None
    assert (state.history.tokens, state.history.prompt, state.history.counts) == (None,) * 3


def test_n_continuations_are_those_of_a_prompt_given_n_times():
    twice = [p for p in PROMPTS for _ in range(2)]
    penalty = {"frequency_penalty": 0.5, "cache": "ring(window=8, num_sinks=2)"}
    for given, single in ((5, [5, 6, 7, 8]), ([5, 50], [5, 6, 50, 51])):
        want = said(twice, seed=single, **penalty)
        assert said(n=2, seed=given, **penalty) == want
        assert len({c.text for c in want}) == 4


def test_n_prompts_are_read_once():
    settings = {"temperature": 1.0, "min_p": [0.1, 0.2]}
    request = make_request(tiny.model(), tiny.TOKENIZER, PROMPTS, 8, settings, copies=3)
    assert len(request.before) == 6 and len(request.prompt[0]) == 2
    np.testing.assert_allclose(request.sampling.truncations[0].min_p, [0.1] * 3 + [0.2] * 3)
    state = request.start(tiny.model(), tiny.params())
    assert state.tokens.shape[0] == state.cache.keys[0].shape[1] == 6


@pytest.mark.slow
def test_an_encoder_decoder_says_several_things_too():
    model = jaxlm.EncoderDecoder(pair(vocab=258))
    params = random_params(abstract_params(model))
    given = (model, params, tiny.TOKENIZER)
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 4, "logprobs": 1}
    settings |= {"forced_bos_token_id": 7, "repetition_penalty": 1.3}
    got = complete(*given, ["ab", "c"], n=2, **settings)
    want = complete(*given, ["ab", "ab", "c", "c"], **settings)
    # the encoder's matrices have other shapes, so its float32 sums another order
    np.testing.assert_allclose([c.score for c in got], [c.score for c in want], rtol=1e-5)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert {c.token_ids[0] for c in got} == {7} and len({c.text for c in got}) == 4


def test_the_best_of_several():
    settings = {"seed": 1, "stop_token_ids": list(range(0, 258, 8))}
    drawn = said(n=5, logprobs=0, **settings)
    settings |= {"n": 2, "best_of": 5}
    assert len({len(c.token_ids) for c in drawn}) > 2
    orders = []
    for penalty in (1.0, 4.0):
        want = []
        for group in (drawn[:5], drawn[5:]):
            mean = sorted(group, key=lambda c: -c.score / len(c.token_ids) ** penalty)
            want += [(c.text, c.score, None) for c in mean[:2]]
        got = said(length_penalty=penalty, **settings)
        assert [(c.text, c.score, c.logprobs) for c in got] == want
        orders.append(want)
    assert orders[0] != orders[1]
    seen = []

    def scorer(prompt, texts):
        seen.append(prompt)
        return [len(t) for t in texts]

    got = said(scorer=scorer, **settings)
    longest = [sorted(g, key=lambda c: -len(c.text))[:2] for g in (drawn[:5], drawn[5:])]
    assert [c.text for c in got] == [c.text for g in longest for c in g] and seen == PROMPTS
    with pytest.raises(ValueError, match="scorer gave 1 scores; allowed: 5, one a text"):
        said(scorer=lambda prompt, texts: [0.0], **settings)


def test_a_text_tells_why_it_ended():
    free = said(seed=2)
    assert {c.finish_reason for c in free} == {"length"}
    assert {len(c.token_ids) for c in free} == {NEW}
    token = free[0].token_ids[9]
    for i, c in enumerate(said(seed=2, stop_token_ids=[token])):
        row = free[i].token_ids
        want = row[: row.index(token) + 1] if token in row else row
        assert c.token_ids == want
        assert c.finish_reason == ("stop" if token in row else "length")
        assert c.text == tiny.TOKENIZER.decode([t for t in want if t != token])


def test_a_stop_string_ends_text_and_tokens():
    free = said(seed=2, logit_bias=dict.fromkeys(range(97, 123), 100.0), logprobs=0)
    stop = [free[0].text[17:20], free[1].text[3:5], "never said"]
    settings = {"seed": 2, "logit_bias": dict.fromkeys(range(97, 123), 100.0), "stop": stop}
    for got, whole in zip(said(logprobs=0, **settings), free, strict=True):
        assert got.text == cut_at_stop(whole.text, stop)
        count = next(
            i for i in range(NEW + 1) if cut_at_stop(whole.text[:i], stop) != whole.text[:i]
        )
        assert got.token_ids == whole.token_ids[:count] and len(got.logprobs) == count
        assert got.finish_reason == "stop"


@pytest.mark.parametrize("tokens_per_update", [1, 3])
def test_streamed_pieces_hold_no_part_of_a_stop_string(tokens_per_update):
    letters = {"logit_bias": dict.fromkeys(range(97, 100), 100.0), "seed": 2}
    (free,) = said(["It"], call=generate, **letters)
    for stop in ([free[7:10]], [free[:2]], [free[20:24], free[19:22]], ["abcabcabc", "d"]):
        (want,) = said(["It"], call=generate, stop=stop, **letters)
        pieces = list(
            said("It", call=stream, stop=stop, tokens_per_update=tokens_per_update, **letters)
        )
        assert "".join(pieces) == want == cut_at_stop(free, stop)
        for so_far in itertools.accumulate(pieces):
            assert want.startswith(so_far)


def test_surely_said_is_what_no_further_text_takes_back():
    stops = (["ab"], ["aab", "b"], ["aba", "bb"], ["aaa"], [])
    ends = ["".join(e) for n in range(4) for e in itertools.product("ab", repeat=n)]
    for stop, size in itertools.product(stops, range(5)):
        for text in map("".join, itertools.product("ab", repeat=size)):
            if cut_at_stop(text, stop) != text:
                continue
            shortest = min((cut_at_stop(text + e, stop) for e in ends), key=len)
            assert surely_said(text, stop) == shortest[: len(text)]


PER_ROW = ("repetition_penalty", "no_repeat_ngram_size", "typical_p", "logit_bias")


def test_requests_of_other_settings_share_a_program():
    """Which processors there are is the program's; their settings are not."""

    def ask(**settings):
        return said(PROMPTS, call=generate, **settings)

    first = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "logit_bias": {5: 1.0}}
    first |= {"bad_words_ids": [[1, 2, 3]], "typical_p": 0.9, "stop_token_ids": [4]}
    other = {"repetition_penalty": [1.0, 2.0], "no_repeat_ngram_size": [0, 3], "seed": 7}
    other |= {"bad_words_ids": [[4, 3, 2]], "typical_p": [1.0, 0.5], "temperature": 0.3}
    other |= {"logit_bias": [None, {1: 2.0, 3: -1.0}], "stop_token_ids": [6, 7, 8]}
    ask(**first)
    with count_compiles() as compiled:
        mixed = ask(**other)
        second = {k: v[1] if k in PER_ROW else v for k, v in other.items()} | {"seed": [3, 8]}
        assert ask(**second)[1] == mixed[1]
    assert not {"prefill", "decode"} & set(compiled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan; allowed"),
        ({"top_p": 1.5}, "top_p=1.5; allowed"),
        ({"top_k": -2}, "top_k=-2; allowed"),
        ({"min_p": 1.5}, r"min_p=1.5; allowed: \[0, 1\]"),
        ({"typical_p": 0}, "typical_p=0; allowed"),
        ({"epsilon_cutoff": -0.1}, "epsilon_cutoff=-0.1; allowed"),
        ({"eta_cutoff": 2}, "eta_cutoff=2; allowed"),
        ({"repetition_penalty": 0}, "repetition_penalty=0; allowed"),
        ({"repetition_penalty": "much"}, "repetition_penalty='much'; allowed: a number"),
        ({"frequency_penalty": 2.5}, r"frequency_penalty=2.5; allowed: \[-2, 2\]"),
        ({"presence_penalty": [0, -3]}, r"presence_penalty=-3; allowed: \[-2, 2\]"),
        ({"presence_penalty": [0, 0, 0]}, "presence_penalty has 3 values; allowed: one, or 2"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1; allowed"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5; allowed: an integer"),
        ({"min_new_tokens": 25}, r"min_new_tokens=25; allowed: \[0, 24\]"),
        ({"logit_bias": {258: 1.0}}, "logit_bias: token id 258; allowed: 0 to 257"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\]=nan; allowed"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\]; allowed: one value"),
        ({"logit_bias": [{}] * 3}, "logit_bias has 3 values; allowed: one, or 2"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids: token id -1; allowed"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\[\]; allowed: a non-empty list"),
        ({"suppress_tokens": [[1], [999]]}, "suppress_tokens: token id 999; allowed"),
        ({"begin_suppress_tokens": "abc"}, "begin_suppress_tokens='abc'; allowed"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids=\[\]; allowed: a non-empty list"),
        ({"bad_words_ids": [[1, 258]]}, "bad_words_ids: token id 258; allowed"),
        ({"order": "hf"}, "order='hf'; allowed: huggingface, vllm"),
        ({"sequence_bias": {(1, 258): 1.0}}, "sequence_bias: token id 258; allowed"),
        ({"sequence_bias": {(): 1.0}}, r"sequence_bias=\(\); allowed: a non-empty list"),
        ({"sequence_bias": {(1, 2): float("inf")}}, r"sequence_bias\[\(1, 2\)\]=inf; allowed"),
        ({"sequence_bias": {5: 1.0}}, "sequence_bias=5; allowed: a non-empty list"),
        ({"forced_eos_token_id": 300}, "forced_eos_token_id: token id 300; allowed"),
        ({"forced_bos_token_id": "x"}, "forced_bos_token_id='x'; allowed"),
        ({"seed": -1}, "seed=-1; allowed"),
        ({"seed": 2**31}, "seed=2147483648; allowed"),
        ({"stop_token_ids": [258]}, "stop_token_ids: token id 258; allowed: 0 to 257"),
        ({"stop": "x"}, "stop='x'; allowed: a list of non-empty strings"),
        ({"stop": [""]}, r"stop=\[''\]; allowed: a list of non-empty strings"),
        ({"n": 0}, "n=0; allowed: an integer >= 1"),
        ({"n": 3, "best_of": 2}, "best_of=2; allowed: an integer >= n=3"),
        ({"n": 2, "temperature": 0}, "temperature=0 with 2 of each prompt; allowed: above 0"),
        ({"length_penalty": float("inf")}, "length_penalty=inf; allowed"),
        ({"logprobs": -1}, "logprobs=-1; allowed"),
        ({"processors": [5]}, "processors: 5; allowed: callables"),
        ({"repetition_penality": 2}, "'repetition_penality'.*did you mean repetition_penalty"),
    ],
)
def test_errors_at_the_door(settings, message):
    with pytest.raises(ValueError, match=message):
        complete(tiny.model(), {}, tiny.TOKENIZER, PROMPTS, **{**SAMPLED, **settings})
