"""Entropy-adaptive decoding (Simonds, arXiv 2502.06833): a small model speaks while it is sure, a
large one of the same vocabulary where the entropy of what comes next is high.

The mean entropy of the last few tokens, in bits and before temperature, decides which model draws
the next one, no sooner than `min_dwell` tokens after the last change. Each model has a KV cache of
its own; one that takes over first reads what the other has said since, all at once. What the paper
leaves open is decided so: the start is the small model's, and `min_dwell` is 10. The entropy is
always that of the model that draws: to judge by the small one's alone, both would have to read each
token in turn, and the loop could no longer be one model's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from jaxlm import caches
from jaxlm.caches.kind import CacheKind, KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.caches.rows import write_rows
from jaxlm.config import check, integer_at_least, one_of
from jaxlm.decoding.generate import TOKENS_BETWEEN_LOOKS
from jaxlm.decoding.processors.processor import Past
from jaxlm.decoding.request import check_batch, check_count, check_ids, check_lengths
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.model.parameters import count_params
from jaxlm.model.transformer import Transformer
from jaxlm.registry import Registry

# Most tokens that a model reads at a time when it takes over.
CHUNK = 512
START = ("small", "large")


@dataclasses.dataclass(frozen=True)
class EntropyAdaptive:
    """Settings.

    Attributes:
        threshold: τ, in bits: the large model draws where the mean is above it.
        window: tokens whose entropies are averaged; while there are fewer, all of them.
        min_dwell: tokens that a model draws before it may hand over.
        start: the model that begins, "small" or "large".
        retroactive: the token whose entropy makes a model hand over is dropped, and drawn by the
            other one; its entropy is forgotten. False: it stays.
    """

    threshold: float = 1.0
    window: int = 5
    min_dwell: int = 10
    start: str = "small"
    retroactive: bool = False

    name: ClassVar[str] = "entropy_adaptive"

    def __post_init__(self):
        check(
            "entropy_adaptive",
            threshold=(self.threshold, self.threshold >= 0, "a number of bits >= 0, or inf"),
            window=integer_at_least(self.window, 1),
            min_dwell=integer_at_least(self.min_dwell, 1),
            start=one_of(self.start, *START),
            retroactive=one_of(self.retroactive, False, True),
        )


# The text form of the settings: "entropy_adaptive(threshold=1.5)".
SETTINGS = Registry("method", EntropyAdaptive)
SETTINGS.register(EntropyAdaptive)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Talk:
    """What both models share.

    Attributes:
        text: tokens of each row, the prompt's first; `lengths` of them.
        drawn: how many of them are no prompt.
        entropies: in bits, of the distribution that each drawn token comes from.
        used: the model that drew each: 0 small, 1 large.
        active: the one that draws the next.
        dwelt: tokens that it has drawn since it took over.
        done: rows that drew a stop token.
    """

    text: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    drawn: Int[Array, "B"]
    entropies: Float[Array, "B M"]
    used: Int[Array, "B M"]
    active: Int[Array, "B"]
    dwelt: Int[Array, "B"]
    done: Bool[Array, "B"]


def entropy_bits(logits: Float[Array, "B V"]) -> Float[Array, "B"]:
    """−Σ p log2 p of softmax(logits)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p).sum(-1) / math.log(2)


def rolling_mean(
    entropies: Float[Array, "B M"], drawn: Int[Array, "B"], window: Int[Array, ""]
) -> Float[Array, "B"]:
    """Of the last `window` of `drawn` numbers, or of all."""
    at = jnp.arange(entropies.shape[1])[None]
    last = (at < drawn[:, None]) & (at >= drawn[:, None] - window)
    count = jnp.maximum(last.sum(1), 1).astype(jnp.float32)
    return jnp.where(last, entropies, 0.0).sum(1) / count


