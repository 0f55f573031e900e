"""Entropy-adaptive decoding (Simonds, arXiv 2502.06833) on sums with worked steps.

Two models of bytes add numbers of up to three digits, digit by digit, between phrases that are
always the same; the large one, of 0.9 million parameters, is right on 97 % of 150 problems, the
small one, of 0.16 million, on 65 %. A window of 5 tokens and a dwell of 3: the lines are short.

Hoped for: a threshold at which the large model draws at most half of the tokens, at most 60 % of
its parameters are used a token as the paper counts them, and 92.9 % of its accuracy is kept; found:
at 0.003 bits it draws 37 %, 48 % are used, and all is kept. That is one threshold of eight: at 0.01
bits 90 % is kept. Hoped for: five points more than turns that look at no entropy have, of an equal
share; found: 13 to 21 more than the same turns at other places, 10 to 21 more than a fixed period.
Hoped for: accuracy and share fall as the threshold grows; found: the share does, accuracy does not:
97, 84, 97, 88 % at 0, 0.001, 0.003, 0.01 bits. At 0.001 the large model has its turn in the phrase
before the sum and, sure of it, hands back just before the digits: the small one says the first.

The rule hands over after the token that was hard. Where that one is dropped (`retroactive`) and no
mean is taken, the large model draws 3 % of the tokens, and 86 % of the problems are right.

It cannot show a saving in arithmetic: with all that the large model reads to take over, more is
used than by it alone (1.4 times, at 0.003 bits). Entropies of such models are far below those of
large ones, so no threshold carries over.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.data.tokenizers import Bytes
from jaxlm.decoding.entropy_adaptive import EntropyAdaptive, generate_adaptive
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.config import AttentionConfig, ModelConfig
from jaxlm.model.transformer import Transformer
from tests.experiments.learning import learn

TOKENIZER = Bytes()
LENGTH, NEW, PROBLEMS = 88, 74, 150
END = TOKENIZER.encode("\n")[0]
THRESHOLDS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def problem(generator):
    """A question, and the text that answers it digit by digit."""
    a, b = (int(generator.integers(10 ** int(generator.integers(1, 4)))) for _ in range(2))
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    worked = f"From the right: {', '.join(steps)}. Together they make {a + b}.\n"
    return f"Add {a} and {b}. ", worked


def draw(generator):
    tokens, weights = np.zeros((16, LENGTH + 1), np.int32), np.zeros((16, LENGTH), np.float32)
    for row in range(len(tokens)):
        question, worked = map(TOKENIZER.encode, problem(generator))
        text = question + worked
        tokens[row, : len(text)] = text
        weights[row, len(question) - 1 : len(text) - 1] = 1
    return tokens, weights


def trained(layers, width, steps, learning_rate):
    size = {"num_layers": layers, "d_model": width, "context_length": LENGTH}
    attention = AttentionConfig(num_heads=width // 32)
    model = Transformer(ModelConfig(TOKENIZER.vocab_size, **size, attention=attention))
    return model, learn(model, draw, steps, learning_rate)


@functools.cache
def models():
    """The small one and the large one."""
    return trained(2, 64, 500, 3e-3), trained(4, 128, 500, 2e-3)


@functools.cache
def problems():
    """Prompts, and what ends each right answer; short sums occur in training too."""
    generator = np.random.default_rng(1)
    texts = [problem(generator) for _ in range(PROBLEMS)]
    return [TOKENIZER.encode(q) for q, _ in texts], [worked.split()[-1] for _, worked in texts]


def accuracy(rows):
    """Percent of rows that end in the right sum."""
    said = [TOKENIZER.decode(row).split()[-1] for row in rows]
    return 100 * np.mean([s == answer for s, answer in zip(said, problems()[1], strict=True)])


@functools.cache
def adaptive(threshold, window=5, dwell=3, retroactive=False, start="small"):
    settings = EntropyAdaptive(threshold, window, dwell, start, retroactive)
    prompts, sampling = problems()[0], Sampling.make(PROBLEMS)
    return generate_adaptive(*models(), prompts, NEW, settings, "dense", sampling, [END])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def best_next(model, params, tokens, at, cache):
    positions = jnp.broadcast_to(at, (PROBLEMS, 1))
    given = (tokens[:, None], positions, jnp.ones_like(positions), cache)
    logits, kv = model.apply({"params": params}, *given, method="extend")
    return logits[:, 0].argmax(-1), cache.commit(kv, *given[1:3])


def by_schedule(schedule):
    """Greedy rows whose token i is the large model's where schedule[row, i]; both read all."""
    prompts = problems()[0]
    starts = np.array([len(p) for p in prompts])
    text = np.zeros((PROBLEMS, starts.max() + NEW), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
    kept = [jaxlm.DenseCache.init(m.config, PROBLEMS, text.shape[1]) for m, _ in models()]
    for at in range(text.shape[1] - 1):
        best = []
        for which, (model, params) in enumerate(models()):
            given = (jnp.asarray(text[:, at]), jnp.asarray(at), kept[which])
            token, kept[which] = best_next(model, params, *given)
            best.append(np.asarray(token))
        drawn = np.clip(at + 1 - starts, 0, NEW - 1)
        by_large = schedule[np.arange(PROBLEMS), drawn]
        chosen = np.where(by_large, best[1], best[0])
        text[:, at + 1] = np.where(at + 1 < starts, text[:, at + 1], chosen)
    rows = [row[start : start + NEW].tolist() for row, start in zip(text, starts, strict=True)]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def turns_of(said, generator=None):
    """Who draws each token, by row; with a generator each row's turns are turned round by chance,
    so that share, dwell and switches stay and their place does not.
    """
    rolled = [0 if generator is None else generator.integers(len(row)) for row in said.model_used]
    return np.stack([np.resize(row, NEW) for row in map(np.roll, said.model_used, rolled)])


def periodic(share, dwell):
    """The large model's turns of `dwell` tokens, evenly spread; each row has its own phase."""
    turn, phase = np.arange(NEW)[None] // dwell, np.arange(PROBLEMS)[:, None] / PROBLEMS
    return np.floor((turn + 1) * share + phase) > np.floor(turn * share + phase)


def show(name, right, share, rest=""):
    print(f"{name:34}{right:9.1f} %{100 * share:9.1f} %{rest}", flush=True)


def show_said(name, said):
    saved, truly = 100 * (1 - said.cost_ratio), 100 * (1 - said.cost_ratio_true)
    rest = f"{saved:9.1f} %{truly:9.1f} %{np.mean(said.switches):9.1f}"
    show(name, accuracy(said.tokens), said.large_fraction, rest)


def show_scheduled(name, schedule):
    rows = by_schedule(schedule)
    share = np.concatenate([s[: len(r)] for s, r in zip(schedule, rows, strict=True)]).mean()
    show(name, right := accuracy(rows), share)
    return right


@pytest.mark.slow
def test_a_threshold_saves_much_and_keeps_most_of_the_large_models_accuracy():
    print(f"\n{'':34}{'right':>11}{'by large':>11}{'saved':>11}{'truly':>11}{'switches':>9}")
    small, large = adaptive(math.inf), adaptive(0, dwell=NEW, start="large")
    show_said("small alone", small)
    show_said("large alone", large)
    swept = {threshold: adaptive(threshold) for threshold in THRESHOLDS}
    for threshold, said in swept.items():
        show_said(f"threshold {threshold}, window 5, dwell 3", said)
    for window, dwell in ((1, 1), (5, 10)):
        name = f"threshold 0.03, window {window}, dwell {dwell}"
        show_said(name, adaptive(0.03, window, dwell))
    show_said("threshold 0.3, window 1, retroactive", adaptive(0.3, 1, 1, retroactive=True))
    assert accuracy(large.tokens) > accuracy(small.tokens) + 20
    shares = [said.large_fraction for said in swept.values()]
    assert all(more > less - 0.01 for more, less in itertools.pairwise(shares))
    assert accuracy(swept[0.0].tokens) > accuracy(swept[1.0].tokens) + 20
    cheap = [s for s in swept.values() if s.large_fraction <= 0.5 and s.cost_ratio <= 0.6]
    kept = max(accuracy(said.tokens) for said in cheap) / accuracy(large.tokens)
    print(f"{100 * kept:.1f} % of the accuracy kept; hoped for: 92.9 %")
    assert kept > 0.85


@pytest.mark.slow
def test_the_entropy_picks_better_turns_than_chance_or_a_period():
    generator, gains = np.random.default_rng(0), []
    print(f"\n{'':34}{'right':>11}{'by large':>11}")
    for threshold in (0.003, 0.01, 0.03):
        said = adaptive(threshold)
        own = show_scheduled(f"threshold {threshold}, replayed", turns_of(said))
        assert abs(own - accuracy(said.tokens)) < 1
        chance = show_scheduled("the same turns at other places", turns_of(said, generator))
        period = show_scheduled("a fixed period", periodic(said.large_fraction, 3))
        gains.append((own - chance, own - period))
    by_chance, by_period = np.mean(gains, axis=0)
    assert by_chance > 5
    assert by_period > 5
