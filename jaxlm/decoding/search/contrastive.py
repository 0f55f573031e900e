"""Contrastive search (Su et al., arXiv 2202.06417, equation 5): of the k most probable tokens the
one that is probable and whose hidden state is least like an earlier one.

    argmax over v of (1 − α)·p(v) − α·max over j of cos(h_v, h_j)

The k candidates are read at once, as a forest whose trees do not see each other; the state of the
chosen one gives the next candidates. So each token takes one call of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.kind import KVCache
from jaxlm.caches.rows import write_rows
from jaxlm.config import at_least, check
from jaxlm.decoding.engine import read
from jaxlm.decoding.search.method import METHODS, Found, Method
from jaxlm.model.transformer import Transformer


@METHODS.register
@dataclasses.dataclass(frozen=True)
class Contrastive(Method):
    """Settings.

    Attributes:
        penalty_alpha: α; 0: greedy.
        top_k: candidates.
    """

    penalty_alpha: float = 0.6
    top_k: int = 4

    name: ClassVar[str] = "contrastive"

    def __post_init__(self):
        alpha = self.penalty_alpha
        check(
            "contrastive",
            penalty_alpha=(alpha, 0 <= alpha <= 1 and not math.isnan(alpha), "[0, 1]"),
            top_k=at_least(self.top_k, 1),
        )

    @property
    def num_texts(self) -> int:
        """One."""
        return 1

    def search(
        self,
        model: Transformer,
        params: Any,
        prompt: tuple[Int[Array, "N T"], Int[Array, "N"]],
        cache: KVCache,
        max_new_tokens: int,
        stop_tokens: Int[Array, "E"],
    ) -> Found:
        """See `Method`. Scores are sums of log-probabilities.

        Raises:
            ValueError: more candidates than there are tokens.
        """
        if self.top_k > model.config.vocab_size:
            raise ValueError(
                f"contrastive: top_k={self.top_k}; allowed: at most "
                f"vocab_size={model.config.vocab_size}"
            )
        return _search(model, params, prompt, cache, max_new_tokens, self, stop_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What the loop carries.

    Attributes:
        tokens: drawn so far; `drawn` of each row.
        score: the sum of their log-probabilities.
        steps: calls of the model.
        probs, candidates: the most probable next tokens.
        hidden: last hidden states of all tokens, the prompt's first, of length 1.
        lengths: tokens of each row, the prompt included.
        cache: of all of them.
    """

    tokens: Int[Array, "B M"]
    drawn: Int[Array, "B"]
    score: Float[Array, "B"]
    steps: Int[Array, ""]
    done: Bool[Array, "B"]
    probs: Float[Array, "B k"]
    candidates: Int[Array, "B k"]
    hidden: Float[Array, "B L D"]
    lengths: Int[Array, "B"]
    cache: KVCache


def _unit(x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def likeness(
    new: Float[Array, "B k D"], old: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> Float[Array, "B k"]:
    """The greatest cosine of each new state with one of the first `lengths` old ones."""
    cosines = jnp.einsum("bkd,bld->bkl", new, old)
    there = jnp.arange(old.shape[1])[None] < lengths[:, None]
    return jnp.where(there[:, None], cosines, -1.0).max(-1)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _search(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
    cache: KVCache,
    max_new_tokens: int,
    settings: Contrastive,
    stop_tokens: Int[Array, "E"],
) -> Found:
    lengths = prompt[1]
    B = lengths.shape[0]

    def going(s: _State) -> Array:
        return ~s.done & (s.drawn < max_new_tokens)

    def step(s: _State) -> _State:
        return _step(model, params, settings, s, going(s), stop_tokens)

    hidden, cache = read(model, params, prompt, cache)
    last = hidden[jnp.arange(B), lengths - 1]
    # One place more than is needed: where rows that are done write.
    tokens = jnp.zeros((B, max_new_tokens + 1), jnp.int32)
    room = jnp.pad(_unit(hidden), ((0, 0), (0, max_new_tokens + 1), (0, 0)))
    none = jnp.zeros(B, jnp.int32)
    best = _best(model, params, settings, last)
    score, steps = jnp.zeros(B), jnp.zeros((), jnp.int32)
    state = _State(tokens, none, score, steps, none > 0, *best, room, lengths, cache)
    s = jax.lax.while_loop(lambda s: going(s).any(), step, state)
    texts = s.tokens[:, None, :max_new_tokens]
    return Found(texts, s.drawn[:, None], s.score[:, None], s.steps)


def _best(
    model: Transformer, params: Any, settings: Contrastive, hidden: Float[Array, "B D"]
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The next tokens of greatest probability."""
    logits = model.apply({"params": params}, hidden[:, None], method="logits")[:, 0]
    probs, candidates = jax.lax.top_k(jax.nn.softmax(logits), settings.top_k)
    return probs, candidates


def _step(
    model: Transformer,
    params: Any,
    settings: Contrastive,
    s: _State,
    going: Bool[Array, "B"],
    stop_tokens: Int[Array, "E"],
) -> _State:
    """One more token for the rows that go on."""
    (B, k), rows = s.candidates.shape, jnp.arange(s.candidates.shape[0])
    at = jnp.broadcast_to(s.lengths[:, None], (B, k))
    there = jnp.broadcast_to(going[:, None], (B, k)).astype(jnp.int32)
    alone = jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (B, k, k))
    given = (s.candidates, at, there, s.cache)
    hidden, kv = model.apply(
        {"params": params}, *given, return_kv=True, tree=alone, method="hidden"
    )
    unit, alpha = _unit(hidden), settings.penalty_alpha
    score = (1 - alpha) * s.probs - alpha * likeness(unit, s.hidden, s.lengths)
    chosen = jnp.argmax(score, 1)
    token, one = s.candidates[rows, chosen], going.astype(jnp.int32)
    kv = jax.tree.map(lambda a: a[:, rows, chosen][:, :, None], kv)
    return _State(
        write_rows(s.tokens, jnp.where(going, token, 0)[:, None], s.drawn),
        s.drawn + one,
        s.score + jnp.where(going, jnp.log(s.probs[rows, chosen]), 0.0),
        s.steps + 1,
        s.done | (going & (token[:, None] == stop_tokens[None]).any(1)),
        *_best(model, params, settings, hidden[rows, chosen]),
        write_rows(s.hidden, unit[rows, chosen][:, None], s.lengths),
        s.lengths + one,
        s.cache.commit(kv, at[:, :1], one[:, None]),
    )