def hand_over(
    mean: Float[Array, "B"],
    active: Int[Array, "B"],
    dwelt: Int[Array, "B"],
    threshold: Float[Array, ""],
    min_dwell: Int[Array, ""],
) -> Int[Array, "B"]:
    """The model that goes on."""
    return jnp.where(dwelt >= min_dwell, (mean > threshold).astype(jnp.int32), active)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rules:
    """The settings as arrays, so that other ones need no other program."""

    threshold: Float[Array, ""]
    window: Int[Array, ""]
    min_dwell: Int[Array, ""]
    retroactive: Bool[Array, ""]

    @classmethod
    def of(cls, settings: EntropyAdaptive) -> _Rules:
        return cls(
            jnp.asarray(settings.threshold, jnp.float32),
            jnp.asarray(settings.window),
            jnp.asarray(settings.min_dwell),
            jnp.asarray(settings.retroactive),
        )


def _speaking(talk: Talk, which: Int[Array, ""]) -> Bool[Array, "B"]:
    """Rows that go on with one of the models."""
    return (talk.active == which) & ~talk.done & (talk.drawn < talk.used.shape[1])


def _read_at_once(model: Transformer, behind: int) -> int:
    """Of so many tokens, padded to a power of two, as far as there are positions."""
    return min(CHUNK, model.config.encoding.max_length or CHUNK, 1 << (behind - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=(3,))
def _catch_up(
    model: Transformer, params: Any, talk: Talk, cache: KVCache, which: Int[Array, ""], size: int
) -> KVCache:
    """The cache with up to `size` tokens more of the text, its last one always left out."""
    at = cache.lengths[:, None] + jnp.arange(size)[None]
    there = (at < talk.lengths[:, None] - 1) & _speaking(talk, which)[:, None]
    ids = jnp.take_along_axis(talk.text, jnp.minimum(at, talk.text.shape[1] - 1), 1)
    # A learned table has no position for what is behind its end, not even for padding.
    given = (ids, jnp.where(there, at, 0), there.astype(jnp.int32), cache)
    _, kv = model.apply({"params": params}, *given, return_kv=True, method="hidden")
    return commit(cache, kv, at, given[2])


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2, 3))
def _speak(
    model: Transformer,
    params: Any,
    talk: Talk,
    cache: KVCache,
    which: Int[Array, ""],
    rules: _Rules,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    most: Int[Array, ""],
) -> tuple[Talk, KVCache]:
    """Draws up to `most` tokens of each of this model's rows, until they have handed over or are
    done.
    """

    def step(carry: tuple[Talk, KVCache, Array]) -> tuple[Talk, KVCache, Array]:
        t, cache, steps = carry
        going = _speaking(t, which)
        one = going.astype(jnp.int32)
        at = t.lengths[:, None] - 1
        last = jnp.take_along_axis(t.text, at, 1)
        given = (last, at, one[:, None], cache)
        logits, kv = model.apply({"params": params}, *given, method="extend")
        token = sample(logits[:, 0], sampling, t.lengths, Past(t.drawn, t.lengths, t.text))

        def put(buffer: Array, new: Array, where: Array) -> Array:
            old = jnp.take_along_axis(buffer, jnp.minimum(where, buffer.shape[1] - 1)[:, None], 1)
            return write_rows(buffer, jnp.where(going[:, None], new[:, None], old), where)

        entropies = put(t.entropies, entropy_bits(logits[:, 0]), t.drawn)
        mean = rolling_mean(entropies, t.drawn + one, rules.window)
        # A token that is to be dropped is none that the model has drawn.
        dwelt = t.dwelt + jnp.where(rules.retroactive, 0, one)
        wanted = hand_over(mean, t.active, dwelt, rules.threshold, rules.min_dwell)
        active = jnp.where(going, wanted, t.active)
        goes_on = active == t.active
        kept = going & (goes_on | ~rules.retroactive)
        more = kept.astype(jnp.int32)
        after = Talk(
            put(t.text, token, t.lengths),
            t.lengths + more,
            t.drawn + more,
            entropies,
            put(t.used, jnp.broadcast_to(which, token.shape), t.drawn),
            active,
            jnp.where(goes_on, t.dwelt + one, 0),
            t.done | (kept & (token[:, None] == stop_tokens[None]).any(1)),
        )
        return after, commit(cache, kv, at, one[:, None]), steps + 1

    def more(carry: tuple[Talk, KVCache, Array]) -> Array:
        return _speaking(carry[0], which).any() & (carry[2] < most)

    return jax.lax.while_loop(more, step, (talk, cache, jnp.zeros((), jnp.int32)))[:2]


