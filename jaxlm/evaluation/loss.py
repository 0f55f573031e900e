"""Loss on held-out text: as one number, and by position far beyond the training length."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import caches
from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.evaluation.through_cache import losses_through_cache
from jaxlm.model.scores import token_scores
from jaxlm.model.transformer import Transformer
from jaxlm.training.objectives.next_token import LossSpec
from jaxlm.training.step import loss_sums

# Tokens of a long text that are read through a cache at a time: one at a time takes ten times as
# long. Up to so many more than in decoding are still in full where a cache rounds.
READ_AT_ONCE = 32


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(model: Transformer, params: Any, batch: Mapping[str, Array]):
    spec = LossSpec(softcap=model.config.embedding.logit_softcap)
    _, (sums, _) = loss_sums(model, spec, params, batch)
    return sums, batch["loss_weights"].sum()


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Loss on a text.

    Attributes:
        loss: nats a token.
        perplexity: exp(loss).
        accuracy: share of tokens that were the most probable one.
        bits_per_byte: bits over the text's UTF-8 bytes, comparable between tokenizers; None if the
            number of bytes is not known.
        tokens: predicted.
    """

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float | None
    tokens: int


def evaluate(
    model: Transformer,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray | jax.Array]],
    num_bytes: int | None = None,
) -> HeldOut:
    """The mean loss over all weighted targets of `batches` (see jaxlm.data).

    Raises:
        ValueError: there is no target.
    """
    nll = correct = tokens = 0.0
    dispatched = (_batch_sums(model, params, dict(batch)) for batch in batches)
    # Fetched when the next one is dispatched: the device always has work.
    for of_batch, _ in itertools.pairwise(itertools.chain(dispatched, [None])):
        sums, weight = jax.device_get(of_batch)
        nll, correct = nll + float(sums.nll), correct + float(sums.correct)
        tokens += float(weight)
    if tokens == 0:
        raise ValueError("batches hold no target to predict; allowed: at least one")
    bits = None if num_bytes is None else nll / math.log(2) / num_bytes
    loss = nll / tokens
    return HeldOut(loss, math.exp(min(loss, 700)), correct / tokens, bits, int(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _token_losses(
    model: Transformer, params: Any, window: Int[Array, "B S"]
) -> Float[Array, "B T"]:
    """-log p of every next token of contiguous windows, T = S - 1."""
    tokens, targets = window[:, :-1], window[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model.apply(
        {"params": params}, tokens, positions, jnp.ones_like(tokens), method="hidden"
    )
    return -token_scores(model, params, hidden, targets)[0]


def _losses(model: Transformer, params: Any, window: Array, cache: CacheKind | None) -> Array:
    if cache is None:
        return _token_losses(model, params, window)
    encoding = model.config.encoding
    by_length = any(encoding.of_kind(kind).caches_unrotated for kind in encoding.kinds)
    chunk = 1 if by_length else min(READ_AT_ONCE, window.shape[1] - 1)
    return losses_through_cache(model, params, window, chunk, cache, chunk)


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Mean loss of the tokens in each bucket of positions.

    Attributes:
        start: first position of each bucket; the last bucket ends at `length`.
        loss: nats a token, the mean over the bucket's positions and all windows.
        length: of the windows.
        windows: how many were evaluated.
    """

    start: tuple[int, ...]
    loss: tuple[float, ...]
    length: int
    windows: int


def check_windows(model: Transformer, windows: np.ndarray) -> None:
    """Raises ValueError unless `evaluate_loss_by_position` can measure the model on them."""
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
        raise ValueError(
            f"windows of shape {windows.shape}, {windows.dtype}; "
            "allowed: token ids [windows, length + 1]"
        )
    size = model.config.vocab_size
    if windows.size and not (windows.min() >= 0 and windows.max() < size):
        outside = windows[(windows < 0) | (windows >= size)][0]
        raise ValueError(f"windows hold the token {outside}; allowed: 0 to {size - 1}")
    count, length = windows.shape[0], windows.shape[1] - 1
    limit = model.config.encoding.max_length
    if length < 1 or count < 1:
        raise ValueError(f"windows of shape {windows.shape}; allowed: [>= 1, >= 2] token ids")
    if limit is not None and length > limit:
        raise ValueError(
            f"length={length}; allowed: at most {limit} with "
            f"position_encoding={model.config.encoding}"
        )


def evaluate_loss_by_position(
    model: Transformer,
    params: Any,
    windows: np.ndarray,
    bucket: int = 64,
    batch_size: int = 1,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
    cache: str | CacheKind | None = None,
) -> LossByPosition:
    """Loss as a function of position: what a model makes of contexts longer than it has seen.

    Args:
        model: try `model.with_position_encoding("lm_infinite", …)` on the same parameters.
        params: its parameters.
        windows: token ids of contiguous text, integers [windows, length + 1].
        bucket: positions averaged into one number.
        batch_size: windows evaluated at a time.
        track: goes around the loop over batches, to say how far it is: tqdm, for instance.
        cache: what the text is read through (see `jaxlm.caches`), as decoding would, but
            READ_AT_ONCE tokens at a time, or one where the encoding looks at the context's length;
            None: one forward pass reads all of it.

    Raises:
        ValueError: windows that are no token ids of the model's, too short, or longer than the
            position encoding's table; a bucket or batch_size below 1; a cache that cannot serve the
            model.
    """
    check(
        "evaluate_loss_by_position",
        bucket=integer_at_least(bucket, 1),
        batch_size=integer_at_least(batch_size, 1),
    )
    windows, kind = np.asarray(windows), None if cache is None else caches.parse(cache)
    check_windows(model, windows)
    count, length = windows.shape[0], windows.shape[1] - 1
    total = np.zeros(length, np.float64)
    for i in track(range(0, count, batch_size)):
        part = np.asarray(windows[i : i + batch_size], np.int32)
        rows = np.resize(part, (min(batch_size, count), length + 1))  # one shape: one program
        losses = np.asarray(_losses(model, params, jnp.asarray(rows), kind))
        total += losses[: len(part)].astype(np.float64).sum(0)
    starts = range(0, length, bucket)
    means = tuple(float(total[s : s + bucket].mean() / count) for s in starts)
    return LossByPosition(tuple(starts), means, length, count)
