"""What the decode loop carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.rows import write_rows
from jaxlm.decoding.history import History
from jaxlm.decoding.logprobs import LogProbs
from jaxlm.decoding.sampling import Sampling, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries; every buffer is donated from call to call.

    Attributes:
        tokens: drawn so far, stop tokens included, with room for a last draft that is too long.
        drawn: how many of them each row has.
        lengths: tokens of each row, prompt included and the last one too.
        done: rows that drew a stop token.
        cache: of all tokens but the last.
        steps: calls of the model since the prompt was read.
        history: what processors read of the text.
        logprobs: of the tokens drawn; None: not asked for.
        limit: most tokens to draw. Static.
    """

    tokens: Int[Array, "B M"]
    drawn: Int[Array, "B"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: Any
    steps: Int[Array, ""]
    history: History
    logprobs: LogProbs | None
    limit: int = dataclasses.field(metadata={"static": True})

    def reorder(self, rows: Int[Array, "R"]) -> DecodeState:
        """Row i becomes what row `rows[i]` was."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            drawn=self.drawn[rows],
            lengths=self.lengths[rows],
            done=self.done[rows],
            cache=self.cache.reorder(rows),
            history=jax.tree.map(lambda a: a[rows], self.history),
            logprobs=jax.tree.map(lambda a: a[rows], self.logprobs),
        )


def write(
    state: DecodeState,
    new: Int[Array, "B D"],
    count: Int[Array, "B"],
    stops: Int[Array, "E"],
    logits: Float[Array, "B D V"],
) -> DecodeState:
    """Writes down the first `count` of each row's new tokens, up to a stop token or the limit.

    Args:
        logits: the model's own, that each was drawn from.
    """
    at = jnp.arange(new.shape[1])[None]
    stop = (new[:, :, None] == stops[None, None]).any(-1)
    before = jnp.cumsum(stop, 1) - stop.astype(jnp.int32)  # stop tokens in front of each
    left = jnp.minimum(count, state.limit - state.drawn)
    kept = (at < left[:, None]) & (before == 0) & ~state.done[:, None]
    count = kept.sum(1, dtype=jnp.int32)
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = logprobs.write(logits, jnp.where(kept, new, 0), state.drawn)
    return dataclasses.replace(
        state,
        history=state.history.write(new, kept, state.lengths),
        logprobs=logprobs,
        tokens=write_rows(state.tokens, jnp.where(kept, new, 0), state.drawn),
        drawn=state.drawn + count,
        lengths=state.lengths + count,
        done=state.done | (stop & kept).any(1),
    )


def begin(
    logits: Float[Array, "B V"],
    prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
    cache: Any,
    sampling: Sampling,
    stops: Int[Array, "E"],
    limit: int,
    depth: int,
    logprobs: int | None,
) -> DecodeState:
    """Draws the first token after prompts, of which the cache holds all."""
    lengths = prompt[1]
    (B, V), M = logits.shape, limit + depth + 1
    none = jnp.zeros(B, jnp.int32)
    state = DecodeState(
        tokens=jnp.zeros((B, M), jnp.int32),
        drawn=none,
        lengths=lengths,
        done=jnp.zeros(B, bool),
        cache=cache,
        steps=jnp.zeros((), jnp.int32),
        history=History.begin(sampling.needs, prompt, V, M),
        logprobs=None if logprobs is None else LogProbs.none(B, M, logprobs),
        limit=limit,
    )
    first = sample(logits, sampling, lengths, state.history.past(none, lengths))[:, None]
    return write(state, first, jnp.ones_like(lengths), stops, logits[:, None])
