"""Text in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import caches
from jaxlm.caches.kind import CacheKind
from jaxlm.config import at_least, check
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.engine import DecodeState, decode, prefill, prefill_encoded
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxlm.model.parameters import Model
from jaxlm.sharding.memory import device_memory

# Prompts are padded to the next power of two from here on, so that few programs serve all lengths.
SMALLEST_BUCKET = 16
# With stop strings the text is looked at after as many more tokens.
TOKENS_BETWEEN_LOOKS = 16


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked batch of prompts, padded behind, with room for what is drawn.

    Attributes:
        before: the tokens that each row's text continues.
        cache: what keeps their keys and values.
    """

    before: list[list[int]]
    prompt: tuple[np.ndarray, np.ndarray]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: np.ndarray
    cache: CacheKind


def _request(model, tokenizer, prompts, max_new_tokens, settings, cache="dense") -> _Request:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts={prompts!r}; allowed: a non-empty list of texts or ids")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; allowed: an integer >= 1")
    encoded = isinstance(model, EncoderDecoder)
    end = [tokenizer.eos_id] if encoded else []
    rows = [_ids(model, tokenizer, p, end) for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"prompt={prompt!r} is empty and the tokenizer has no start token")
    longest = max(len(row) for row in rows)
    limit = _check_lengths(model.config, longest, max_new_tokens)
    kind = caches.parse(cache)
    if encoded and kind.name != "dense":
        raise ValueError(f"cache={str(kind)!r}; allowed: 'dense' with an encoder–decoder")
    if not kind.holds([len(row) + max_new_tokens for row in rows]):
        raise ValueError(
            f"cache={str(kind)!r}; allowed: one that holds {len(rows)} texts of up to "
            f"{longest + max_new_tokens} tokens"
        )
    _check_memory(model, kind, len(rows), longest, max_new_tokens)
    width = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    if limit is not None:
        width = min(width, limit)  # a table of positions has no rows for padding past its end
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    sampling = Sampling.make(len(rows), **settings)
    stops = np.array(tokenizer.stop_ids, np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    before = [[] for _ in rows] if encoded else rows
    return _Request(before, (tokens, lengths), max_new_tokens, sampling, stops, kind)


def _ids(model: Model, tokenizer: Tokenizer, prompt: Any, end: list[int]) -> list[int]:
    """A prompt's ids, a text's between the start token and `end`."""
    if isinstance(prompt, str):
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + list(tokenizer.encode(prompt)) + end
    size = model.config.vocab_size
    if not (isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt)):
        raise ValueError(f"prompt={prompt!r}; allowed: a string or a sequence of token ids")
    unlike = [i for i in prompt if not 0 <= i < size]
    if unlike:
        raise ValueError(f"prompt: token id {unlike[0]}; allowed: 0 to {size - 1}")
    return list(prompt)


def _check_lengths(
    config: ModelConfig | EncoderDecoderConfig, longest: int, max_new_tokens: int
) -> int | None:
    """How many positions a prompt may take; None: any number."""
    if isinstance(config, ModelConfig):
        of = {"prompt + max_new_tokens": (longest + max_new_tokens, config.encoding)}
        limit = config.encoding.max_length
    else:
        decoder = config.decoder.encoding
        of = {
            "prompt": (longest, config.encoder.encoding),
            "max_new_tokens": (max_new_tokens, decoder),
        }
        limit = config.encoder.encoding.max_length
    for name, (total, encoding) in of.items():
        if encoding.max_length is not None and total > encoding.max_length:
            raise ValueError(
                f"{name} = {total}; allowed: at most {encoding.max_length} with "
                f"position_encoding={encoding}"
            )
    return limit


def _check_memory(
    model: Model, cache: CacheKind, rows: int, longest: int, max_new_tokens: int
) -> None:
    """Raises ValueError where keys and values would take more than all memory that there is."""
    if isinstance(model, EncoderDecoder):
        config, capacity = model.config.decoder, max_new_tokens
    else:
        config, capacity = model.config, longest + max_new_tokens
    wanted, there = cache.nbytes_of(config, rows, capacity), device_memory()
    if there is not None and wanted > there:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}; allowed: fewer, as the cache of {rows} × {capacity} "
            f"tokens would take {wanted:,} bytes, of {there:,} that there are"
        )


