"""Sampling on a small model of five novels of Jane Austen, which continues a sixth.

Published settings (Holtzman et al., arXiv 1904.09751: top-p; Nguyen et al., arXiv 2407.01082:
min-p; Meister et al., arXiv 2202.00666: typical) are compared with greedy decoding and with plain
draws. Figures are of tokens and within a text: the share of pairs that are new (distinct-2), of
runs of four that are not (4-gram repetition), and the perplexity of the text under the model.

Hoped for: greedy texts repeat themselves at least twice as much as those of top-p; found: 0.79 of
the runs of four against 0.001. And requests of mixed settings in one batch get the tokens that each
gets alone.

It cannot show what people prefer, nor how settings compare in large models: one of a million
parameters is seldom sure of anything, and the texts have 96 tokens.
"""

import itertools

import numpy as np
import pytest

import jaxlm
from configs import tiny
from jaxlm.decoding.generate import complete
from jaxlm.evaluation.scoring import score_continuations

PROMPT, NEW, TEXTS = 32, 96, 40
QUALITY = {
    "greedy": {},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min-p 0.1": {"temperature": 1.0, "min_p": 0.1},
    "typical 0.95": {"temperature": 1.0, "typical_p": 0.95},
    "plain draws": {"temperature": 1.0},
}
# In a batch every row has a number for each setting that one of them asks for.
OFF = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
ASKED = [
    lambda g: {},
    lambda g: {"temperature": g.uniform(0.5, 1.5), "top_k": int(g.integers(2, 60))},
    lambda g: {"temperature": g.uniform(0.5, 1.5), "top_p": g.uniform(0.5, 0.99)},
    lambda g: {"temperature": 1.0, "typical_p": g.uniform(0.5, 0.98)},
    lambda g: {
        "temperature": g.uniform(0.5, 1.5),
        "min_p": g.uniform(0.02, 0.3),
        "repetition_penalty": g.uniform(1.05, 1.5),
    },
]


@pytest.fixture(scope="module")
def novels(tmp_path_factory):
    """The model of `configs/tiny.py`, its parameters and its tokenizer."""
    run = jaxlm.RunConfig.from_dict(tiny.get_config().to_dict())
    trained = jaxlm.train(run, tmp_path_factory.mktemp("novels"))
    return trained.model, trained.params, trained.tokenizer


def repeated(ids, length):
    """Share of runs of so many tokens that are no first of their kind in the text."""
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs)


def figures(texts, log_probs):
    """distinct-2 and 4-gram repetition, means over texts; perplexity over all tokens."""
    return {
        "distinct-2": 1 - np.mean([repeated(t, 2) for t in texts]),
        "4-gram repetition": np.mean([repeated(t, 4) for t in texts]),
        "perplexity": np.exp(-sum(log_probs) / sum(map(len, texts))),
    }


@pytest.mark.slow
def test_greedy_texts_repeat_themselves_and_drawn_ones_do_not(novels):
    model, params, tokenizer = novels
    windows = jaxlm.long_windows("builtin:austen_valid", tokenizer, PROMPT + NEW - 1, TEXTS)
    prompts, theirs = windows[:, :PROMPT], windows[:, PROMPT:].tolist()
    pairs = list(zip(prompts.tolist(), theirs, strict=True))
    log_probs = [total for total, _ in score_continuations(model, params, pairs)]
    table = {"the novel": figures(theirs, log_probs)}
    for name, settings in QUALITY.items():
        # All texts have one length: shorter ones have fewer chances to repeat themselves.
        said = complete(*novels, prompts, NEW, logprobs=0, min_new_tokens=NEW, **settings)
        table[name] = figures([c.token_ids for c in said], [c.score for c in said])
    print(f"\n{'':14}" + "".join(f"{column:>19}" for column in table["greedy"]))
    for name, row in table.items():
        print(f"{name:14}" + "".join(f"{value:19.3f}" for value in row.values()))
    greedy = table.pop("greedy")
    for row in table.values():
        assert greedy["4-gram repetition"] > max(0.3, 10 * row["4-gram repetition"])
        assert greedy["distinct-2"] < 0.5 * row["distinct-2"]
    by_perplexity = [greedy["perplexity"]]
    by_perplexity += [table[n]["perplexity"] for n in ("min-p 0.1", "top-p 0.9", "plain draws")]
    assert all(1.2 * less < more for less, more in itertools.pairwise(by_perplexity))


@pytest.mark.slow
def test_requests_of_mixed_settings_in_one_batch_get_what_each_gets_alone(novels):
    tokenizer, generator = novels[2], np.random.default_rng(0)
    windows = jaxlm.long_windows("builtin:austen_valid", tokenizer, PROMPT - 1, 50)
    prompts = [w[: generator.integers(4, PROMPT + 1)].tolist() for w in windows]
    asked = [ASKED[i % len(ASKED)](generator) | {"seed": i} for i in range(len(prompts))]
    together = {n: [(OFF | a)[n] for a in asked] for n in [*OFF, "seed"]}
    batch = complete(*novels, prompts, NEW, **together)
    alone = [complete(*novels, [p], NEW, **a)[0] for p, a in zip(prompts, asked, strict=True)]
    equal = sum(x.token_ids == y.token_ids for x, y in zip(batch, alone, strict=True))
    print(f"\n{equal} of {len(prompts)} requests have the tokens in the batch that they have alone")
    assert equal == len(prompts)
