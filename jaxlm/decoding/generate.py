"""Text in, text out."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.caches.kind import CacheKind
from jaxlm.caches.on_mesh import init_cache, place_prompt
from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import search
from jaxlm.decoding.completion import NOT_FOUND, Choice, Completion, Scorer, logprobs_of
from jaxlm.decoding.engine import DecodeState, decode
from jaxlm.decoding.processors.batch import is_id
from jaxlm.decoding.request import Prompt, Prompts, Request, make_request
from jaxlm.decoding.search.method import Method
from jaxlm.decoding.stop_strings import check_stop, cut_at_stop, surely_said
from jaxlm.model.encoder_decoder import EncoderDecoder
from jaxlm.model.parameters import Model

# With stop strings the text is looked at after as many more tokens.
TOKENS_BETWEEN_LOOKS = 16


def drawn_of(state: DecodeState) -> list[list[int]]:
    """Each row's tokens, the stop token too."""
    rows = zip(np.asarray(state.tokens), np.asarray(state.drawn), strict=True)
    return [row[:count].tolist() for row, count in rows]


def _text(tokenizer: Tokenizer, prompt: list[int], new: list[int], stop_tokens: np.ndarray) -> str:
    """What `new` adds to the prompt's text, without a stop token at its end."""
    new = new[:-1] if new and new[-1] in stop_tokens else new
    return text_after(tokenizer, prompt, new)