def _start(model: Model, params: Any, r: _Request) -> DecodeState:
    tokens, lengths = r.prompt
    prompt = (jnp.asarray(tokens), jnp.asarray(lengths))
    stops = jnp.asarray(r.stop_tokens)
    if isinstance(model, EncoderDecoder):
        return prefill_encoded(model, params, prompt, r.max_new_tokens, r.sampling, stops)
    cache = r.cache.init(model.config, len(lengths), tokens.shape[1] + r.max_new_tokens)
    return prefill(model, params, prompt, cache, r.max_new_tokens, r.sampling, stops)


def _rows(state: DecodeState, stop_tokens: np.ndarray) -> list[list[int]]:
    """Each row's tokens up to its stop token, which is left out."""
    cut = []
    for buffer, drawn in zip(np.asarray(state.tokens), np.asarray(state.drawn), strict=True):
        row = buffer[:drawn]
        at = np.flatnonzero(np.isin(row, stop_tokens))
        cut.append(row[: at[0]].tolist() if len(at) else row.tolist())
    return cut


def _text_after(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """What `new` adds to the prompt's text.

    Decoded with the prompt: alone, the space that the first token begins with would be lost to
    tokenizers that put one before every text and take it away again (SentencePiece, Metaspace).
    """
    return tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to where the first of the stop strings begins; all of it without one."""
    found = (text.find(s) for s in stop)
    return text[: min((at for at in found if at >= 0), default=len(text))]


def generate(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    cache: str | CacheKind = "dense",
    **settings: Any,
) -> list[str]:
    """Continues each prompt, or answers it where the model is an encoder–decoder.

    Args:
        model, params, tokenizer: as from `jaxlm.load`.
        prompts: a batch of texts, or of token ids as they are (`jaxlm.chat_prompt`); a row's text
            does not depend on the other rows.
        max_new_tokens: most tokens to draw for each.
        stop: strings at whose first occurrence a text ends; they are left out of it.
        cache: what keeps keys and values, such as "ring(window=1024)"; see `jaxlm.caches`.
        **settings: temperature (0: greedy), top_k, top_p, seed — a number, or one for each prompt;
            see `jaxlm.decoding.sampling.Sampling`.

    Raises:
        ValueError: no or empty prompts, a setting out of range, more positions than the position
            encoding has, an empty stop string, an unknown cache.
    """
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop={stop!r}; allowed: a list of non-empty strings")
    r = _request(model, tokenizer, prompts, max_new_tokens, settings, cache)
    state, stops, until = _start(model, params, r), jnp.asarray(r.stop_tokens), 0
    while True:
        until = min(until + TOKENS_BETWEEN_LOOKS, max_new_tokens) if stop else max_new_tokens
        state = decode(model, params, state, jnp.asarray(until), r.sampling, stops)
        drawn = _rows(state, r.stop_tokens)
        texts = [_text_after(tokenizer, *pair) for pair in zip(r.before, drawn, strict=True)]
        cut = [cut_at_stop(text, stop) for text in texts]
        said = jnp.asarray([len(a) < len(b) for a, b in zip(cut, texts, strict=True)])
        state = dataclasses.replace(state, done=state.done | said)
        if until == max_new_tokens or bool(state.done.all()):
            return cut


def stream(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int = 64,
    tokens_per_update: int = 4,
    cache: str | CacheKind = "dense",
    **settings: Any,
) -> Iterator[str]:
    """Like `generate` for one prompt, in pieces as they are drawn; joined they are its text.

    A piece never ends within a character: bytes of an unfinished one are held back.
    """
    check("stream", tokens_per_update=at_least(tokens_per_update, 1))
    r = _request(model, tokenizer, [prompt], max_new_tokens, settings, cache)
    state = _start(model, params, r)
    stops = jnp.asarray(r.stop_tokens)
    sent = ""
    while True:
        count = int(state.drawn[0])
        done = bool(state.done.all()) or count >= max_new_tokens
        text = _text_after(tokenizer, r.before[0], _rows(state, r.stop_tokens)[0])
        ready = text if done else text.rstrip("\ufffd")
        if len(ready) > len(sent):
            yield ready[len(sent) :]
            sent = ready
        if done:
            return
        until = jnp.asarray(min(count + tokens_per_update, max_new_tokens))
        state = decode(model, params, state, until, r.sampling, stops)
