"""A checked batch of prompts: everything that can be wrong is told before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import caches
from jaxlm.caches.kind import CacheKind
from jaxlm.caches.on_mesh import init_cache, place_prompt
from jaxlm.caches.rows import round_up
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.engine import DecodeState, prefill, prefill_encoded, prefill_shared
from jaxlm.decoding.processors.batch import Batch, is_id
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxlm.model.parameters import Model
from jaxlm.sharding.memory import device_memory

# Prompts are padded to the next power of two from here on, so that few programs serve all lengths.
SMALLEST_BUCKET = 16
# And the stop tokens to a multiple of this.
STOP_TOKENS = 8
NO_TOKEN = -1

# A text or its token ids, [T] of an array; and a batch of these, [B, T] of one.
Prompt = str | Sequence[int] | np.ndarray | jax.Array
Prompts = Sequence[Prompt] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked batch of prompts, padded behind, with room for what is drawn.

    Attributes:
        before: the tokens that each row's text continues; rows of one prompt follow each other.
        prompt: tokens and true lengths of each prompt.
        stop_tokens: that end a row; and `NO_TOKEN`.
        cache: what keeps their keys and values.
    """

    before: list[list[int]]
    prompt: tuple[np.ndarray, np.ndarray]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: np.ndarray
    cache: CacheKind

    @property
    def capacity(self) -> int:
        """Slots of each row in the cache."""
        return _slots(self.prompt[0].shape[1], self.max_new_tokens)

    def start(self, model: Model, params: Any, logprobs: int | None = None) -> DecodeState:
        """Reads the prompts, once each, and draws the first token of each row.

        Args:
            logprobs: as of `jaxlm.decoding.engine.prefill`.
        """
        tokens, lengths = place_prompt(*self.prompt)
        rest = (self.max_new_tokens, self.sampling, jnp.asarray(self.stop_tokens))
        if isinstance(model, EncoderDecoder):
            return prefill_encoded(model, params, (tokens, lengths), *rest, logprobs)
        cache = init_cache(self.cache, model.config, len(lengths), self.capacity)
        read = prefill if len(self.before) == len(lengths) else prefill_shared
        return read(model, params, (tokens, lengths), cache, *rest, logprobs=logprobs)


