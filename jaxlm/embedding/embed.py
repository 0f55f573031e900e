"""Texts as vectors: a model's last hidden states, pooled over each text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import at_least, check, one_of
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.model.transformer import Transformer

# Texts are padded to the next power of two from here on, so that few programs serve all lengths.
SMALLEST_BUCKET = 16


def embed(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pooling: str = "mean",
    normalize: bool = True,
    prefix: str = "",
    max_length: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "N D"]:
    """A vector for each text, [texts, d_model] float32, in their order.

    Between the tokenizer's start and end token, as sentence encoders are trained. Texts of similar
    length share a batch; a text's vector depends on its neighbours by rounding alone.

    Args:
        model, params, tokenizer: as from `jaxlm.load`.
        texts: any number.
        pooling: "mean" of all tokens (MiniLM, E5) or "cls", the first one (BGE, GTE).
        normalize: to unit length, so that a dot product is the cosine.
        prefix: put before every text (E5: "query: " or "passage: ").
        max_length: tokens of a text, its ends included; longer ones are cut. None: none is cut.
        batch_size: texts at a time.

    Raises:
        ValueError: a setting that is not allowed, or a text of more tokens than the model has
            positions where none is cut.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts={texts!r}; allowed: a list of strings")
    check(
        "embed",
        pooling=one_of(pooling, *POOLINGS),
        max_length=(max_length, max_length is None or max_length >= 2, "None or an integer >= 2"),
        batch_size=at_least(batch_size, 1),
    )
    limit = model.config.encoding.max_length
    rows = [_row(tokenizer, prefix + text, max_length, limit) for text in texts]
    vectors = np.zeros((len(rows), model.config.d_model), np.float32)
    size = min(batch_size, 1 << max(len(rows) - 1, 0).bit_length())
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        batch = _pad([rows[i] for i in chosen], size, limit)
        vectors[chosen] = _pooled(model, pooling, normalize, params, *batch)[: len(chosen)]
    return vectors


def _row(tokenizer: Tokenizer, text: str, max_length: int | None, limit: int | None) -> list[int]:
    """A text's tokens, from the start token to the end token."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*start, *tokenizer.encode(text)]
    ids = [*(ids if max_length is None else ids[: max_length - 1]), tokenizer.eos_id]
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"text {text[:20]!r}… has {len(ids)} tokens; "
            f"allowed: at most {limit}, or set max_length"
        )
    return ids


def _pad(rows: list[list[int]], size: int, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [size, bucket]; rows of padding alone make up the number."""
    longest = max(map(len, rows))
    width = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    width = width if limit is None else min(width, limit)
    tokens, segments = np.zeros((2, size, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segments[i, : len(row)] = 1
    return tokens, segments


def _mean(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
    weights = (segment_ids != 0).astype(jnp.float32)[..., None]
    return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def _first(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
    return hidden[:, 0]


POOLINGS = {"mean": _mean, "cls": _first}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(
    model: Transformer,
    pooling: str,
    normalize: bool,
    params: Any,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B D"]:
    """One vector a row, in float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model.apply({"params": params}, tokens, positions, segment_ids, method="hidden")
    vectors = POOLINGS[pooling](hidden.astype(jnp.float32), segment_ids)
    if not normalize:
        return vectors
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length == 0, 1.0, length)
