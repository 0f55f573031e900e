"""Entropy-adaptive decoding: by the formulas, by a replay without caches, and at its extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.decoding import entropy_adaptive as module
from jaxlm.decoding.entropy_adaptive import EntropyAdaptive, Spoken, generate_adaptive
from jaxlm.decoding.generate import complete
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.request import NO_TOKEN, STOP_TOKENS
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.parameters import init_params
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.marks import slow_but

PROMPTS = [[5, 70, 9], [3, 3, 8, 120, 77, 6, 1], [40] * 20]
NEW = 40
SMALL = tiny.model("alibi")
LARGE = tiny.model(num_layers=3)


@functools.cache
def models():
    grown = jax.tree.map(lambda x: 3 * x, init_params(LARGE, 1))
    return (SMALL, tiny.params("alibi")), (LARGE, grown)


def say(settings, prompts=PROMPTS, large=None, stops=(), cache="dense"):
    small, other = models()
    sampling = Sampling.make(len(prompts))
    stops = [*stops, *[NO_TOKEN] * (STOP_TOKENS - len(stops))]  # as requests pad them
    given = (settings, caches.parse(cache), sampling, stops)
    return generate_adaptive(small, large or other, prompts, NEW, *given)


def replayed(said, row, which):
    """Greedy tokens and entropies of a full forward of one of the models."""
    model, params = models()[which]
    whole = np.zeros((1, 64), np.int32)
    text = PROMPTS[row] + said.tokens[row]
    whole[0, : len(text)] = text
    logits, _ = _forward(model, params, jnp.asarray(whole))
    behind = logits[0, len(PROMPTS[row]) - 1 : len(text) - 1]
    p = np.asarray(jax.nn.softmax(behind), np.float64)
    return np.asarray(behind.argmax(-1)), -(p * np.log2(np.maximum(p, 1e-300))).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def turns(bits, threshold, window, dwell, retroactive):
    """Which model draws each token, by the rule as it is told.

    Args:
        bits: the entropy of both models at each token of the text.
    """
    active, since, used, entropy = 0, 0, [], []

    def unsure(new):
        return int(np.mean([*entropy, new][-window:]) > threshold)

    for both in bits.T:
        if retroactive and since >= dwell and unsure(both[active]) != active:
            active, since = 1 - active, 0
        used.append(active)
        over = unsure(both[active])
        entropy.append(both[active])
        since += 1
        if not retroactive and since >= dwell and over != active:
            active, since = over, 0
    return used


@pytest.mark.parametrize(
    ("window", "dwell", "retroactive"),
    slow_but(
        [(5, 3, False), (4, 2, True)],
        [(1, 1, False), (5, 3, False), (1, 1, True), (4, 2, True)],
    ),
)
def test_each_token_is_drawn_by_the_model_that_the_rule_names(window, dwell, retroactive):
    """Replayed with full forward passes; a row says the same among others."""
    threshold = float(np.median(say(EntropyAdaptive(math.inf)).entropy))
    settings = EntropyAdaptive(threshold, window, dwell, retroactive=retroactive)
    said = say(settings)
    assert max(said.switches) > 2
    for row in range(len(PROMPTS)):
        used, entropy = said.model_used[row], np.array(said.entropy[row])
        both = [replayed(said, row, which) for which in (0, 1)]
        tokens, bits = (np.stack(x) for x in zip(*both, strict=True))
        assert used == turns(bits, threshold, window, dwell, retroactive)
        assert said.tokens[row] == tokens[used, range(NEW)].tolist()
        # float32 sums in another order, through softmaxes that tiny's large weights make sharp
        np.testing.assert_allclose(entropy, bits[used, range(NEW)], atol=1e-3)
        turned = [0, *(np.flatnonzero(np.diff(used)) + 1)]
        assert min(np.diff(turned)) >= dwell
    others = [PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    assert say(settings, others).tokens == [said.tokens[i] for i in (1, 2, 1)]


def test_a_text_as_long_as_a_learned_table():
    """Which has no position for the padding of what is read at once."""
    model = tiny.model("learned", context_length=48)
    one = model, jax.tree.map(lambda x: 3 * x, init_params(model, 0))
    prompt = [7 + i % 50 for i in range(40)]
    given = caches.parse("dense"), Sampling.make(1), ()
    said = generate_adaptive(one, one, [prompt], 8, EntropyAdaptive(0.0, 1, 1), *given)
    assert set(said.model_used[0]) == {0, 1}
    (alone,) = complete(*one, tiny.TOKENIZER, [prompt], 8)
    assert said.tokens == [alone.token_ids]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dense", "ring"])
def test_a_model_that_hands_over_to_itself_says_what_it_says_alone(cache):
    """So does a row alone, and one among others."""
    small, _ = models()
    alone = say(EntropyAdaptive(math.inf), cache=SETTINGS[cache])
    assert alone.large_fraction == 0
    often = say(EntropyAdaptive(1.0, 1, 2), large=small, cache=SETTINGS[cache])
    assert max(often.switches) > 5
    assert often.tokens == alone.tokens
    solo = [say(EntropyAdaptive(1.0, 1, 2), [p], small, cache=SETTINGS[cache]) for p in PROMPTS]
    assert [s.tokens[0] for s in solo] == alone.tokens


def test_the_large_model_alone():
    said = say(EntropyAdaptive(0.0, start="large"))
    assert said.large_fraction == 1
    assert said.tokens[0] == replayed(said, 0, 1)[0].tolist()
    assert said.cost_ratio == said.cost_ratio_true == 1
    begun = say(EntropyAdaptive(0.0, min_dwell=4))
    assert begun.model_used == [[0] * 4 + [1] * (NEW - 4)] * len(PROMPTS)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    free = say(EntropyAdaptive(2.0, 1, 2))
    stop = free.tokens[0][9]
    want = [r[: r.index(stop) + 1] if stop in r else r for r in free.tokens]
    assert say(EntropyAdaptive(2.0, 1, 2), stops=[stop]).tokens == want


@pytest.mark.slow
def test_a_higher_threshold_leaves_less_to_the_large_model():
    prompts = np.random.default_rng(0).integers(0, 256, (50, 6))
    of_threshold = [EntropyAdaptive(t, 3, 3) for t in (0.0, 0.3, 0.6, 0.9, 1.2, math.inf)]
    fractions = [say(settings, prompts.tolist()).large_fraction for settings in of_threshold]
    assert (np.diff(fractions) < 0.01).all(), fractions
    assert fractions[0] == 37 / 40 and fractions[-1] == 0 and 0.2 < fractions[2] < 0.8, fractions


def test_what_a_dropped_token_costs():
    """The same model hands over to itself: each model reads what the other drew, and its own."""
    small, _ = models()
    alone = say(EntropyAdaptive(math.inf))
    said = say(EntropyAdaptive(1.0, 1, 2, retroactive=True), large=small)
    assert said.tokens == alone.tokens and max(said.switches) > 5
    by = np.array([sum(r.count(which) for r in said.model_used) for which in (0, 1)])
    # Of each row a model reads all tokens up to the last one that it drew or dropped.
    ends = np.zeros(2, int)
    for prompt, used in zip(PROMPTS, said.model_used, strict=True):
        last = [max(i for i, u in enumerate(used) if u == which) for which in (0, 1)]
        last[1 - used[-1]] += 1
        ends += [len(prompt) + i for i in last]
    ends[0] -= sum(len(p) - 1 for p in PROMPTS)
    assert said.caught_up == tuple(ends - by)


@pytest.mark.parametrize(("threshold", "warns"), [(8.1, True), (7.9, False), (math.inf, False)])
def test_a_threshold_above_all_entropies_is_told(threshold, warns, caplog):
    """log2(258) = 8.01."""
    with caplog.at_level("WARNING", "absl"):
        say(EntropyAdaptive(threshold))
    assert ("threshold=8.1 never switches" in caplog.text) == warns


def test_entropy_in_bits():
    rows = jnp.array([[0.0, 0, 0, 0], [0, -jnp.inf, -jnp.inf, -jnp.inf], [0, 0, -jnp.inf, 0]])
    np.testing.assert_allclose(module.entropy_bits(rows), [2, 0, math.log2(3)], rtol=1e-6)
    logits = 3 * np.random.default_rng(0).normal(size=(4, 50))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = module.entropy_bits(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, -(p * np.log2(p)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "active", "dwelt", "want"),
    [
        (0.5, 0, 9, 0),  # sure: the small one goes on
        (1.5, 0, 9, 1),  # unsure: the large one takes over
        (1.0, 0, 9, 0),  # at the threshold it is the small one's
        (1.0, 1, 9, 0),
        (1.5, 0, 2, 0),  # too soon
        (0.5, 1, 2, 1),
        (1.5, 0, 3, 1),  # soon enough
        (1.5, 1, 3, 1),
    ],
)
def test_when_a_model_hands_over(mean, active, dwelt, want):
    row = [jnp.array([x]) for x in (mean, active, dwelt)]
    got = module.hand_over(*row, jnp.asarray(1.0), jnp.asarray(3))
    assert got.tolist() == [want]


def test_costs_by_hand():
    """3 of 4 tokens by the large model of 10 numbers, the small one has 2."""
    said = Spoken([[1, 2, 3], [4]], [[0, 1, 1], [1]], [[0.0] * 3, [0.0]], (1, 6), (2, 10))
    assert said.large_fraction == 0.75
    assert said.switches == [1, 0]
    assert said.cost_ratio == 0.75 + 0.25 * 0.2
    assert said.cost_ratio_true == (2 * (1 + 1) + 10 * (3 + 6)) / (10 * 4)


def test_a_threshold_for_a_share_of_the_tokens():
    small, _ = models()
    given = (NEW, 0.3, 5, caches.parse("dense"), Sampling.make(len(PROMPTS)))
    threshold = module.calibrate_threshold(small, PROMPTS, *given)
    entropy = say(EntropyAdaptive(math.inf)).entropy
    means = [np.mean(row[max(0, i - 4) : i + 1]) for row in entropy for i in range(len(row))]
    assert np.mean(np.array(means) > threshold) == pytest.approx(0.3, abs=1 / len(means))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"threshold": -1.0}, "threshold=-1.0; allowed"),
        ({"threshold": math.nan}, "threshold=nan; allowed"),
        ({"window": 0}, "window=0; allowed"),
        ({"min_dwell": 0}, "min_dwell=0; allowed"),
        ({"start": "largest"}, "start='largest'; allowed: small, large"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        EntropyAdaptive(**settings)


def test_bad_calls_are_told():
    other = tiny.model(vocab_size=77)
    with pytest.raises(ValueError, match="vocab_size=77 of the large model; allowed"):
        say(EntropyAdaptive(), large=(other, {}))
    with pytest.raises(ValueError, match="allowed: lists of token ids, none empty"):
        say(EntropyAdaptive(), prompts=[[1], []])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": [[5], [999]]}, "prompt: token id 999; allowed: 0 to 257"),
        ({"prompts": [[5], []]}, "allowed: lists of token ids, none empty"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1; allowed: an integer >= 1"),
        ({"sampling": Sampling.make(3)}, "sampling of 3 rows; allowed: of 2, one a prompt"),
        ({"cache": "dence"}, "cache='dence' .did you mean dense"),
        ({"model": "learned", "max_new_tokens": 64}, "allowed: at most 64 with position_encoding"),
        (
            {"sampling": Sampling.make(Batch(2, 258), repetition_penalty=2.0)},
            "sampling with processors of .*; allowed: of tokens alone",
        ),
    ],
)
def test_what_cannot_be_said_is_told(given, told):
    one = tiny.model(given.pop("model", "rope")), {}
    wanted = {"prompts": [[5], [6]], "max_new_tokens": 4, "cache": "dense"} | given
    wanted = {"settings": EntropyAdaptive(), "sampling": Sampling.make(2)} | wanted
    with pytest.raises(ValueError, match=told):
        generate_adaptive(one, one, **wanted)