def make_request(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Any,
    max_new_tokens: int,
    settings: Mapping[str, Any],
    cache: str | CacheKind = "dense",
    stop_token_ids: Sequence[int] | None = (),
    copies: int = 1,
    rows_each: int | None = None,
) -> Request:
    """Checks what `jaxlm.decoding.generate.complete` is given.

    Args:
        prompts: `Prompts`, or else an error.
        settings: of `Sampling.make`.
        copies: rows that continue each prompt, of which `sampling` has one for each.
        rows_each: rows that a search keeps of each prompt in the cache; None: `copies`.

    Raises:
        ValueError: see there.
    """
    rows_each = copies if rows_each is None else rows_each
    prompts = check_batch(prompts)
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    encoded = isinstance(model, EncoderDecoder)
    end = [tokenizer.eos_id] if encoded else []
    rows = [_ids(model, tokenizer, p, end) for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            allowed = "a text, or an empty one if the tokenizer has a start token; at least one id"
            raise ValueError(f"prompt={prompt!r} has no token; allowed: {allowed}")
    longest = max(len(row) for row in rows)
    limit = check_lengths(model.config, longest, max_new_tokens)
    kind = caches.parse(cache)
    if encoded and kind.name != "dense":
        raise ValueError(f"cache={str(kind)!r}; allowed: 'dense' with an encoder–decoder")
    ends = [len(row) + max_new_tokens for row in rows for _ in range(rows_each)]
    _check_holds(kind, ends)
    padded = _padded(rows, limit)
    _check_memory(model, kind, len(ends), padded[0].shape[1], max_new_tokens)
    stops, size = _stops(tokenizer, stop_token_ids, model), model.config.vocab_size
    known = tuple(i for i in stops.tolist() if 0 <= i < size)
    batch = Batch(len(rows), size, known, max_new_tokens)
    sampling = Sampling.make(batch, copies=copies, **settings)
    if copies > 1 and not np.asarray(sampling.temperature).all():
        told = "allowed: above 0, as greedy continuations are all alike"
        raise ValueError(f"temperature=0 with {copies} of each prompt; {told}")
    before = [[] if encoded else row for row in rows for _ in range(copies)]
    return Request(before, padded, max_new_tokens, sampling, stops, kind)


def _slots(width: int, max_new_tokens: int) -> int:
    """Of a multiple of 8: else XLA for TPUs lays a cache out as kernels do not read it."""
    return round_up(width + max_new_tokens, 8)


def check_batch(prompts: Any) -> Sequence[Any]:
    """The prompts, in a list; ValueError where that cannot be, or there is none."""
    prompts = _plain(prompts)
    if not _is_list(prompts) or not prompts:
        raise ValueError(f"prompts={_shown(prompts)}; allowed: a non-empty list of texts or ids")
    return prompts


def check_count(name: str, value: Any) -> int:
    """ValueError for what is no integer from 1 on."""
    if not is_id(value) or value < 1:
        raise ValueError(f"{name}={value!r}; allowed: an integer >= 1")
    return int(value)


def _padded(rows: list[list[int]], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of rows that are padded behind to a power of two, or to the limit."""
    longest = max(len(row) for row in rows)
    width = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    if limit is not None:
        width = min(width, limit)  # a table of positions has no rows for padding past its end
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def _stops(tokenizer: Tokenizer, more: Sequence[int] | None, model: Model) -> np.ndarray:
    """The tokenizer's stop tokens and more, padded."""
    ids: list[int] = []
    if more is not None and not (_is_list(more) and not more):
        ids = Batch(1, model.config.vocab_size).check_ids("stop_token_ids", _plain(more))
    found = sorted({*tokenizer.stop_ids, *ids})
    return np.array(found + [NO_TOKEN] * (-len(found) % STOP_TOKENS), np.int32)


def _ids(model: Model, tokenizer: Tokenizer, prompt: Any, end: list[int]) -> list[int]:
    """A prompt's ids, a text's between the start token and `end`."""
    if isinstance(prompt, str):
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + list(tokenizer.encode(prompt)) + end
    return check_ids(prompt, model.config.vocab_size)


def check_ids(prompt: Any, vocab_size: int) -> list[int]:
    """Token ids as a list; ValueError for what is none, or one that the vocabulary has not."""
    prompt = _plain(prompt)
    if not (_is_list(prompt) and all(map(is_id, prompt))):
        raise ValueError(f"prompt={_shown(prompt)}; allowed: a string or a list of token ids")
    unlike = [i for i in prompt if not 0 <= i < vocab_size]
    if unlike:
        raise ValueError(f"prompt: token id {unlike[0]}; allowed: 0 to {vocab_size - 1}")
    return [int(i) for i in prompt]


def _plain(given: Any) -> Any:
    """Lists in place of an array of integers."""
    is_array = isinstance(given, np.ndarray | jax.Array)
    return given.tolist() if is_array and jnp.issubdtype(given.dtype, jnp.integer) else given


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)


def _shown(given: Any) -> str:
    """On one line, whatever it is."""
    is_array = isinstance(given, np.ndarray | jax.Array)
    return f"{given.dtype}{list(given.shape)}" if is_array else repr(given)


def check_lengths(
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


def _check_holds(cache: CacheKind, lengths: Sequence[int]) -> None:
    """Raises ValueError where there is no room for texts of these lengths."""
    if not cache.holds(lengths):
        raise ValueError(
            f"cache={str(cache)!r}; allowed: one that holds {len(lengths)} texts of up to "
            f"{max(lengths)} tokens"
        )


def _check_memory(
    model: Model, cache: CacheKind, rows: int, width: int, max_new_tokens: int
) -> None:
    """Raises ValueError where keys and values would take more than all memory that there is."""
    if isinstance(model, EncoderDecoder):
        config, capacity = model.config.decoder, max_new_tokens
    else:
        config, capacity = model.config, _slots(width, max_new_tokens)
    wanted, there = cache.nbytes_of(config, rows, capacity), device_memory()
    if there is not None and wanted > there:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}; allowed: fewer, as the cache of {rows} × {capacity} "
            f"tokens would take {wanted:,} bytes, of {there:,} that there are"
        )
