"""A GGUF file's vocabulary as a tokenizer of the `tokenizers` library.

Of two kinds: "gpt2", byte pairs by their merges, and "llama", SentencePiece's byte pairs, of which
each piece has a score and the pair that makes the best piece is joined first.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any

from absl import logging
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from jaxlm.config import fits
from jaxlm.interop.gguf_pre_tokenizers import COMPOSED, WHOLE_WORDS, pre_tokenizer

# Kinds of token in GGUF; 3 is a control token, 4 one that a user added.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)
# Control tokens that end a text, a turn or a message. Few files name more than one of theirs, which
# need not be the one that the chat template ends a turn with (Phi-3's); llama.cpp goes by this too.
ENDS = {
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>"),
    *("<end_of_turn>", "<|return|>", "<|call|>"),
}
# Behind these of Phi-3's control tokens white space is kept.
KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
SPACE = "▁"  # SentencePiece's
# A vocabulary of 256,000 pieces has half a million ways to join two, and no piece of 100 letters:
# what a file may have without taking gigabytes or hours.
MAX_PIECE, MAX_MERGES = 1024, 2**22


def stop_ids(metadata: dict[str, Any]) -> list[Any]:
    """Ids that end a text, a turn or a message: the named ones, and those of well-known names."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = [metadata[name] for name in names if name in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    # Of gpt-oss <|end|> ends a message that another follows.
    ends = ENDS - ({"<|end|>"} if "<|return|>" in tokens else set())
    known = zip(itertools.count(), tokens, kinds, strict=False)
    return named + [i for i, token, of in known if of == CONTROL and token in ends]


def tokenizer_json(metadata: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and what a tokenizer_config.json beside it would say.

    Raises:
        ValueError: a kind of tokenizer, or of cutting text, that is not known; no such tokenizer.
    """
    about = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind, tokens = about.get("model"), about.get("tokens", [])
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}: tokenizer.ggml.model={kind!r}; allowed: {', '.join(KINDS)}")
    if not _texts(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens; allowed: a list of texts")
    kinds = about.get("token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(
            f"{where}: tokenizer.ggml.token_type; allowed: a number for each of the tokens"
        )
    if kind == "gpt2" and "pre" not in about:
        logging.warning("%s: no tokenizer.ggml.pre; text is cut as llama.cpp then does", where)
    build, defaults = KINDS[kind]
    about = defaults | about | {"token_type": kinds}
    inner = build(about, where)
    # As on the hub; a file does not say it, and other models' tokens keep white space.
    strips = kind == "llama" and metadata.get("general.architecture") == "phi3"
    for token, of in zip(tokens, kinds, strict=True):
        if of in (UNKNOWN, CONTROL):
            right = strips and token not in KEEP_SPACE
            added = AddedToken(token, special=True, normalized=False, rstrip=right)
            inner.add_special_tokens([added])
        elif of == USER_DEFINED:
            inner.add_tokens([AddedToken(token, normalized=False)])
    begins = about.get("add_bos_token", kind == "llama" or about.get("pre") in WHOLE_WORDS)
    return inner.to_str(), {
        "eos_token": _named(about, "eos", where),
        "bos_token": _named(about, "bos", where),
        "add_bos_token": begins,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _named(about: dict[str, Any], name: str, where: str) -> str | None:
    """A special token's text."""
    index, tokens = about.get(f"{name}_token_id"), about["tokens"]
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        allowed = f"0 to {len(tokens) - 1}"
        raise ValueError(f"{where}: {name}_token_id={index}; allowed: {allowed}")
    return tokens[index]


def _byte_pairs(about: dict[str, Any], where: str) -> Tokenizer:
    """GPT-2's kind."""
    tokens, merges, pre = about["tokens"], about.get("merges", []), about["pre"]
    if not _texts(merges) or not all(" " in merge for merge in merges):
        raise ValueError(f"{where}: tokenizer.ggml.merges; allowed: texts of two parts")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    try:
        inner = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{where}: its merges are no byte pair encoding: {error}") from error
    inner.pre_tokenizer = pre_tokenizer(pre, where)
    if pre in COMPOSED:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(about: dict[str, Any], where: str) -> Tokenizer:
    """SentencePiece's kind, without its normalization: that of Llama 1 and 2, Mistral, Gemma, …."""
    tokens, scores = about["tokens"], about.get("scores", [])
    numbers = isinstance(scores, list) and all(fits(score, float) for score in scores)
    if not numbers or len(scores) != len(tokens):
        allowed = f"a list of {len(tokens)} numbers, one for each token"
        raise ValueError(f"{where}: tokenizer.ggml.scores; allowed: {allowed}")
    pieces = {
        token: (-score, i)
        for i, (token, score, of) in enumerate(
            zip(tokens, scores, about["token_type"], strict=True)
        )
        if of == NORMAL
    }
    merges = _merges(pieces, where)
    unknown = _named(about, "unknown", where)
    vocabulary = {t: i for i, t in enumerate(tokens)}
    try:
        pairs = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{where}: its pieces are no byte pair encoding: {error}") from error
    inner = Tokenizer(pairs)
    first = [normalizers.Prepend(SPACE)] if about["add_space_prefix"] else []
    inner.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    last = [decoders.Strip(" ", 1, 0)] if about["add_space_prefix"] else []
    inner.decoder = decoders.Sequence([*back, *last])
    return inner


def _merges(pieces: dict[str, tuple[float, int]], where: str) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best pieces first.

    Raises:
        ValueError: a longer piece, or more ways, than any vocabulary has.
    """
    # Lengths that occur, not all: the time would grow with the square of a long piece's.
    lengths = sorted({len(piece) for piece in pieces})
    if lengths and lengths[-1] > MAX_PIECE:
        raise ValueError(
            f"{where}: a piece has {lengths[-1]} letters; allowed: at most {MAX_PIECE}"
        )
    ways = (
        (rank, (piece[:i], piece[i:]))
        for piece, rank in pieces.items()
        for i in lengths[: bisect.bisect_left(lengths, len(piece))]
        if i > 0 and piece[:i] in pieces and piece[i:] in pieces
    )
    found = list(itertools.islice(ways, MAX_MERGES + 1))
    if len(found) > MAX_MERGES:
        raise ValueError(
            f"{where}: its pieces join in more ways than {MAX_MERGES}; allowed: at most that"
        )
    return [pair for _, pair in sorted(found, key=lambda item: item[0])]


# GGUF's name of a kind; what absent keys mean.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (_byte_pairs, {"pre": "default"}),
    "llama": (
        _sentencepiece,
        {"add_space_prefix": True, "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
