"""Tokenizers out of GGUF metadata give the ids of the tokenizers that went in."""

import importlib.resources
import io
import time

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st

from jaxlm.data.tokenizers import HuggingFace
from jaxlm.interop import gguf_tokenizer
from jaxlm.interop.gguf_pre_tokenizers import PATTERNS, pre_tokenizer
from jaxlm.interop.gguf_tokenizer import _merges, stop_ids, tokenizer_json

TEXTS = importlib.resources.files("jaxlm.data") / "texts"
AUSTEN = (TEXTS / "austen_valid.txt").read_text(encoding="utf-8")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def built(metadata):
    text, config = tokenizer_json(metadata, "m.gguf")
    return HuggingFace(text.encode(), config, "m.gguf")


def metadata_of(model, prefix):
    """A SentencePiece model as llama.cpp's conversion scripts write it down."""
    pieces, kinds = [], []
    for i in range(model.get_piece_size()):
        pieces.append(model.id_to_piece(i))
        kinds.append(BYTE if model.is_byte(i) else CONTROL if model.is_control(i) else NORMAL)
    kinds[model.unk_id()] = UNKNOWN
    if "<tool>" in pieces:
        kinds[pieces.index("<tool>")] = USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no_prefix"])
def trained(request):
    """Llama's kind of SentencePiece model, and the same out of metadata."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(AUSTEN[:80_000].split("\n")),
        model_writer=out,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        # Behind one llama.cpp and the hub put the prefix again, SentencePiece does not.
        user_defined_symbols=[] if request.param else ["<tool>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    return model, built(metadata_of(model, request.param))


# Letters, runs of spaces, a user's token, and what only bytes can say.
PARTS = st.sampled_from(
    [*"aaeehtn ", "  ", "\n", "the", " was", "<tool>", "ñ", "語", "🙂", "<s>", "▁"]
)
TEXT = st.integers(0, 100_000).map(lambda i: AUSTEN[100_000 + i :][:200])


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=TEXT | st.lists(PARTS, max_size=30).map("".join))
def test_sentencepiece(trained, text):
    model, ours = trained
    ids = model.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == model.decode(ids)


def test_special_tokens_of_sentencepiece(trained):
    model, ours = trained
    assert (ours.bos_id, ours.eos_id) == (model.bos_id(), model.eos_id()) == (1, 2)
    (start, *rest) = [i for i, *_ in ours.encode_special("<s>was")]
    assert (start, rest) == (1, model.encode("was"))
    assert len(ours.encode("<s>")) > 1
    assert ours.encode_special("<unk>") == [(0, 0, 5)] and len(ours.encode("<unk>")) > 1
    assert ours.decode([0, *rest]) == "was"


TEXT_TO_CUT = "I'LL pay $12345+6\n\n HelloWorld (a,b) `c`"
# Pieces that llama.cpp cuts it into (b11549); on 190 texts in many scripts its ids were these.
PIECES = {
    "default": "I|'|LL| pay| |$|123|45|+|6|\n\n| HelloWorld| |(|a|,|b|)| `|c|`",
    "gpt-2": "I|'|LL| pay| $|12345|+|6|\n\n| HelloWorld| (|a|,|b|)| `|c|`",
    "smollm": "I|'|LL| pay| $|1|2|3|4|5|+|6|\n\n| HelloWorld| (|a|,|b|)| `|c|`",
    "llama-bpe": "I|'LL| pay| $|123|45|+|6|\n\n| HelloWorld| (|a|,b|)| `|c|`",
    "qwen2": "I|'LL| pay| $|1|2|3|4|5|+|6|\n\n| HelloWorld| (|a|,b|)| `|c|`",
    "falcon": "I|'|LL| pay| |$|123|45|+|6|\n\n| HelloWorld| |(|a|,|b|)| |`|c|`",
    "bloom": "I'LL| pay| $12345+6|\n\n| HelloWorld| (|a|,|b|)| `c`",
    "viking": "I'LL| pay| $|1|2|3|4|5|+|6|\n\n| HelloWorld| (|a|,|b|)| `c`",
    "tekken": "I|'LL| pay| $|1|2|3|4|5|+|6|\n\n| Hello|World| (|a|,b|)| `|c|`",
    "gpt-4o": "I'LL| pay| $|123|45|+|6|\n\n| Hello|World| (|a|,b|)| `|c|`",
    "deepseek-coder": "I|'|LL| pay| $|1|2|3|4|5|+|6|\n|\n| HelloWorld| (|a|,|b|)| `|c|`",
}


@pytest.mark.parametrize("name", PIECES)
def test_cutting_text(name):
    found = pre_tokenizer(name, "m.gguf").pre_tokenize_str(TEXT_TO_CUT)
    assert "|".join(TEXT_TO_CUT[a:b] for _, (a, b) in found) == PIECES[name]
    assert {PATTERNS[name] for name in PIECES} == set(PATTERNS.values())


def byte_pairs(**changes):
    letters = [chr(c) for c in range(33, 127)]
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": ["<|end|>", *letters, "ab", "abc", "abcd"],
        "token_type": [CONTROL, *[NORMAL] * (len(letters) + 3)],
        "merges": ["a b", "ab c"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items()}


@pytest.mark.parametrize(("pre", "count", "begins"), [("llama-bpe", 1, 0), ("gpt-2", 2, None)])
def test_llama_3_keeps_whole_words_and_begins_texts(pre, count, begins, tmp_path):
    tokenizer = built(byte_pairs(pre=pre))
    ids = tokenizer.encode("abcd")
    assert (len(ids), tokenizer.bos_id) == (count, begins)
    tokenizer.save(tmp_path)
    others = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert others.encode("abcd").ids == ([] if begins is None else [begins]) + ids


SPECIAL = ["<|user|>", "<|end|>", "<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("kinds", "more", "ends"),
    [
        ([3, 3, 3, 1], [], ["<|end|>", "<|endoftext|>"]),
        ([3, 3, 3, 3], [], ["<|end|>", "<|endoftext|>", "<|im_end|>"]),
        # Of gpt-oss <|end|> ends a message that another follows.
        ([3, 3, 3, 1], ["<|return|>", "<|call|>"], ["<|endoftext|>", "<|return|>", "<|call|>"]),
    ],
)
def test_tokens_that_end_a_turn_by_their_names(kinds, more, ends):
    """Phi-3's files name <|endoftext|> alone, and its template ends turns with <|end|>."""
    tokens = [*SPECIAL, *more]
    kinds = [*kinds, *[CONTROL] * len(more)]
    found = stop_ids({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    assert [tokens[i] for i in found] == ends


@pytest.mark.parametrize(("architecture", "spaces"), [("phi3", 0), ("llama", 2)])
def test_white_space_behind_phi_3s_control_tokens(architecture, spaces):
    tokens = ["<unk>", "<s>", "</s>", *SPECIAL[:3], "▁", "a", "▁a", "\n"]
    metadata = byte_pairs(model="llama", tokens=tokens, scores=[0.0] * len(tokens))
    metadata["tokenizer.ggml.token_type"] = [UNKNOWN, *[CONTROL] * 5, *[NORMAL] * 4]
    tokenizer = built(metadata | {"general.architecture": architecture})
    ids = [i for i, *_ in tokenizer.encode_special("<|user|>\na<|end|>\n<s>\n")]
    assert [tokens[i] for i in ids].count("\n") == 1 + spaces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, r"m.gguf: tokenizer.ggml.model='rwkv'; allowed: gpt2, llama"),
        ({"model": ["gpt2"]}, r"m.gguf: tokenizer.ggml.model=\['gpt2'\]; allowed: gpt2, llama"),
        ({"model": "llama", "scores": ["a"] * 98}, r"tokenizer.ggml.scores; allowed: a list of"),
        ({"pre": "klingon"}, r"m.gguf: tokenizer.ggml.pre='klingon'; allowed: default, gpt-2"),
        ({"model": "llama"}, r"m.gguf: tokenizer.ggml.scores; allowed: a list of 98 numbers"),
        ({"tokens": [1, 2]}, r"m.gguf: tokenizer.ggml.tokens; allowed: a list of texts"),
        ({"token_type": [1]}, r"m.gguf: tokenizer.ggml.token_type; allowed: a number for each"),
        ({"merges": ["a z"]}, r"m.gguf: its merges are no byte pair encoding"),
        ({"eos_token_id": 98}, r"m.gguf: eos_token_id=98; allowed: 0 to 97"),
    ],
)
def test_what_is_no_tokenizer(change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_json(byte_pairs(**change), "m.gguf")


def test_the_time_of_a_long_piece_grows_with_its_length():
    pieces = {"a": (0.0, 0), "b": (1.0, 1), "ab": (2.0, 2)}
    pieces |= {"ab" * 500: (3.0, 3), "ab" * 500 + "b": (4.0, 4)}
    pieces |= {str(i).zfill(1024): (5.0 + i, 5 + i) for i in range(30_000)}
    start = time.monotonic()
    assert _merges(pieces, "") == [("a", "b"), ("ab" * 500, "b")]
    assert time.monotonic() - start < 5  # with its square: a minute


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["a", "a" * 1025], "m.gguf: a piece has 1025 letters; allowed: at most 1024"),
        (["a" * i for i in range(1, 20)], "m.gguf: its pieces join in more ways than 100; allowed"),
    ],
)
def test_pieces_that_would_fill_the_memory(pieces, message, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "MAX_MERGES", 100)
    with pytest.raises(ValueError, match=message):
        _merges({piece: (0.0, i) for i, piece in enumerate(pieces)}, "m.gguf")
