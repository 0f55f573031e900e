"""Methods of decoding on KV caches, side by side: `launch.benchmark decode --methods --caches`."""

from __future__ import annotations

import ast
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxlm import caches
from jaxlm.caches.kind import CacheKind
from jaxlm.decoding import engine, search
from jaxlm.decoding.sampling import Sampling
from jaxlm.evaluation.through_cache import losses_through_cache
from jaxlm.model.scores import token_scores
from jaxlm.model.transformer import Transformer

# Plain decoding, which the others are compared with; the rest are `jaxlm.decoding.search`'s.
GREEDY = "greedy"
NO_STOPS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One row of the table.

    Attributes:
        tokens_per_call: of a row's text, of calls of the model, the prompt's included.
        cache_bytes_per_token: of one row, in a cache of the length that was asked for.
        agreement: share of a text before it differs from greedy decoding's on the dense cache.
        log_prob: of a token of what was said, by a full forward.
        loss_change: of a given text, met a token at a time, against the dense cache.
    """

    method: str
    cache: str
    tokens_per_second: float
    tokens_per_call: float
    cache_bytes_per_token: float
    agreement: float
    log_prob: float
    loss_change: float


def listed(flag: str, text: str) -> list[str]:
    """What a flag lists with commas, some of it with commas of its own within parentheses.

    Raises:
        ValueError: another form.
    """
    try:
        form = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        form = None
    if not isinstance(form, ast.List):
        raise ValueError(f"{flag}={text!r}; allowed: name,name(option=value)")
    return [ast.unparse(one) for one in form.elts]


def measure(
    model: Transformer,
    params: Any,
    windows: np.ndarray,
    prompt_length: int,
    new_tokens: int,
    names: tuple[list[str], list[str]],
    rounds: int,
) -> list[Decoding]:
    """All methods on all caches, one repetition of each in turn.

    Args:
        windows: int32 [rows, prompt_length + new_tokens]: prompts, and how their texts go on.
        names: text forms of methods and of caches.
    """
    methods, kinds = names
    chosen = [caches.parse(kind) for kind in kinds]
    for name in methods:
        if name != GREEDY:
            parse_method(name)
    prompts = jnp.asarray(windows[:, :prompt_length])
    pairs = [(method, kind) for method in methods for kind in chosen]
    reference = caches.parse("dense")
    losses = {
        kind: _loss(model, params, windows, prompt_length, kind) for kind in {reference, *chosen}
    }
    said = {
        pair: draw(model, params, prompts, new_tokens, *pair)
        for pair in {(GREEDY, reference), *pairs}
    }
    greedy, _ = said[GREEDY, reference]
    seconds: dict[Any, list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for pair in pairs:
            start = time.perf_counter()
            draw(model, params, prompts, new_tokens, *pair)
            seconds[pair].append(time.perf_counter() - start)
    rows = []
    for method, kind in pairs:
        texts, steps = said[method, kind]
        rows.append(
            Decoding(
                method,
                str(kind),
                texts.size / statistics.median(seconds[method, kind]),
                new_tokens / (steps + 1),
                kind.nbytes_of(model.config, 1, windows.shape[1]) / windows.shape[1],
                _agreement(greedy, texts),
                _log_prob(model, params, prompts, texts),
                losses[kind] - losses[reference],
            )
        )
    return rows


def parse_method(name: str) -> search.Method:
    """Of search.

    Raises:
        ValueError: an unknown one, which tells of greedy decoding too.
    """
    try:
        return search.parse(name)
    except ValueError as error:
        raise ValueError(f"{error}; or {GREEDY}") from error


def draw(
    model: Transformer,
    params: Any,
    prompts: jax.Array,
    new_tokens: int,
    method: str,
    kind: CacheKind,
) -> tuple[np.ndarray, int]:
    """The best text of each row, [rows, new_tokens], and calls of the model behind the prompt's."""
    rows, length = prompts.shape
    prompt = (prompts, jnp.full(rows, length, jnp.int32))
    cache = kind.init(model.config, rows, length + new_tokens)
    stops = jnp.asarray(NO_STOPS)
    if method != GREEDY:
        given = (model, params, prompt, cache, new_tokens, Sampling.make(rows), stops)
        found = search.parse(method).search(*given)
        return np.asarray(found.tokens[:, 0]), int(found.steps)
    settings = Sampling.make(rows)
    state = engine.prefill(model, params, prompt, cache, new_tokens, settings, stops)
    until = jnp.asarray(new_tokens)
    state = engine.decode(model, params, state, until, settings, stops)
    return np.asarray(state.tokens[:, :new_tokens]), int(state.steps)


def _agreement(greedy: np.ndarray, texts: np.ndarray) -> float:
    """Of each row the share in front of the first difference."""
    return float(np.logical_and.accumulate(greedy == texts, 1).mean())


def _log_prob(model: Transformer, params: Any, prompts: jax.Array, texts: np.ndarray) -> float:
    whole = jnp.concatenate([prompts, jnp.asarray(texts)], 1)

    @jax.jit
    def score(params: Any, tokens: jax.Array) -> jax.Array:
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        given = (tokens, at, jnp.ones_like(at))
        hidden, _ = model.apply({"params": params}, *given, method="hidden")
        start = prompts.shape[1] - 1
        targets = tokens[:, start + 1 :]
        return token_scores(model, params, hidden[:, start:-1], targets)[0].mean()

    return float(score(params, whole))


def _loss(
    model: Transformer, params: Any, windows: np.ndarray, prompt_length: int, kind: CacheKind
) -> float:
    losses = losses_through_cache(model, params, jnp.asarray(windows), prompt_length, kind)
    return float(losses[:, prompt_length - 1 :].mean())


def as_table(rows: list[Decoding]) -> Table:
    """For the terminal."""
    table = Table(title="launch.benchmark decode")
    for head in ("method", "cache"):
        table.add_column(head, overflow="fold")
    for head in ("tokens/s", "per call", "bytes", "as greedy", "log p", "loss"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            row.cache,
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_call:.2f}",
            f"{row.cache_bytes_per_token:,.0f}",
            f"{row.agreement:.0%}",
            f"{row.log_prob:.3f}",
            f"{row.loss_change:+.4f}",
        )
    return table
