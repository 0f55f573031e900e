"""Entropy-adaptive decoding with text in and text out; see `jaxlm.decoding.entropy_adaptive`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlm.caches.kind import CacheKind
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.completion import Completion
from jaxlm.decoding.entropy_adaptive import SETTINGS, EntropyAdaptive, Spoken, generate_adaptive
from jaxlm.decoding.generate import completion_of
from jaxlm.decoding.request import Prompts, make_request
from jaxlm.decoding.stop_strings import check_stop
from jaxlm.model.encoder_decoder import EncoderDecoder
from jaxlm.model.parameters import Model


def complete_adaptive(
    small: tuple[Model, Any, Tokenizer],
    large: tuple[Model, Any, Tokenizer],
    prompts: Prompts,
    max_new_tokens: int = 64,
    method: str | EntropyAdaptive = "entropy_adaptive",
    stop: Sequence[str] | None = (),
    stop_token_ids: Sequence[int] | None = (),
    cache: str | CacheKind = "dense",
    **settings: Any,
) -> tuple[list[Completion], Spoken]:
    """Continues each prompt by both models in turn.

    Args:
        small, large: as from `jaxlm.load`, with one tokenizer.
        prompts, max_new_tokens, stop, stop_token_ids, cache: of `jaxlm.complete`.
        method: such as "entropy_adaptive(threshold=1.5)".
        **settings: of `Sampling.make`, but for those that count tokens.

    Returns:
        The texts; and which model drew what at what cost, where a text that a stop string ends may
        go on for a few tokens.

    Raises:
        ValueError: tokenizers that differ, an encoder–decoder, and what `complete` and
            `generate_adaptive` do not take.
    """
    stop, rules = check_stop(stop), SETTINGS.parse(method)
    given = (prompts, max_new_tokens, settings, cache, stop_token_ids)
    tokenizer, other = small[2], large[2]
    if tokenizer.fingerprint != other.fingerprint:
        told = f"allowed: that of the small one, {tokenizer.name}"
        raise ValueError(f"tokenizer={other.name} of the large model; {told}")
    for model, *_ in (small, large):
        if isinstance(model, EncoderDecoder):
            told = "allowed: no encoder–decoder"
            raise ValueError(f"a model with an encoder and method={str(method)!r}; {told}")
        r = make_request(model, tokenizer, *given)

    def texts(rows: list[list[int]]) -> list[Completion]:
        pairs = zip(r.before, rows, strict=True)
        return [completion_of(tokenizer, r, *pair, stop) for pair in pairs]

    def ended(rows: list[list[int]]) -> list[bool]:
        return [text.finish_reason == "stop" for text in texts(rows)]

    spoken = generate_adaptive(
        small[:2],
        large[:2],
        r.before,
        r.max_new_tokens,
        rules,
        r.cache,
        r.sampling,
        r.stop_tokens.tolist(),
        ended if stop else None,
    )
    return texts(spoken.tokens), spoken
