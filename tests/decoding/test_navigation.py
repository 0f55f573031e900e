"""In-context navigation on a model that has learned lists of words which do not repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.decoding.generate import complete
from jaxlm.decoding.navigation import (
    Navigation,
    coverage,
    listed,
    mean_precision,
    navigate,
    unique_items,
)
from jaxlm.model.config import AttentionConfig, ModelConfig
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from tests.decoding import tiny

INSTRUCTION = "Animals."


def untrained(**settings):
    given = (tiny.model(context_length=512), tiny.params(), tiny.TOKENIZER, INSTRUCTION)
    return navigate(*given, Navigation(**settings))


def test_one_round_is_the_plain_ranking():
    """Each answer is the greedy text behind its first token."""
    model, params = tiny.model(context_length=512), tiny.params()
    found = untrained(rounds=1, per_round=5, max_new_tokens=8)
    ids = [tiny.TOKENIZER.bos_id, *tiny.TOKENIZER.encode(listed(INSTRUCTION, []))]
    logits, _ = model.apply({"params": params}, jnp.array([ids]))
    ranking = np.argsort(-np.asarray(logits[0, -1]))
    texts = [tiny.TOKENIZER.decode([int(t)]) for t in ranking]
    first = [
        int(t) for t, text in zip(ranking, texts, strict=True) if text.strip() not in ("", '"')
    ]
    distinct = {tiny.TOKENIZER.decode([t]).strip(): t for t in reversed(first)}
    want = [t for t in first if distinct[tiny.TOKENIZER.decode([t]).strip()] == t][:5]
    assert found.first_tokens == want and found.rounds == [0] * 5
    for token, item in zip(found.first_tokens, found.items, strict=True):
        (alone,) = complete(model, params, tiny.TOKENIZER, [[*ids, token]], 8, ['"'])
        text = tiny.TOKENIZER.decode([*ids, token])[len(tiny.TOKENIZER.decode(ids)) :] + alone.text
        assert item == (text.strip() if alone.finish_reason == "stop" else "")


@pytest.mark.slow
def test_no_first_token_is_used_twice_and_they_end():
    found = untrained(rounds=40, per_round=20, max_new_tokens=2)
    assert len(set(found.first_tokens)) == len(found.first_tokens) < 800
    assert max(found.rounds) < 39


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
        untrained(**settings)
