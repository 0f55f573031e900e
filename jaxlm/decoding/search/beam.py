"""Beam search, and diverse beam search: the same in several groups.

Beam search keeps the W most probable texts at each step. Diverse beam search (Vijayakumar et al.,
arXiv 1610.02424) has G groups that choose one after the other, each pushed away from what the
groups before it have just chosen; the push stays in a text's score.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.kind import KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.config import at_least, between, check, integer_at_least, one_of
from jaxlm.decoding.engine import read
from jaxlm.decoding.history import History
from jaxlm.decoding.sampling import Sampling, process
from jaxlm.decoding.search.diversity import DIVERSITY
from jaxlm.decoding.search.method import METHODS, Found, Method
from jaxlm.decoding.search.texts import EARLY_STOPPING, NEVER, Ending, Texts, merged
from jaxlm.model.transformer import Transformer


@METHODS.register
@dataclasses.dataclass(frozen=True)
class Beam(Method):
    """Settings.

    Attributes:
        num_beams: texts that are kept at each step, of all groups.
        num_beam_groups: 1: beam search.
        diversity_penalty: λ, how hard groups push.
        diversity: "hamming", "cumulative" or "ngram": see `jaxlm.decoding.search.diversity`.
        length_penalty, early_stopping: when a text, and the search, is over, see `Ending`. A
            penalty is -5 to 5: 1,000,000 tokens to that power are still a float32.
    """

    num_beams: int = 4
    num_beam_groups: int = 1
    diversity_penalty: float = 0.5
    diversity: str = "hamming"
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    name: ClassVar[str] = "beam"

    def __post_init__(self):
        check(
            "beam",
            num_beams=integer_at_least(self.num_beams, 1),
            num_beam_groups=integer_at_least(self.num_beam_groups, 1),
            diversity_penalty=at_least(self.diversity_penalty, 0),
            diversity=one_of(self.diversity, *DIVERSITY),
            length_penalty=between(self.length_penalty, -5, 5),
            early_stopping=one_of(self.early_stopping, *EARLY_STOPPING),
        )
        if self.num_beams % self.num_beam_groups:
            raise ValueError(
                f"beam: num_beams={self.num_beams}; allowed: a multiple of "
                f"num_beam_groups={self.num_beam_groups}"
            )

    @property
    def num_texts(self) -> int:
        """As many as beams."""
        return self.num_beams

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
        """See `Method`; texts come group by group. Scores are sums of log-probabilities,
        less penalties, by length.

        Raises:
            ValueError: as many stop tokens as there are tokens.
        """
        if stop_tokens.shape[0] >= model.config.vocab_size:
            raise ValueError(
                f"{stop_tokens.shape[0]} stop tokens; allowed: fewer than "
                f"vocab_size={model.config.vocab_size}"
            )
        rules = _Rules(
            Ending(
                jnp.asarray(self.length_penalty, jnp.float32),
                jnp.asarray(EARLY_STOPPING.index(self.early_stopping)),
            ),
            jnp.asarray(self.diversity_penalty, jnp.float32),
            self.diversity,
        )
        shape = (self.num_beam_groups, self.num_beams // self.num_beam_groups, max_new_tokens)
        given = (model, params, prompt, cache, shape, rules, sampling, stop_tokens)
        groups, steps = _search(*given)
        texts = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *groups)
        return Found(texts.tokens, texts.lengths, texts.scores, steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rules:
    """What of the settings is no shape.

    Attributes:
        diversity: Static.
    """

    ending: Ending
    diversity_penalty: Float[Array, ""]
    diversity: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """A group of beams.

    Attributes:
        running: texts that go on, best first.
        finished: the best of those that have ended, best first.
        open: whether better ones may still come.
    """

    running: Texts
    finished: Texts
    open: Bool[Array, "N"]

    @classmethod
    def start(cls, N: int, W: int, M: int) -> Group:
        """One empty text goes on, so that the first tokens are W different ones."""
        none = Texts.none(N, W, M)
        scores = jnp.full_like(none.scores, NEVER).at[:, 0].set(0.0)
        running = dataclasses.replace(none, scores=scores)
        return cls(running, none, jnp.ones(N, bool))


def advance(
    group: Group,
    log_probs: Float[Array, "N W V"],
    penalty: Float[Array, "N W V"],
    length: Int[Array, ""],
    ending: Ending,
    stop_tokens: Int[Array, "E"],
) -> tuple[Group, Int[Array, "N W"]]:
    """One more token for each text.

    Args:
        group: whose texts have `length` tokens.
        log_probs: of the next token of each.
        penalty: subtracted from them in the score.

    Returns:
        The group, and which text each one that goes on continues.
    """
    N, W, V = log_probs.shape
    limit = group.running.tokens.shape[2]
    # As many of them can end at once as there are stop tokens for each text.
    K = W * max(2, 1 + stop_tokens.shape[0])
    sums = group.running.scores[..., None] + log_probs - penalty
    best, index = jax.lax.top_k(sums.reshape(N, W * V), K)
    parent, token = index // V, (index % V).astype(jnp.int32)
    texts = group.running.take(parent)
    texts = Texts(
        texts.tokens.at[:, :, length].set(token),
        best,
        texts.log_probs + jnp.take_along_axis(log_probs.reshape(N, W * V), index, 1),
        jnp.full((N, K), length + 1),
    )
    ends = (token[..., None] == stop_tokens[None, None]).any(-1) | (length + 1 == limit)
    texts_on = dataclasses.replace(texts, scores=jnp.where(ends, NEVER, best))
    on = jax.lax.top_k(texts_on.scores, W)[1]
    running = texts_on.take(on)
    # What ends in a lower place has been kept only so that W texts can go on.
    ended = ends & (jnp.arange(K) < W)[None] & group.open[:, None] & (best > NEVER / 2)
    scores = jnp.where(ended, ending.score(best, length + 1), -jnp.inf)
    lengths = jnp.where(ended, texts.lengths, 0)
    done = dataclasses.replace(texts, scores=scores, lengths=lengths)
    finished = merged(group.finished, done)
    still = group.open & ending.leaves_open(running, finished, length + 1, limit)
    return Group(running, finished, still), jnp.take_along_axis(parent, on, 1)


def _advance_all(
    rules: _Rules,
    groups: tuple[Group, ...],
    log_probs: Float[Array, "N G W V"],
    length: Int[Array, ""],
    stop_tokens: Int[Array, "E"],
) -> tuple[tuple[Group, ...], Int[Array, "N G W"]]:
    """`advance` of all groups in turn."""
    N, _, W, V = log_probs.shape
    diversity = DIVERSITY[rules.diversity]
    after: list[Group] = []
    parents = []
    for g, group in enumerate(groups):
        penalty = jnp.zeros((N, W, V))
        for before, now in zip(groups, after, strict=False):
            push = diversity(now.running.tokens, group.running.tokens, length, V)
            penalty += jnp.where(before.open[:, None, None], rules.diversity_penalty * push, 0.0)
        new, parent = advance(group, log_probs[:, g], penalty, length, rules.ending, stop_tokens)
        after.append(new)
        parents.append(parent)
    return tuple(after), jnp.stack(parents, 1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _search(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "N T"], Int[Array, "N"]],
    cache: KVCache,
    shape: tuple[int, int, int],
    rules: _Rules,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> tuple[tuple[Texts, ...], Int[Array, ""]]:
    """The finished texts of each group, and calls of the model since the prompts were read.

    `shape`: groups, beams of each, most tokens.
    """
    G, W, limit = shape
    N, rows = prompt[1].shape[0], jnp.repeat(jnp.arange(prompt[1].shape[0]), G * W)
    hidden, cache = read(model, params, prompt, cache)
    last = hidden[jnp.arange(N), prompt[1] - 1][:, None]
    logits = model.apply({"params": params}, last, method="logits")[:, 0]
    prompts, settings = jax.tree.map(lambda a: a[rows], (prompt, sampling))
    lengths, vocab = prompts[1], logits.shape[-1]
    history = History.begin(settings.needs, prompts, vocab, limit)

    def log_probs(logits: Float[Array, "R V"], tokens: Int[Array, "R M"], drawn: Array) -> Array:
        written = jnp.broadcast_to(jnp.arange(limit)[None] < drawn, tokens.shape)
        so_far = history.write(tokens, written, lengths)
        past = so_far.past(jnp.full_like(lengths, drawn), lengths + drawn)
        processed, _ = process(jax.nn.log_softmax(logits), settings, past)
        return processed.reshape(N, G, W, vocab)

    def all_tokens(groups: tuple[Group, ...]) -> Int[Array, "R M"]:
        return jnp.stack([g.running.tokens for g in groups], 1).reshape(N * G * W, limit)

    def more(carry: Any) -> Array:
        groups, length, _ = carry
        return jnp.stack([group.open for group in groups]).any() & (length < limit)

    def step(carry: Any) -> Any:
        groups, length, cache = carry
        tokens = all_tokens(groups)
        at = lengths[:, None] + length - 1
        there = jnp.ones_like(at)
        given = (tokens[:, length - 1][:, None], at, there, cache)
        logits, kv = model.apply({"params": params}, *given, method="extend")
        cache = commit(cache, kv, at, there)
        scored = log_probs(logits[:, 0], tokens, length)
        groups, parents = _advance_all(rules, groups, scored, length, stop_tokens)
        row = jnp.arange(N * G).reshape(N, G, 1) * W + parents
        return groups, length + 1, cache.reorder(row.reshape(-1))

    groups, zero = tuple(Group.start(N, W, limit) for _ in range(G)), jnp.zeros((), jnp.int32)
    scored = log_probs(logits[rows], all_tokens(groups), zero)
    groups, _ = _advance_all(rules, groups, scored, zero, stop_tokens)
    start = (groups, zero + 1, cache.reorder(rows))
    groups, length, _ = jax.lax.while_loop(more, step, start)
    return tuple(group.finished for group in groups), length - 1