@dataclasses.dataclass(frozen=True)
class Spoken:
    """What was said, and what it took.

    Attributes:
        tokens: of each row, a stop token included.
        model_used: for each of them the model that drew it: 0 small, 1 large.
        entropy: of the distribution that it comes from, in bits.
        caught_up: tokens that [small, large] read to take over, the prompt too but for the model
            that began, or to draw one that was dropped.
        parameters: of [small, large].
    """

    tokens: list[list[int]]
    model_used: list[list[int]]
    entropy: list[list[float]]
    caught_up: tuple[int, int]
    parameters: tuple[int, int]

    @property
    def large_fraction(self) -> float:
        """Share of the tokens that the large model drew."""
        return sum(map(sum, self.model_used)) / max(1, sum(map(len, self.model_used)))

    @property
    def switches(self) -> list[int]:
        """Of each row."""
        return [sum(a != b for a, b in itertools.pairwise(row)) for row in self.model_used]

    @property
    def cost_ratio(self) -> float:
        """Parameters used a token, of those of the large model; what models read to take over is
        left out, as in the paper.
        """
        small, large = self.parameters
        return self.large_fraction + (1 - self.large_fraction) * small / large

    @property
    def cost_ratio_true(self) -> float:
        """The same with what they read to take over: in arithmetic, of which reading many tokens at
        a time takes as much as drawing them.
        """
        total = sum(map(len, self.tokens))
        by_large = sum(map(sum, self.model_used))
        read = [total - by_large + self.caught_up[0], by_large + self.caught_up[1]]
        small, large = self.parameters
        return (small * read[0] + large * read[1]) / (large * max(1, total))


