"""From logits to a token: processors, temperature, truncations, a draw, per row of a batch.

Every setting is an array with one entry a row, so that requests of different settings share one
compiled program, and each row draws from its own key: its text does not depend on its neighbours.
Which processors there are is the program's: those that some row of the batch switches on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config import check, one_of
from jaxlm.decoding.processors.batch import SMALLEST, Batch
from jaxlm.decoding.processors.chain import make_chain, needs_of, of_user
from jaxlm.decoding.processors.processor import Past
from jaxlm.decoding.processors.truncation import MinP, truncate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of each row.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k largest logits (ties are kept); 0: all.
        top_p: the smallest set of most probable tokens whose mass reaches p; 1: all. Smaller
            numbers than float32's smallest normal one are refused: they would count as 0.
        seed: of the row's random draws.
        processors: what changes the logits before the temperature, greedy decoding's too.
        truncations: what cuts more of them after top-k and top-p.
        early: what does before.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: Int[Array, "B"]
    processors: tuple[Any, ...] = ()
    truncations: tuple[Any, ...] = ()
    early: tuple[Any, ...] = ()

    @classmethod
    def make(
        cls,
        batch: int | Batch,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        copies: int = 1,
        processors: Sequence[Any] = (),
        order: str = "huggingface",
        **settings: Any,
    ) -> Sampling:
        """From numbers or one number a row; a single seed gives row i the seed + i.

        Args:
            batch: how many rows; as a `Batch`, with what settings that name tokens need.
            copies: rows made of each, one after the other, whose seeds count on.
            processors: a user's own, (logits [B, V], past) → logits: functions, or callable pytrees
                whose arrays have rows on the first axis. They come after all others. `past` is a
                `jaxlm.decoding.processors.processor.Past`.
            order: "huggingface": temperature, top-k, top-p, min-p and the others; "vllm": min-p
                right after the temperature. It matters to rows with both min-p and top-p.
            **settings: by Hugging Face's and vLLM's names, for all rows or one a row. Numbers:
                min_p, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty,
                frequency_penalty, presence_penalty, no_repeat_ngram_size, min_new_tokens.
                Tokens: forced_bos_token_id, forced_eos_token_id; lists of them: allowed_token_ids,
                suppress_tokens, begin_suppress_tokens, bad_words_ids (lists of those); logit_bias
                (a dict by token), sequence_bias (a dict by tuple of tokens). None: off.

        Raises:
            ValueError: a sequence of another length, a value out of range, an unknown setting.
        """
        batch = Batch(batch) if isinstance(batch, int) else batch
        most = 2**31 - 1
        seeds = batch.numbers("seed", seed, 0, most, np.int64)
        # -1 is vLLM's "all".
        k = np.maximum(batch.numbers("top_k", top_k, -1, most, np.int32), 0)
        check("sampling", order=one_of(order, "huggingface", "vllm"))
        before, after = make_chain(batch, settings)
        early = tuple(t for t in after if order == "vllm" and isinstance(t, MinP))
        made = cls(
            jnp.asarray(batch.numbers("temperature", temperature, 0, 1e6, np.float32)),
            jnp.asarray(k),
            jnp.asarray(batch.numbers("top_p", top_p, SMALLEST, 1, np.float32)),
            jnp.asarray(seeds.astype(np.int32)),
            (*before, *of_user(batch, processors)),
            tuple(t for t in after if order != "vllm" or not isinstance(t, MinP)),
            early,
        ).repeat(copies)
        single = np.ndim(seed) == 0
        on = np.arange(batch.rows * copies) % (batch.rows * copies if single else copies)
        seeds = (np.repeat(seeds, copies) + on) % 2**31
        return dataclasses.replace(made, seed=jnp.asarray(seeds.astype(np.int32)))

    @property
    def needs(self) -> frozenset[str]:
        """Which arrays of `Past` the processors read."""
        return frozenset().union(*map(needs_of, (*self.processors, *self.early, *self.truncations)))

    @property
    def draws(self) -> bool:
        """Whether some row has a setting that matters where tokens are drawn alone."""
        greedy = (self.temperature == 0) & (self.top_k == 0) & (self.top_p == 1)
        return not greedy.all() or bool(self.early or self.truncations)

    def repeat(self, times: int) -> Sampling:
        """Each row as often, one after the other."""
        return self if times == 1 else jax.tree.map(lambda a: jnp.repeat(a, times, 0), self)


def process(
    logits: Float[Array, "B V"], sampling: Sampling, past: Past | None
) -> tuple[Float[Array, "B V"], Bool[Array, "B"]]:
    """Logits after the processors, and which rows need no draw: greedy ones, and those without a
    token left, whose logits stay as they were.
    """
    raw, settled = logits, sampling.temperature == 0
    for processor in sampling.processors:
        logits = processor(logits, past)
    if sampling.processors:
        none = (logits == -jnp.inf).all(-1)
        logits = jnp.where(none[:, None], raw, logits)
        settled |= none
    return logits, settled


def warm_up(
    logits: Float[Array, "B V"], sampling: Sampling, past: Past | None
) -> Float[Array, "B V"]:
    """Processed logits as they are drawn from: after temperature and truncations."""
    warm = logits / jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
    for truncation in sampling.early:
        warm = truncation(warm, past)
    cut = (sampling.top_k != 0) | (sampling.top_p < 1)
    warm = jax.lax.cond(  # sorting the vocabulary is dear, and often not asked for
        cut.any(), lambda x: truncate(x, sampling.top_k, sampling.top_p), lambda x: x, warm
    )
    for truncation in sampling.truncations:
        warm = truncation(warm, past)
    return warm


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
    past: Past | None = None,
) -> Int[Array, "B"]:
    """One token a row; the draw at a position depends on the row's seed and that position only.

    Where processors leave a row no token at all, it is the most probable one before them.

    Args:
        logits: float32.
        sampling: settings of each row.
        positions: of the token to be drawn.
        past: what processors read.
    """
    logits, settled = process(logits, sampling, past)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_):
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(
            sampling.seed, positions
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        drawn = jnp.argmax(warm_up(logits, sampling, past) + noise, axis=-1).astype(jnp.int32)
        return jnp.where(settled, greedy, drawn)

    return jax.lax.cond((sampling.temperature > 0).any(), draw, lambda _: greedy, None)
