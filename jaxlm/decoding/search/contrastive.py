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
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.kind import KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.caches.rows import write_rows
from jaxlm.config import check, integer_at_least
from jaxlm.decoding.engine import read
from jaxlm.decoding.history import History
from jaxlm.decoding.sampling import Sampling, process
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
            top_k=integer_at_least(self.top_k, 1),
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
        sampling: Sampling,
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
        given = (model, params, prompt, cache, max_new_tokens, self, sampling, stop_tokens)
        return _search(*given)


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
        history: what processors read of them.
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
    history: History
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
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> Found:
    lengths = prompt[1]
    B = lengths.shape[0]

    def going(s: _State) -> Array:
        return ~s.done & (s.drawn < max_new_tokens)

    def best(hidden: Array, history: History, *ends: Array) -> tuple[Array, Array]:
        logits = model.apply({"params": params}, hidden[:, None], method="logits")[:, 0]
        logits, _ = process(logits, sampling, history.past(*ends))
        probs, candidates = jax.lax.top_k(jax.nn.softmax(logits), settings.top_k)
        return probs, candidates

    def step(s: _State) -> _State:
        hidden, kv = _read_candidates(model, params, s, going(s))
        unit, alpha = _unit(hidden), settings.penalty_alpha
        score = (1 - alpha) * s.probs - alpha * likeness(unit, s.hidden, s.lengths)
        # Where processors leave fewer than k tokens, the others are no candidates.
        score = jnp.where(s.probs > 0, score, -jnp.inf)
        return _chosen(s, going(s), jnp.argmax(score, 1), (hidden, unit, kv), best, stop_tokens)

    hidden, cache = read(model, params, prompt, cache)
    # One place more than is needed: where rows that are done write.
    room = max_new_tokens + 1
    history = History.begin(sampling.needs, prompt, model.config.vocab_size, room)
    none = jnp.zeros(B, jnp.int32)
    first = best(hidden[jnp.arange(B), lengths - 1], history, none, lengths)
    tokens, states = (
        jnp.zeros((B, room), jnp.int32),
        jnp.pad(_unit(hidden), ((0, 0), (0, room), (0, 0))),
    )
    score, steps = jnp.zeros(B), jnp.zeros((), jnp.int32)
    begin = (tokens, none, score, steps, none > 0, *first, states, lengths, history, cache)
    s = jax.lax.while_loop(lambda s: going(s).any(), step, _State(*begin))
    texts = s.tokens[:, None, :max_new_tokens]
    return Found(texts, s.drawn[:, None], s.score[:, None], s.steps)


def _read_candidates(
    model: Transformer, params: Any, s: _State, going: Bool[Array, "B"]
) -> tuple[Float[Array, "B k D"], tuple[Array, ...]]:
    """Hidden states, and keys and values, of the next tokens that may be, each alone."""
    B, k = s.candidates.shape
    at = jnp.broadcast_to(s.lengths[:, None], (B, k))
    there = jnp.broadcast_to(going[:, None], (B, k)).astype(jnp.int32)
    alone = jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (B, k, k))
    given = (s.candidates, at, there, s.cache)
    hidden, kv = model.apply(
        {"params": params}, *given, return_kv=True, tree=alone, method="hidden"
    )
    assert kv is not None
    return hidden, kv


def _chosen(
    s: _State,
    going: Bool[Array, "B"],
    chosen: Int[Array, "B"],
    of_candidates: tuple[Array, Array, tuple[Array, ...]],
    best: Callable[..., tuple[Array, Array]],
    stop_tokens: Int[Array, "E"],
) -> _State:
    """With one of the candidates as the next token of each row that goes on."""
    rows, one = jnp.arange(len(chosen)), going.astype(jnp.int32)
    token = jnp.where(going, s.candidates[rows, chosen], 0)[:, None]
    hidden, unit, kv = of_candidates
    kv = jax.tree.map(lambda a: a[:, rows, chosen][:, :, None], kv)
    history = s.history.write(token, going[:, None], s.lengths)
    return _State(
        write_rows(s.tokens, token, s.drawn),
        s.drawn + one,
        s.score + jnp.where(going, jnp.log(s.probs[rows, chosen]), 0.0),
        s.steps + 1,
        s.done | (going & (token == stop_tokens[None]).any(1)),
        *best(hidden[rows, chosen], history, s.drawn + one, s.lengths + one),
        write_rows(s.hidden, unit[rows, chosen][:, None], s.lengths),
        s.lengths + one,
        history,
        commit(s.cache, kv, s.lengths[:, None], one[:, None]),
    )
