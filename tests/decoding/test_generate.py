"""Generation against the definition: the full forward of everything so far, token by token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers

from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.decoding import generate as module
from jaxlm.decoding.generate import generate, stream, text_after
from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.request import check_count, make_request
from jaxlm.decoding.stop_strings import check_stop, cut_at_stop
from jaxlm.model.parameters import init_params
from jaxlm.training.compiles import count_compiles
from tests.data.samples import training_text
from tests.decoding import tiny
from tests.marks import slow_but

PROMPTS = ["Emma was", "It", "a much longer prompt, 42 é"]
NEW = 36  # in most tests alike, so that they share programs; the longest prompt's end at 64


def start(prompt):
    return [tiny.TOKENIZER.bos_id, *tiny.TOKENIZER.encode(prompt)]


def greedy(model, params, prompt, count, eos_id=None):
    row = start(prompt)
    first = len(row)
    for _ in range(count):
        token = int(np.argmax(tiny.next_logits(model, params, row)))
        if token == eos_id:
            break
        row.append(token)
    return row[first:]


# A rotation, a bias, a mask with far pairs, absolute positions, and none.
@pytest.mark.parametrize(
    "encoding",
    [
        "lm_infinite(window=8, num_sinks=2)",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("sinusoidal", "rope", "alibi", "nope")),
    ],
)
def test_greedy_is_the_argmax_of_a_full_forward_at_each_step(encoding):
    model, params = tiny.model(encoding), tiny.params()
    texts = generate(model, params, tiny.TOKENIZER, PROMPTS, max_new_tokens=20)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        # The two programs sum in another order; near-ties of logits could part them, and do not.
        want = greedy(model, params, prompt, 20, tiny.TOKENIZER.eos_id)
        assert text == tiny.TOKENIZER.decode(want)


class StopsAt(type(tiny.TOKENIZER)):
    """Bytes with another end token."""

    def __init__(self, eos_id):
        self.eos_id, self.stop_ids = eos_id, (eos_id,)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model, params = tiny.model(), tiny.params()
    free = [greedy(model, params, p, NEW) for p in PROMPTS]
    eos = free[0][4]
    texts = generate(model, params, StopsAt(eos), PROMPTS, max_new_tokens=NEW)
    for row, text in zip(free, texts, strict=True):
        cut = row[: row.index(eos)] if eos in row else row
        assert text == tiny.TOKENIZER.decode(cut)
    assert len({len(t) for t in texts}) > 1


def test_a_row_ends_where_a_stop_string_begins():
    model, params = tiny.model(), tiny.params()
    free = generate(model, params, tiny.TOKENIZER, PROMPTS, max_new_tokens=NEW)
    late, early = free[0][25:27], free[1][3:5]
    stop = [late, early, "never said"]
    got = generate(model, params, tiny.TOKENIZER, PROMPTS, max_new_tokens=NEW, stop=stop)
    assert got == [cut_at_stop(text, stop) for text in free]
    assert 0 < len(got[0]) <= 25 and len(got[1]) <= 3
    assert cut_at_stop("abcab", ["ca", "b"]) == "a"
    assert cut_at_stop("abcab", []) == cut_at_stop("abcab", ["x"]) == "abcab"


def test_a_batch_whose_rows_have_all_stopped_is_drawn_no_further(monkeypatch):
    counts = []

    def decode(model, params, state, until, *rest):
        counts.append(int(until))
        return inner(model, params, state, until, *rest)

    inner = module.decode
    monkeypatch.setattr(module, "decode", decode)
    model, params = tiny.model(), tiny.params()
    (free,) = generate(model, params, tiny.TOKENIZER, ["It"], max_new_tokens=NEW)
    counts.clear()
    generate(model, params, tiny.TOKENIZER, ["It"], max_new_tokens=NEW, stop=[free[20:22]])
    assert counts == [16, 32] or (counts == [16] and free[20:22] in free[:16])


@pytest.mark.parametrize("stop", ["text", [""]])
def test_stop_strings_that_are_none(stop):
    with pytest.raises(ValueError, match=r"stop=.*; allowed: a list of non-empty strings"):
        generate(tiny.model(), {}, tiny.TOKENIZER, ["It"], stop=stop)


def test_a_row_does_not_depend_on_the_others():
    model, params = tiny.model(), tiny.params()
    settings = {"max_new_tokens": NEW, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    together = generate(model, params, tiny.TOKENIZER, PROMPTS, seed=[5, 6, 7], **settings)
    for prompt, seed, text in zip(PROMPTS, [5, 6, 7], together, strict=True):
        alone = generate(model, params, tiny.TOKENIZER, [prompt], seed=seed, **settings)
        assert alone == [text]
    assert generate(model, params, tiny.TOKENIZER, PROMPTS, seed=9, **settings) != together


@pytest.mark.parametrize("tokens_per_update", [1, 3, 50])
def test_streamed_pieces_join_to_the_whole_text(tokens_per_update):
    model, params = tiny.model(), tiny.params()
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 2}
    (whole,) = generate(model, params, tiny.TOKENIZER, ["né"], **settings)
    pieces = list(
        stream(
            model,
            params,
            tiny.TOKENIZER,
            "né",
            tokens_per_update=tokens_per_update,
            **settings,
        )
    )
    assert "".join(pieces) == whole
    assert tokens_per_update > NEW or len(pieces) > 1


def spaced_sentencepiece(folder):
    """With SentencePiece's own defaults: a space is put before every text and taken away again."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text().split("\n\n")),
        model_prefix=str(folder / "spaced"),
        vocab_size=tiny.TOKENIZER.vocab_size,
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
    )
    return str(folder / "spaced.model")


