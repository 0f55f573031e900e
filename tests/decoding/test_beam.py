"""Beam search against transformers, against a slow form of it, and against all texts there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import caches
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.search.beam import Beam, Group, _advance_all, _Rules
from jaxlm.decoding.search.texts import EARLY_STOPPING, Ending
from tests.decoding import make_beam_goldens as goldens
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.interop.folders import read_golden, write_folder
from tests.marks import slow_but

NO_STOPS = jnp.zeros(0, jnp.int32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    _, config, shapes = read_golden("llama")
    model, params, _ = jaxlm.load(
        write_folder(tmp_path_factory.mktemp("l") / "hub", config, shapes)
    )
    return model, params


def search(model, params, tokens, new, beam, stops=NO_STOPS, cache="dense"):
    tokens = jnp.asarray(tokens)
    lengths = jnp.full(len(tokens), tokens.shape[1])
    kept = caches.parse(cache).init(model.config, len(tokens), tokens.shape[1] + new)
    return beam.search(
        model, params, (tokens, lengths), kept, new, Sampling.make(len(tokens)), stops
    )


def said(texts, stops):
    """Tokens of one prompt's texts up to their stop token."""
    rows = []
    for tokens, length in zip(np.asarray(texts[0]), np.asarray(texts[1]), strict=True):
        row = [int(t) for t in tokens[:length]]
        rows.append(row[:-1] if row and row[-1] in stops else row)
    return rows


@pytest.mark.parametrize("num_beams", slow_but([4], goldens.NUM_BEAMS))
def test_texts_and_scores_are_those_of_transformers(llama, num_beams):
    with np.load(goldens.FILE) as arrays:
        file = dict(arrays)
    tokens, stops = file["tokens"], jnp.array(goldens.STOPS)
    rules = itertools.product(goldens.EARLY_STOPPING, goldens.LENGTH_PENALTY)
    for early, penalty in rules:
        beam = Beam(num_beams, early_stopping=early, length_penalty=penalty)
        texts = search(*llama, tokens.astype(np.int32), goldens.NEW_TOKENS, beam, stops)
        case = f"{num_beams} {early} {penalty}"
        want, scores = file[f"{case} tokens"], file[f"{case} scores"]
        # float32 sums of up to 16 log-probabilities, in another order
        np.testing.assert_allclose(texts.scores, scores, rtol=1e-4, atol=1e-4)
        for row in range(len(tokens)):
            got = said((texts.tokens[row], texts.lengths[row]), goldens.STOPS)
            for one, padded in zip(got, want[row], strict=True):
                ended = [int(t) for t in padded]
                cut = next((i for i, t in enumerate(ended) if t in goldens.STOPS), len(ended))
                assert one == ended[:cut]


V, LENGTH = 5, 4


def table(seed):
    """log p(next | the last two tokens) of a little language; texts begin behind two zeros."""
    logits = np.random.default_rng(seed).normal(0, 2, (V, V, V))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def by_table(table, groups, diversity="hamming", strength=0.0):
    """A search of `LENGTH` tokens in that language."""
    ending = Ending(jnp.asarray(1.0), jnp.asarray(EARLY_STOPPING.index("never")))
    rules = _Rules(ending, jnp.asarray(strength), diversity)
    step = jax.jit(_advance_all)
    for length in range(LENGTH):
        tokens = np.stack([group.running.tokens for group in groups], 1)
        last = [
            tokens[..., i] if i >= 0 else np.zeros_like(tokens[..., 0])
            for i in (length - 2, length - 1)
        ]
        logits = jnp.asarray(table[last[0], last[1]])
        groups, _ = step(rules, groups, logits, jnp.asarray(length), NO_STOPS)
    return groups


def sums(table, text):
    """Log-probability of a text."""
    row = [0, 0, *text]
    return sum(float(table[a, b, c]) for a, b, c in zip(row, row[1:], row[2:], strict=False))


def test_with_room_for_all_texts_it_finds_the_best():
    language = table(0)
    (group,) = by_table(language, (Group.start(1, V ** (LENGTH - 1), LENGTH),))
    every = sorted(itertools.product(range(V), repeat=LENGTH), key=lambda t: -sums(language, t))
    found = group.finished
    assert [tuple(t) for t in np.asarray(found.tokens[0, :5])] == every[:5]
    want = [sums(language, t) for t in every[:5]]
    np.testing.assert_allclose(found.log_probs[0, :5], want, rtol=1e-5)  # sums of four float32
    np.testing.assert_allclose(found.scores[0, :5], np.array(want) / LENGTH, rtol=1e-5)


