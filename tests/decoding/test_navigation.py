"""In-context navigation on a model that has learned lists of words which do not repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.decoding import navigation
from jaxlm.decoding.generate import complete
from jaxlm.decoding.navigation import (
    Navigation,
    coverage,
    listed,
    mean_precision,
    navigate,
    unique_items,
)
from jaxlm.model.config import AttentionConfig, EmbeddingConfig, ModelConfig
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from tests.decoding import tiny

INSTRUCTION = "Animals."
LONG = 7 * INSTRUCTION  # with a list and without one it is in the same bucket: they share programs


def quoting():
    """A model that often ends an answer, and never says what its tokenizer has not; its programs
    are those of `tiny.steady`.
    """
    model = tiny.model(
        vocab_size=264, embedding=EmbeddingConfig(head_bias=True), context_length=128
    )
    params = jax.tree.map(lambda x: 3 * np.asarray(x), init_params(model, 0))
    params["head_bias"][ord('"')] = 30
    params["head_bias"][tiny.TOKENIZER.vocab_size :] = -1000
    return model, params


def distinct(ranking):
    """The tokens of a ranking that are no space or quote, those of one text once."""
    first = {tiny.TOKENIZER.decode([t]).strip(): t for t in reversed(ranking)}
    return [t for t in ranking if t in {first[x] for x in first.keys() - {"", '"'}}]


def test_answers_are_greedy_texts_behind_first_tokens_of_the_plain_ranking():
    """Of each round's list the most probable ones not used yet, from the prompt without one, and
    each as among copies of itself.
    """
    model, params = quoting()
    given = (model, params, tiny.TOKENIZER)
    found = navigate(*given, LONG, Navigation(rounds=2, per_round=4, max_new_tokens=6))
    assert found.rounds == [0] * 4 + [1] * 4 and not found.exhausted
    assert len(set(found.first_tokens)) == 8 and len(set(found.items) - {""}) > 4
    bare = [tiny.TOKENIZER.bos_id, *tiny.TOKENIZER.encode(listed(LONG, []))]
    for turn in range(2):
        before = found.items[: 4 * turn]
        ids = tiny.TOKENIZER.encode(listed(LONG, [i for i in before if i]))
        logits = tiny.next_logits(model, params, [tiny.TOKENIZER.bos_id, *ids], 128)
        logits = logits[: tiny.TOKENIZER.vocab_size]
        used = found.first_tokens[: 4 * turn]
        ranked = distinct([*used, *np.argsort(-logits).tolist()])
        assert found.first_tokens[4 * turn :][:4] == [t for t in ranked if t not in used][:4]
    for token, item in zip(found.first_tokens, found.items, strict=True):
        (alone, *_) = complete(*given, [[*bare, token]] * 4, 6, ['"'])
        text = tiny.TOKENIZER.decode([*bare, token])[len(tiny.TOKENIZER.decode(bare)) :]
        assert item == ((text + alone.text).strip() if alone.finish_reason == "stop" else "")


def test_the_list_keeps_what_fits_and_first_tokens_run_out(caplog, monkeypatch):
    """On a model that always ranks alike, each answer is its first token; prompts of more than 124
    tokens leave no room for one.
    """
    prompts, ranking = [], navigation.ranking

    def spied(model, params, tokenizer, prompt, cache):
        prompts.append(tokenizer.decode(prompt))
        return ranking(model, params, tokenizer, prompt, cache)

    monkeypatch.setattr(navigation, "ranking", spied)
    letters = "abcdefghijklmnopqrstuvwxyz"
    # Half of all 118 first tokens a round: rounds of one size share a program.
    settings = Navigation(rounds=3, per_round=59, reset=False, max_new_tokens=3)
    with caplog.at_level("WARNING", "absl"):
        given = (*tiny.steady('"' + letters, 128), tiny.TOKENIZER)
        found = navigate(*given, LONG, settings)
    assert found.items[:26] == list(letters) and found.exhausted
    assert found.first_tokens[26:] == distinct([*range(97), *range(123, 256)])
    told = "the list grows past 124 tokens: it keeps its newest entries"
    assert [r.message for r in caplog.records] == [told] and len(prompts) == 3
    for turn, prompt in enumerate(prompts):
        before = found.items[: 59 * turn]
        lists = [listed(LONG, before[i:]) for i in range(len(before) + 1)]
        assert prompt == next(x for x in lists if len(tiny.TOKENIZER.encode(x)) < 124)


WORDS = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "jay", "owl", "pig", "rat"]


@functools.cache
def trained():
    """A model that lists six of the twelve, in random order, the first two far more often first."""
    config = ModelConfig(
        vocab_size=tiny.TOKENIZER.vocab_size,
        num_layers=2,
        d_model=64,
        context_length=256,
        attention=AttentionConfig(num_heads=4),
    )
    model, generator = Transformer(config), np.random.default_rng(0)
    chain = optax.adam(3e-3)

    def row():
        weights = np.array([8.0] * 2 + [1.0] * 10)
        order = np.argsort(-np.log(weights) - generator.gumbel(size=12))[:7]
        text = listed(INSTRUCTION, [WORDS[i] for i in order])
        return [tiny.TOKENIZER.bos_id, *tiny.TOKENIZER.encode(text)][:70]

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            logits, _ = model.apply({"params": params}, tokens[:, :-1])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2)
            return -picked.mean()

        with jax.numpy_dtype_promotion("standard"):
            updates, state = chain.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

    params = init_params(model, 0)
    state = chain.init(params)
    for _ in range(150):
        params, state = step(params, state, jnp.array([row() for _ in range(16)]))
    return model, params


@pytest.mark.slow
def test_it_leads_to_most_of_the_answers():
    model, params = trained()
    given = (model, params, tiny.TOKENIZER, INSTRUCTION)
    led = navigate(*given, Navigation(rounds=6, per_round=2, max_new_tokens=6))
    assert len(led.items) == 12
    assert coverage(led.items, WORDS) >= 0.75
    assert unique_items(led.items) == [i for i in led.items if i]


def test_metrics_by_hand():
    assert mean_precision([True, False, True, True, False]) == pytest.approx(
        (1 + 1 / 2 + 2 / 3 + 3 / 4 + 3 / 5) / 5
    )
    assert coverage(["Ant ", "x", "ant"], ["ant", "bee"]) == 0.5
    assert unique_items(["Ant", "ant ", "", "bee"]) == ["Ant", "bee"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": 0}, "rounds=0; allowed"),
        ({"per_round": 0}, "per_round=0; allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed"),
        ({"per_round": 1000}, "per_round=1000; allowed: at most vocab_size=258"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        navigate(tiny.model(), {}, tiny.TOKENIZER, INSTRUCTION, Navigation(**settings))
