"""Which heads look up earlier tokens: those that a razor cache lets keep all of theirs.

RazorAttention (arXiv 2407.15891), section 3: a block of random tokens is read again and again. An
echo head attends to where its token stood before, an induction head to the token behind that. Block
length, repeats and shares are those of the public toolkits of the authors' company. Ours: over the
earlier repeats the weights are summed, where the toolkits take a mean.

    scores = score_heads(model, params)
    save_heads("heads.json", select(scores), model.config)  # jaxlm.caches.head_lists
    generate(model, params, tokenizer, prompts, cache="razor(heads='heads.json', window=4096)")
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import HIDDEN, scores, visible
from jaxlm.caches.head_lists import HeadLists
from jaxlm.config import check, integer_at_least
from jaxlm.model.layouts import num_scanned, unroll_layers
from jaxlm.model.transformer import Transformer

QUERIES = 128  # whose weights, of all heads of a layer, are there at one time


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """How much of its attention each kv head gives to what it has seen before, 0 to 1.

    L layers, K kv heads; of a head's queries that of the most.

    Attributes:
        echo: to the same token.
        induction: to the token behind that.
    """

    echo: Float[np.ndarray, "L K"]
    induction: Float[np.ndarray, "L K"]


def score_heads(
    model: Transformer,
    params: Any,
    seed: int = 0,
    block: int = 2500,
    repeats: int = 4,
    exclude: Sequence[int] = (),
) -> HeadScores:
    """Reads `repeats` times the same `block` random tokens.

    Args:
        exclude: tokens that are never drawn, such as the tokenizer's special ones.

    Raises:
        ValueError: block below 8, repeats below 2, more tokens than the model's context length, or
            nothing left to draw.
    """
    c = model.config
    check("score_heads", block=integer_at_least(block, 8), repeats=integer_at_least(repeats, 2))
    if block * repeats > c.context_length:
        raise ValueError(
            f"block={block}; allowed: at most {c.context_length // repeats} with "
            f"repeats={repeats} and context_length={c.context_length}"
        )
    allowed = np.setdiff1d(np.arange(c.vocab_size), np.asarray(exclude, np.int64))
    if not allowed.size:
        raise ValueError(f"exclude={exclude!r}; allowed: fewer, so that tokens are left")
    drawn = np.random.default_rng(seed).choice(allowed, block)
    tokens = jnp.asarray(np.tile(drawn, repeats)[None], jnp.int32)
    found = np.asarray(_found(model, params, tokens, block), np.float32)
    by_group = found.reshape(*found.shape[:2], c.num_kv_heads, -1).max(-1)
    return HeadScores(by_group[:, 0], by_group[:, 1])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _found(
    model: Transformer, params: Any, tokens: Int[Array, "1 T"], block: int
) -> Float[Array, "L 2 N"]:
    positions = jnp.arange(tokens.shape[1])[None]
    given = (tokens, positions, jnp.ones_like(tokens))
    _, made = model.apply(
        {"params": params}, *given, method="hidden", probe=_Looks(block), mutable=["probes"]
    )
    layers = made["probes"]
    if num_scanned(model.config):
        layers = unroll_layers(model.config, layers)
    blocks = layers["last_layers"]
    own = [blocks[f"block_{i}"]["attention"]["found"][0] for i in range(model.config.num_layers)]
    return jnp.stack(own)


@dataclasses.dataclass(frozen=True)
class _Looks:
    """A probe: mean weight that each head's queries from the second block on give to echoes, and to
    inductions.
    """

    block: int

    def __call__(self, spec: AttentionSpec, x: AttentionInputs) -> Float[Array, "2 N"]:
        T = x.q.shape[1]

        def summed(start: Array) -> Array:
            i, j = start + jnp.arange(QUERIES), jnp.arange(T)
            gap = i[:, None] - j[None]
            earlier = (gap > 0) & (i < T)[:, None]
            echo = earlier & (gap % self.block == 0)
            induction = earlier & (gap % self.block == self.block - 1) & (j > 0)[None]
            looks = jnp.stack([echo, induction]).astype(jnp.float32)
            return jnp.einsum("nij,lij->ln", weights(spec, x, jnp.minimum(i, T - 1))[0], looks)

        starts = jnp.arange(self.block, T, QUERIES)
        return jax.lax.map(summed, starts).sum(0) / (T - self.block)


def weights(
    spec: AttentionSpec, x: AttentionInputs, rows: Int[Array, "n"]
) -> Float[Array, "B N n S"]:
    """Attention weights of some of the queries, float32."""
    some = dataclasses.replace(
        x,
        q=x.q[:, rows],
        q_positions=x.q_positions[:, rows],
        q_segment_ids=x.q_segment_ids[:, rows],
        q_far=None if x.q_far is None else x.q_far[:, rows],
    )
    s = jnp.where(visible(spec, some)[:, None], scores(spec, some), HIDDEN)
    if x.sink_logits is None:
        return jax.nn.softmax(s, -1)
    sinks = jnp.broadcast_to(x.sink_logits[None, :, None, None], (*s.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([s, sinks], -1), -1)[..., :-1]


def select(
    scores: HeadScores, induction_ratio: float = 0.14, echo_ratio: float = 0.01
) -> HeadLists:
    """The kv heads of each layer that are among the best of all layers by either score.

    Args:
        induction_ratio, echo_ratio: the share of all heads that are, rounded half up, one at least
            unless it is 0. Of heads that are alike the first is.

    Raises:
        ValueError: a ratio outside of [0, 1].
    """
    ratios = {"induction_ratio": induction_ratio, "echo_ratio": echo_ratio}
    check("select", **{n: (r, 0 <= r <= 1, "a number in [0, 1]") for n, r in ratios.items()})
    kept = np.zeros(scores.echo.shape, bool)
    for ratio, of in ((induction_ratio, scores.induction), (echo_ratio, scores.echo)):
        count = max(math.floor(ratio * of.size + 0.5), 1 if ratio else 0)
        kept.flat[np.argsort(-of, axis=None, kind="stable")[:count]] = True
    if kept.all():
        logging.warning("all heads are selected: nothing is compressed")
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in kept)