def generate_adaptive(
    small: tuple[Transformer, Any],
    large: tuple[Transformer, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: EntropyAdaptive,
    cache: str | CacheKind,
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
    ended: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Spoken:
    """Continues prompts; a row does not depend on the others.

    Args:
        small, large: models of one vocabulary, with their parameters.
        prompts: token ids, none empty, lists or arrays.
        max_new_tokens: most tokens to draw for each.
        cache: what each model keeps keys and values in.
        sampling: settings of each row; no processor that counts tokens.
        stop_tokens: at which a row ends.
        ended: asked after every few tokens, with those drawn of each row, which rows end as well.

    Raises:
        ValueError: models of two vocabularies, an empty prompt, no prompt, an id outside of the
            vocabulary, more positions than a position encoding has, settings of other rows.
    """
    cache = caches.parse(cache)
    prompts = _checked(small[0], large[0], prompts, max_new_tokens, settings, sampling)
    stops = jnp.asarray(np.array(stop_tokens, np.int32))
    talk = _start(prompts, max_new_tokens, settings.start)
    length = talk.text.shape[1]
    starts = [len(p) for p in prompts]
    models, width = (small, large), length + min(CHUNK, 1 << (length - 1).bit_length())
    kept = [cache.init(model.config, len(prompts), width) for model, _ in models]
    read = np.zeros(2, np.int64)
    read[START.index(settings.start)] -= sum(starts) - len(starts)
    rules = _Rules.of(settings)
    most = jnp.asarray(max_new_tokens if ended is None else TOKENS_BETWEEN_LOOKS)
    while True:
        going = np.asarray(~talk.done & (talk.drawn < max_new_tokens))
        if not going.any():
            break
        which = int(np.asarray(talk.active)[going][0])
        (model, params), at = models[which], jnp.asarray(which)
        own = going & (np.asarray(talk.active) == which)
        behind = np.where(own, np.asarray(talk.lengths - 1 - kept[which].lengths), 0)
        read[which] += behind.sum()
        while behind.max() > 0:
            size = _read_at_once(model, int(behind.max()))
            kept[which] = _catch_up(model, params, talk, kept[which], at, size)
            behind = np.maximum(behind - size, 0)
        given = (talk, kept[which], at, rules, sampling, stops, most)
        talk, kept[which] = _speak(model, params, *given)
        if settings.retroactive:  # rows that have handed over have dropped a token
            read[which] += (own & (np.asarray(talk.active) != which)).sum()
        if ended is not None:
            over = jnp.asarray(ended(_rows(talk.text, starts, talk)))
            talk = dataclasses.replace(talk, done=talk.done | over)
    parameters = (count_params(small[1]), count_params(large[1]))
    return _spoken(talk, starts, (int(read[0]), int(read[1])), parameters)


def _checked(
    small: Transformer,
    large: Transformer,
    prompts: Any,
    max_new_tokens: Any,
    settings: EntropyAdaptive,
    sampling: Sampling,
) -> list[list[int]]:
    """The prompts' token ids; ValueError for what `generate_adaptive` does not take."""
    size = small.config.vocab_size
    if size != large.config.vocab_size:
        raise ValueError(
            f"vocab_size={large.config.vocab_size} of the large model; allowed: {size}"
        )
    found = [check_ids(prompt, size) for prompt in check_batch(prompts)]
    if not all(found):
        raise ValueError(f"prompts={found!r}; allowed: lists of token ids, none empty")
    check_count("max_new_tokens", max_new_tokens)
    for model in (small, large):
        check_lengths(model.config, max(map(len, found)), max_new_tokens)
    rows = sampling.temperature.shape[0]
    if rows != len(found):
        raise ValueError(f"sampling of {rows} rows; allowed: of {len(found)}, one a prompt")
    most_bits = math.log2(size)
    if most_bits < settings.threshold < math.inf:
        told = "never switches to the large model: no entropy is above log2(%d) = %.2f bits"
        logging.warning(f"threshold=%g {told}", settings.threshold, size, most_bits)
    if more := sorted(sampling.needs - {"tokens"}):
        raise ValueError(f"sampling with processors of {more}; allowed: of tokens alone")
    return found


def _start(prompts: Sequence[Sequence[int]], max_new_tokens: int, start: str) -> Talk:
    B, longest = len(prompts), max(map(len, prompts))
    text = np.zeros((B, longest + max_new_tokens), np.int32)
    for i, prompt in enumerate(prompts):
        text[i, : len(prompt)] = prompt
    zeros = np.zeros((B, max_new_tokens), np.int32)
    return Talk(
        jnp.asarray(text),
        jnp.asarray(np.array([len(p) for p in prompts], np.int32)),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(zeros.shape, jnp.float32),
        jnp.asarray(zeros),
        jnp.full(B, START.index(start), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
    )


def _rows(a: Array, starts: list[int], talk: Talk) -> list[list[Any]]:
    """What was drawn of each row, which begins at its start."""
    found = zip(np.asarray(a), starts, np.asarray(talk.drawn), strict=True)
    return [row[start : start + n].tolist() for row, start, n in found]


def _spoken(
    talk: Talk, starts: list[int], read: tuple[int, int], parameters: tuple[int, int]
) -> Spoken:
    """Rows without their padding."""
    first = [0] * len(starts)
    used, entropies = (_rows(a, first, talk) for a in (talk.used, talk.entropies))
    return Spoken(_rows(talk.text, starts, talk), used, entropies, read, parameters)


def calibrate_threshold(
    small: tuple[Transformer, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    target_fraction: float,
    window: int,
    cache: str | CacheKind,
    sampling: Sampling,
) -> float:
    """The threshold above which, of the small model's own rolling means on these prompts, lies that
    share of tokens.

    Raises:
        ValueError: a fraction out of [0, 1].
    """
    check(
        "calibrate_threshold",
        target_fraction=(target_fraction, 0 <= target_fraction <= 1, "[0, 1]"),
    )
    alone = EntropyAdaptive(threshold=math.inf, window=window)
    said = generate_adaptive(small, small, prompts, max_new_tokens, alone, cache, sampling)
    means = [
        np.mean(row[max(0, i - window) : i]) for row in said.entropy for i in range(1, len(row) + 1)
    ]
    return float(np.quantile(means, 1 - target_fraction))