def pushes(name, after, t, text):
    """The penalties [V] of one earlier group, from its texts, those of this step."""
    W = len(after)
    if name == "hamming":
        return np.array([sum(a[t] == v for a in after) for v in range(V)], float)
    if name == "cumulative":
        past = sum(a[i] != text[i] for a in after for i in range(t))
        return np.array([np.exp(-(past + sum(a[t] != v for a in after)) / W) for v in range(V)])
    pairs = [pair for a in after for pair in itertools.pairwise(a)]
    return np.array([pairs.count((text[-1], v)) if text else 0 for v in range(V)], float)


def slowly(language, num_groups, width, name, strength):
    """Diverse beam search as the paper says it, without texts that end early."""
    groups = [[(0.0, ())] for _ in range(num_groups)]
    for t in range(LENGTH):
        done = []
        for texts in groups:
            options = []
            for score, text in texts:
                push = sum((pushes(name, [a for _, a in g], t, text) for g in done), np.zeros(V))
                a, b = (0, 0, *text)[-2:]
                new = score + np.asarray(language[a, b]) - strength * push
                options += [(new[v], (*text, v)) for v in range(V)]
            done.append(sorted(options, key=lambda o: -o[0])[:width])
        groups = done
    return groups


@pytest.mark.parametrize("name", ["hamming", "cumulative", "ngram"])
def test_diverse_beams_are_those_of_the_slow_form(name):
    language, num_groups, width = table(1), 3, 2
    start = tuple(Group.start(1, width, LENGTH) for _ in range(num_groups))
    got = by_table(language, start, name, 0.7)
    for group, want in zip(got, slowly(language, num_groups, width, name, 0.7), strict=True):
        texts = [tuple(t) for t in np.asarray(group.finished.tokens[0])]
        assert texts == [text for _, text in want]
        scores = [score / LENGTH for score, _ in want]
        np.testing.assert_allclose(group.finished.scores[0], scores, rtol=1e-5)  # as above
        raw = [sums(language, text) for text in texts]
        np.testing.assert_allclose(group.finished.log_probs[0], raw, rtol=1e-5)


def test_groups_that_do_not_push_are_alike_and_the_first_is_never_pushed():
    language = table(2)
    (alone,) = by_table(language, (Group.start(1, 2, LENGTH),))
    for strength in (0.0, 0.9):
        groups = by_table(
            language, tuple(Group.start(1, 2, LENGTH) for _ in range(3)), strength=strength
        )
        same = [bool((g.finished.tokens == alone.finished.tokens).all()) for g in groups]
        assert same == ([True] * 3 if strength == 0 else [True, *same[1:]])
        assert strength == 0 or not all(same)


@pytest.mark.parametrize("cache", slow_but(["dense", "ring"], SETTINGS))
def test_each_cache_keeps_the_beams_apart(cache):
    """One beam is greedy decoding; of four, each text has the log-probability that it was given."""
    model, params = tiny.model(), tiny.params()
    tokens = np.array([[5, 70, 9, 31], [3, 3, 8, 120]], np.int32)
    texts = search(model, params, tokens, 12, Beam(4, length_penalty=0.0), cache=SETTINGS[cache])
    greedy = search(model, params, tokens, 12, Beam(1, length_penalty=0.0), cache=SETTINGS[cache])
    kept = caches.parse(SETTINGS[cache]).init(model.config, 2, 16)

    @jax.jit
    def log_probs(params, whole):
        at = jnp.broadcast_to(jnp.arange(16)[None], whole.shape)
        hidden, _ = model.apply(
            {"params": params}, whole, at, at * 0 + 1, method="hidden", kept=kept.mask
        )
        return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))

    for row in range(2):
        best = [*map(int, greedy.tokens[row, 0])]
        assert float(texts.scores[row, 0]) >= float(greedy.scores[row, 0]) - 1e-4
        whole = np.concatenate([np.tile(tokens[row], (4, 1)), texts.tokens[row]], 1)
        said = np.asarray(log_probs(params, whole))[:, 3:-1]
        each = np.take_along_axis(said, whole[:, 4:, None], 2)
        # float32 sums in another order, through softmaxes that tiny's large weights make sharp
        np.testing.assert_allclose(texts.scores[row], each.sum((1, 2)), atol=1e-3)
        assert len(best) == 12


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_beams": 0}, "num_beams=0; allowed"),
        ({"num_beams": 6, "num_beam_groups": 4}, "num_beams=6; allowed: a multiple of"),
        ({"diversity_penalty": -1.0}, "diversity_penalty=-1.0; allowed"),
        ({"diversity": "haming"}, "diversity='haming'; allowed: hamming"),
        ({"early_stopping": "often"}, "early_stopping='often'; allowed: False, True, never"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        Beam(**settings)
