"""RankGen: an encoder that says how well a continuation fits what is before it.

Krishna et al., "RankGen: Improving Text Generation with Large Ranking Models" (arXiv 2205.09726).
A prefix and a suffix become vectors of one space, each the first token's last hidden state times a
learned matrix; their dot product is the score. Training makes a prefix find its own suffix among
those of a batch, all of one document ("InBook"): fluent and on the topic, but of another place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlm.config import at_least, check, one_of
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import OptimizerConfig
from jaxlm.training.optimizers import make_optimizer

# What a text of each role begins with, as the released models were trained.
MARKERS = {"prefix": "pre ", "suffix": "suffi "}
# Texts are padded to the next power of two from here on, so that few programs serve all lengths.
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class RankGen:
    """The encoder, for both roles.

    Attributes:
        model: whose tokens see all others.
        max_lengths: tokens of a (prefix, suffix), the marker's among them; of longer texts the
            first ones count.
    """

    model: Transformer
    max_lengths: tuple[int, int] = (512, 128)

    def init(self, seed: int) -> dict[str, Any]:
        """Random parameters."""
        d = self.model.config.d_model
        matrix = jax.random.normal(jax.random.key(seed), (d, d)) * d**-0.5
        return {"encoder": init_params(self.model, seed), "projection": matrix}

    def __call__(
        self, params: Any, tokens: Int[Array, "N T"], segment_ids: Int[Array, "N T"]
    ) -> Float[Array, "N D"]:
        """Vectors of texts with their markers, float32, not normalised; segment 0 is padding."""
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        given = (tokens, at, segment_ids)
        hidden, _ = self.model.apply({"params": params["encoder"]}, *given, method="hidden")
        return hidden[:, 0].astype(jnp.float32) @ params["projection"].astype(jnp.float32)

    def rows(
        self, tokenizer: Tokenizer, texts: Sequence[str], role: str
    ) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"]]:
        """Tokens and segment ids of texts in a role, "prefix" or "suffix"."""
        check("rankgen", role=one_of(role, *MARKERS))
        most = self.max_lengths[list(MARKERS).index(role)]
        rows = [list(tokenizer.encode(MARKERS[role] + text))[:most] for text in texts]
        longest = max(map(len, rows))
        width = min(most, max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length()))
        tokens, segments = np.zeros((2, len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        return tokens, segments

    def scorer(
        self, params: Any, tokenizer: Tokenizer
    ) -> Callable[[str, Sequence[str]], Float[np.ndarray, "N"]]:
        """scores = scorer(prefix, suffixes)."""
        encode = jax.jit(self.__call__)

        def score(prefix: str, suffixes: Sequence[str]) -> Float[np.ndarray, "N"]:
            before = encode(params, *self.rows(tokenizer, [prefix], "prefix"))
            after = encode(params, *self.rows(tokenizer, suffixes, "suffix"))
            return np.asarray((after * before).sum(-1))

        return score


def rankgen_loss(
    prefixes: Float[Array, "N D"],
    suffixes: Float[Array, "N D"],
    negatives: Float[Array, "M D"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The mean of −log softmax of each prefix's own suffix among all, and `negatives` if any.

    Args:
        prefixes, suffixes: pairs.
        negatives: suffixes that are nobody's, such as a language model's own.
        axis_name: of a mapped axis over whose shards suffixes are gathered; the mean is the
            shard's own.
    """
    own = jnp.arange(prefixes.shape[0])
    if axis_name is not None:
        own += jax.lax.axis_index(axis_name) * prefixes.shape[0]
        suffixes = jax.lax.all_gather(suffixes, axis_name, tiled=True)
        if negatives is not None:
            negatives = jax.lax.all_gather(negatives, axis_name, tiled=True)
    candidates = suffixes if negatives is None else jnp.concatenate([suffixes, negatives])
    logits = jnp.einsum("nd,md->nm", prefixes, candidates)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), own[:, None], 1).mean()


def inbook_pairs(
    documents: Sequence[str],
    batch_size: int,
    prefix_words: int,
    suffix_words: int,
    seed: int,
) -> Iterator[tuple[list[str], list[str]]]:
    """(prefixes, suffixes) without end; each batch is of one document, and no two texts of it
    overlap. A function of the seed.

    Raises:
        ValueError: no document is long enough for a batch.
    """
    check("inbook_pairs", batch_size=at_least(batch_size, 2))
    window = prefix_words + suffix_words
    words = [text.split() for text in documents]
    enough = [w for w in words if len(w) >= (batch_size + 1) * window]
    if not enough:
        raise ValueError(
            f"documents of {[len(w) for w in words]} words; allowed: one with at least "
            f"{(batch_size + 1) * window}, for batch_size={batch_size} windows of {window}"
        )
    generator = np.random.default_rng(seed)
    while True:
        text = enough[generator.integers(len(enough))]
        first = int(generator.integers(window))
        places = (len(text) - first) // window
        starts = first + window * generator.choice(places, batch_size, replace=False)
        cut = starts + prefix_words
        prefixes = [" ".join(text[s:c]) for s, c in zip(starts, cut, strict=True)]
        suffixes = [" ".join(text[c : c + suffix_words]) for c in cut]
        yield prefixes, suffixes


def train_rankgen(
    ranker: RankGen,
    tokenizer: Tokenizer,
    pairs: Iterator[tuple[list[str], list[str]]],
    steps: int,
    optimizer: OptimizerConfig,
    seed: int = 0,
) -> tuple[dict[str, Any], list[float]]:
    """Parameters after `steps` batches, and the loss of each."""
    params = ranker.init(seed)
    chain = make_optimizer(optimizer, steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Mapping[str, Any]) -> Any:
        def loss(params: Any) -> Array:
            before, after = (ranker(params, *batch[role]) for role in MARKERS)
            return rankgen_loss(before, after)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = chain.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = chain.init(params), []
    for _ in range(steps):
        texts = dict(zip(MARKERS, next(pairs), strict=True))
        batch = {role: ranker.rows(tokenizer, text, role) for role, text in texts.items()}
        params, state, value = step(params, state, batch)
        losses.append(value)
    return params, [float(x) for x in losses]