def text_after(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """What `new` adds to the prompt's text; of a character that begins in the prompt, all.

    Decoded with the prompt: alone, the space that the first token begins with would be lost to
    tokenizers that put one before every text and take it away again (SentencePiece, Metaspace).
    """
    before, text = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    if text.startswith(before):
        return text[len(before) :]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    return text[sum(1 for _ in alike) :]


def complete(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Prompts,
    max_new_tokens: int = 64,
    stop: Sequence[str] | None = (),
    stop_token_ids: Sequence[int] | None = (),
    cache: str | CacheKind = "dense",
    logprobs: int | None = None,
    n: int = 1,
    best_of: int | None = None,
    length_penalty: float = 1.0,
    scorer: Scorer | None = None,
    method: str | Method | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continues each prompt, or answers it where the model is an encoder–decoder.

    Args:
        model, params, tokenizer: as from `jaxlm.load`; with its `mesh`, within `jax.set_mesh`.
        prompts: a batch of texts, or of token ids as they are (`jaxlm.chat_prompt`), lists or
            integer arrays [T], or all as one [B, T]; a row's text does not depend on the others.
        max_new_tokens: most tokens to draw for each.
        stop: strings at whose first occurrence a text ends; they are left out of it.
        stop_token_ids: tokens that end a text, beside the tokenizer's.
        cache: what keeps keys and values, such as "ring(window=1024)"; see `jaxlm.caches`.
        logprobs: how probable the model held each token and as many of the most probable ones, 0:
            the token alone; see `Completion`.
        n: how many continuations of each prompt, which is read once; they follow each other, their
            seeds count on. More than one need a temperature above 0.
        best_of: how many to draw of each prompt, of which the n best are given.
        length_penalty, scorer: what makes them better; see `Choice`.
        method: of search in place of drawing, such as "beam(num_beams=8)"; see
            `jaxlm.decoding.search`. The n best are given, with what the method ranks by as score;
            where it finds fewer, `jaxlm.decoding.completion.NOT_FOUND` in their place.
        **settings: temperature (0: greedy), top_k, top_p, seed — a number, or one for each prompt —
            and many more, all in `jaxlm.decoding.sampling.Sampling.make`.

    Raises:
        ValueError: no or empty prompts, a setting unknown or out of range, an id outside of the
            vocabulary, more positions than the position encoding has, an empty stop string, an
            unknown cache, best_of below n.
    """
    stop = check_stop(stop)
    choice = Choice(n, best_of, length_penalty, scorer)
    _check_logprobs(logprobs, model.config.vocab_size)
    given = (model, tokenizer, prompts, max_new_tokens, settings, cache, stop_token_ids)
    if method is not None:
        unused: dict[str, Any] = {"best_of": best_of, "logprobs": logprobs, "scorer": scorer}
        unused["length_penalty"] = None if length_penalty == 1 else length_penalty
        return _found(params, stop, search.parse(method), n, unused, given)
    r = make_request(*given, choice.drawn)
    kept = 0 if logprobs is None and choice.by_score else logprobs
    state = _run(model, params, tokenizer, r, r.start(model, params, kept), stop)
    found = _completions(tokenizer, r, state, stop)
    size = choice.drawn
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    chosen = [c for p, group in zip(prompts, groups, strict=True) for c in choice.best(p, group)]
    return chosen if logprobs is not None else [_without_logprobs(c) for c in chosen]


def _without_logprobs(completion: Completion) -> Completion:
    return dataclasses.replace(completion, logprobs=None)


def _found(
    params: Any,
    stop: Sequence[str],
    method: Method,
    n: int,
    unused: Mapping[str, Any],
    given: tuple[Any, ...],
) -> list[Completion]:
    """The n best texts of each prompt by a method of search.

    Args:
        unused: what has no meaning here.
        given: of `make_request`.
    """
    model, tokenizer = given[:2]
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} with method={str(method)!r}; allowed: None")
    if isinstance(model, EncoderDecoder):
        raise ValueError(f"method={str(method)!r}; allowed: None with an encoder–decoder")
    if n > method.num_texts:
        raise ValueError(f"n={n} with method={str(method)!r}; allowed: up to {method.num_texts}")
    r = functools.partial(make_request, rows_each=method.num_texts)(*given)
    if r.sampling.draws:
        told = "allowed: no temperature, top_k, top_p or other truncation, as nothing is drawn"
        raise ValueError(f"method={str(method)!r}; {told}")
    tokens, lengths = place_prompt(*r.prompt)
    cache = init_cache(r.cache, model.config, len(lengths), r.capacity)
    rest = (r.max_new_tokens, r.sampling, jnp.asarray(r.stop_tokens))
    texts = jax.tree.map(np.asarray, method.search(model, params, (tokens, lengths), cache, *rest))
    found = []
    for row, before in enumerate(r.before):
        scores = np.where(texts.lengths[row] > 0, texts.scores[row], -np.inf)
        for place in np.argsort(-scores, kind="stable")[:n]:
            ids = texts.tokens[row, place, : texts.lengths[row, place]].tolist()
            if not ids:
                found.append(NOT_FOUND)
                continue
            one = completion_of(tokenizer, r, before, ids, stop)
            found.append(dataclasses.replace(one, score=float(scores[place])))
    return found


def _check_logprobs(logprobs: Any, vocab_size: int) -> None:
    if logprobs is not None and not (is_id(logprobs) and 0 <= logprobs <= vocab_size):
        told = f"allowed: None, or an integer from 0 to {vocab_size}"
        raise ValueError(f"logprobs={logprobs!r}; {told}")


def _run(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    r: Request,
    state: DecodeState,
    stop: Sequence[str],
) -> DecodeState:
    """Draws all tokens; with stop strings the text is looked at now and then."""
    stops, until = jnp.asarray(r.stop_tokens), 0
    while until < r.max_new_tokens and not (until and bool(state.done.all())):
        more = until + TOKENS_BETWEEN_LOOKS if stop else r.max_new_tokens
        until = min(more, r.max_new_tokens)
        state = decode(model, params, state, jnp.asarray(until), r.sampling, stops)
        if stop:
            rows = zip(r.before, drawn_of(state), strict=True)
            texts = [_text(tokenizer, *pair, r.stop_tokens) for pair in rows]
            said = jnp.asarray([cut_at_stop(text, stop) != text for text in texts])
            state = dataclasses.replace(state, done=state.done | said)
    return state


def _completions(
    tokenizer: Tokenizer, r: Request, state: DecodeState, stop: Sequence[str]
) -> list[Completion]:
    """Of each row."""
    found = []
    for row, (before, ids) in enumerate(zip(r.before, drawn_of(state), strict=True)):
        one = completion_of(tokenizer, r, before, ids, stop)
        if state.logprobs is not None:
            told = logprobs_of(state.logprobs, row, one.token_ids)
            score = sum(p[i] for p, i in zip(told, one.token_ids, strict=True))
            one = dataclasses.replace(one, logprobs=told, score=score)
        found.append(one)
    return found


def completion_of(
    tokenizer: Tokenizer, r: Request, before: list[int], ids: list[int], stop: Sequence[str]
) -> Completion:
    """Of tokens that continue a row, up to the first stop string."""

    def says_stop(count: int) -> bool:
        text = _text(tokenizer, before, ids[:count], r.stop_tokens)
        return cut_at_stop(text, stop) != text

    text = _text(tokenizer, before, ids, r.stop_tokens)
    cut = cut_at_stop(text, stop)
    ended = cut != text or ids[-1] in r.stop_tokens
    kept = ids
    if cut != text:
        kept = ids[: 1 + bisect.bisect_left(range(1, len(ids)), True, key=says_stop)]
    return Completion(cut, kept, "stop" if ended else "length")


def generate(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Prompts,
    max_new_tokens: int = 64,
    stop: Sequence[str] | None = (),
    cache: str | CacheKind = "dense",
    **settings: Any,
) -> list[str]:
    """The texts of `complete`, which takes the same arguments and tells more of each."""
    given = (model, params, tokenizer, prompts, max_new_tokens, stop)
    return [c.text for c in complete(*given, cache=cache, **settings)]


def stream(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int = 64,
    tokens_per_update: int = 4,
    cache: str | CacheKind = "dense",
    stop: Sequence[str] | None = (),
    stop_token_ids: Sequence[int] | None = (),
    **settings: Any,
) -> Iterator[str]:
    """Like `generate` for one prompt, in pieces as they are drawn; joined they are its text.

    A piece never ends within a character: bytes of an unfinished one are held back, as is what may
    be the beginning of a stop string. (Where the last character of all is cut, a tokenizer that
    falls back to bytes makes U+FFFD of a whole run of them, some of which a piece had right.)
    """
    check("stream", tokens_per_update=integer_at_least(tokens_per_update, 1))
    stop = check_stop(stop)
    given = (model, tokenizer, [prompt], max_new_tokens, settings, cache, stop_token_ids)
    r = make_request(*given)
    state = r.start(model, params)
    stops = jnp.asarray(r.stop_tokens)
    sent = ""
    while True:
        (new,) = drawn_of(state)
        text = _text(tokenizer, r.before[0], new, r.stop_tokens)
        cut = cut_at_stop(text, stop)
        done = cut != text or bool(state.done.all()) or len(new) >= max_new_tokens
        ready = cut if done else surely_said(text.rstrip("\ufffd"), stop)
        if len(ready) > len(sent):
            yield ready[len(sent) :]
            sent = ready
        if done:
            return
        until = jnp.asarray(min(len(new) + tokens_per_update, max_new_tokens))
        state = decode(model, params, state, until, r.sampling, stops)