def spaced_metaspace(folder):
    """The same of a tokenizer.json."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tiny.TOKENIZER.vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    inner.train_from_iterator([training_text()], trainer)
    inner.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("make", [spaced_sentencepiece, spaced_metaspace])
def test_a_continuation_keeps_the_space_that_it_begins_with(tmp_path, make):
    model, params, tokenizer = tiny.model(), tiny.params(), load_tokenizer(make(tmp_path))
    prompts = ["Emma was", "It is", "her father", "a very", "the house", "and so"]
    given, settings = (model, params, tokenizer), {"temperature": 1.0, "seed": 3}
    for prompt in prompts:
        (text,) = generate(*given, [prompt], NEW, **settings)
        assert "".join(stream(*given, prompt, NEW, **settings)) == text
    texts = [generate(*given, [prompt], NEW)[0] for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        row = list(start)
        while len(row) < len(start) + NEW:
            row.append(int(np.argmax(tiny.next_logits(model, params, row))))
            if row[-1] == tokenizer.eos_id:
                break
        assert prompt + text == tokenizer.decode(row)
    assert any(text.startswith(" ") for text in texts)


@pytest.mark.parametrize(
    ("table", "prompt", "count"),
    slow_but([(8, 7, 1)], [(100, 70, 5), (100, 95, 5), (8, 3, 2), (8, 7, 1)]),
)
def test_a_prompt_that_fits_the_table_is_continued(table, prompt, count):
    """Padding to a power of two would not fit."""
    model = tiny.model("learned", context_length=table)
    params = init_params(model, 0)
    text = "x" * (prompt - 1)  # and the start token
    (alone,) = generate(model, params, tiny.TOKENIZER, [text], max_new_tokens=count)
    assert alone == "".join(stream(model, params, tiny.TOKENIZER, text, max_new_tokens=count))
    row = start(text)
    for _ in range(count):
        row.append(int(np.argmax(tiny.next_logits(model, params, row, table))))
    assert alone == tiny.TOKENIZER.decode(row[prompt:])


def test_prompts_and_settings_of_one_shape_compile_once():
    model, params = tiny.model(), tiny.params()
    generate(model, params, tiny.TOKENIZER, PROMPTS, max_new_tokens=NEW)
    with count_compiles() as compiles:
        settings = {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "seed": 4}
        others = ["a", "longer one", 25 * "z"]
        generate(model, params, tiny.TOKENIZER, others, max_new_tokens=NEW, **settings)
        alike = [20 * letter for letter in "bcd"]
        texts = generate(tiny.model(), params, tiny.TOKENIZER, alike, max_new_tokens=NEW)
        # Token ids of every kind are the same prompts.
        rows = np.array([start(prompt) for prompt in alike])
        for ids in (rows, list(rows), rows.tolist()):
            assert generate(model, params, tiny.TOKENIZER, ids, max_new_tokens=NEW) == texts
    assert sum(compiles.values()) == 0
    on_device = jax.numpy.asarray(rows, jax.numpy.int32)
    assert generate(model, params, tiny.TOKENIZER, on_device, max_new_tokens=NEW) == texts
    pieces = stream(model, params, tiny.TOKENIZER, on_device[1], max_new_tokens=NEW)
    assert "".join(pieces) == texts[1]


def test_the_cache_is_donated():
    """No second copy of the cache: what goes in does not outlive the call."""
    model, params = tiny.model(), tiny.params()
    request = make_request(model, tiny.TOKENIZER, ["abc"], NEW, {})
    state = request.start(model, params)
    (keys,) = state.cache.keys
    stops = jax.numpy.asarray(request.stop_tokens)
    module.decode(model, params, state, jax.numpy.asarray(8), request.sampling, stops)
    assert keys.is_deleted()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts=\[\]; allowed: a non-empty list"),
        ({"prompts": "Emma"}, "prompts='Emma'; allowed: a non-empty list"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed: an integer >= 1"),
        ({"temperature": -1}, "temperature=-1; allowed"),
        ({"top_k": -2}, r"top_k=-2; allowed: \[-1, 2147483647\]"),
        (
            {"seed": 2**80},
            r"seed=1208925819614629174706176; allowed: a number in \[0, 2147483647\]",
        ),
        ({"top_p": 0}, "top_p=0; allowed"),
        ({"seed": [1, 2, 3]}, "seed has 3 values; allowed: one, or 1"),
        ({"prompts": ["a", "\udcff\udcfe"]}, r"text …'\\udcff\\udcfe'… is not UTF-8"),
        (
            {"max_new_tokens": 10**11},
            r"max_new_tokens=1\d*; allowed: fewer, .* 1 × 100000000016 tokens would take [\d,]* b",
        ),
        ({"encoding": "learned", "max_new_tokens": 64}, "= 66; allowed: at most 64"),
        ({"max_new_tokens": True}, "max_new_tokens=True; allowed: an integer >= 1"),
        ({"logit_bias": {1: 1e300}}, r"logit_bias.*=1e\+300; allowed: a number up to 3.4"),
        ({"n": True}, "n=True; allowed: an integer >= 1"),
    ],
)
def test_errors_at_the_door(arguments, message):
    model = tiny.model(arguments.pop("encoding", "rope"))
    arguments = {"prompts": ["a"], **arguments}
    with pytest.raises(ValueError, match=message):
        generate(model, {}, tiny.TOKENIZER, **arguments)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"Emma", r"prompts=b'Emma'; allowed: a non-empty list of texts or ids"),
        ([b"Emma"], r"prompt=b'Emma'; allowed: a string or a list of token ids"),
        ([bytearray(b"E")], r"prompt=bytearray\(b'E'\); allowed: a string or a list"),
        (np.ones((2, 3)), r"prompts=float64\[2, 3\]; allowed: a non-empty list of texts or ids"),
        (np.zeros((0, 3), int), r"prompts=\[\]; allowed"),
        ([np.ones(3)], r"prompt=float64\[3\]; allowed: a string or a list of token ids"),
        ([np.ones((1, 2), int)], r"prompt=\[\[1, 1\]\]; allowed: a string or a list of token ids"),
        (np.arange(3), "prompt=0; allowed: a string or a list of token ids"),
        ([np.array([1, 999])], "prompt: token id 999; allowed: 0 to 257"),
        ([[True]], r"prompt=\[True\]; allowed"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompts, message):
    with pytest.raises(ValueError, match=message):
        make_request(tiny.model(), tiny.TOKENIZER, prompts, 8, {})


def test_a_stream_goes_on_by_at_least_one_token():
    pieces = stream(tiny.model(), {}, tiny.TOKENIZER, "a", tokens_per_update=0)
    with pytest.raises(ValueError, match="tokens_per_update=0; allowed: an integer >= 1"):
        next(pieces)


def test_a_character_that_begins_in_the_prompt_is_whole():
    """Of a token that is a byte; one that never ends stays what it was."""
    start, rest = [0xE4], [0xB8, 0xAD, ord("b")]
    assert text_after(tiny.TOKENIZER, [97, *start], rest) == "中b"
    assert text_after(tiny.TOKENIZER, [97, *start], [ord("b")]) == "b"
    assert text_after(tiny.TOKENIZER, [97], [*start, *rest]) == "中b"


def test_none_means_no_stop():
    given = (tiny.model(), tiny.params(), tiny.TOKENIZER, ["a"], NEW)
    assert generate(*given, stop=None, stop_token_ids=None) == generate(*given)


@pytest.mark.parametrize(
    ("door", "given", "told"),
    [
        (check_stop, 5, "stop=5; allowed: a list of non-empty strings"),
        (functools.partial(check_count, "max_new_tokens"), "5", "max_new_tokens='5'; allowed"),
        (lambda x: Batch(1).numbers("top_p", x, 0, 1, float), None, "top_p=None; allowed: a num"),
        (lambda x: Batch(1).numbers("seed", x, 0, 1, int), True, "seed=True; allowed: a number"),
        (lambda x: Batch(1).numbers("min_p", x, 0, 1, float), "0.5", "min_p='0.5'; allowed: a n"),
    ],
)
def test_values_of_other_types(door, given, told):
    """At the doors themselves: in tests annotations are checked before."""
    with pytest.raises(ValueError, match=told):
        door(given)


def test_counts_are_numpys_too():
    assert check_count("max_new_tokens", np.int64(4)) == 4


def test_an_empty_prompt_needs_a_start_token():
    class NoStart(type(tiny.TOKENIZER)):
        bos_id = None

    with pytest.raises(ValueError, match="has no token; allowed: a text, or an empty one"):
        generate(tiny.model(), {}, NoStart(), [""])
    assert len(generate(tiny.model(), tiny.params(), tiny.TOKENIZER, [""], max_new_tokens=NEW)) == 1


def test_states_are_plain_pytrees():
    request = make_request(tiny.model(), tiny.TOKENIZER, ["abc"], NEW, {})
    state = request.start(tiny.model(), tiny.params())
    leaves = jax.tree.leaves(state)
    assert len(leaves) == len(dataclasses.fields(state)) - 4 + len(jax.tree.leaves(state.cache))
