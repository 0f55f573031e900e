"""How probable a text is after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config import at_least, check
from jaxlm.model.scores import token_scores
from jaxlm.model.transformer import Transformer

# Rows and their continuations are padded to a power of two from here on: few programs serve all.
SMALLEST_BUCKET = 16


@functools.partial(jax.jit, static_argnums=(0, 4))
def _score(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B S"],
    sizes: tuple[Int[Array, "B"], Int[Array, "B"]],
    width: int,
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Of left-padded rows the last tokens' summed log-probability, and whether all are greedy.

    `sizes`: of each row's tokens, and of how many of them are scored; `width` is no less.
    """
    lengths, scored = sizes
    S = tokens.shape[1]
    positions = jnp.arange(S)[None] - (S - lengths)[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    positions = jnp.maximum(positions, 0)[:, :-1]
    hidden, _ = model.apply(
        {"params": params}, tokens[:, :-1], positions, segments[:, :-1], method="hidden"
    )
    log_probs, top = token_scores(model, params, hidden[:, -width:], tokens[:, -width:])
    counts = jnp.arange(width)[None] >= (width - scored)[:, None]
    return jnp.where(counts, log_probs, 0.0).sum(-1), (top | ~counts).all(-1)


def score_continuations(
    model: Transformer,
    params: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    max_length: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[tuple[float, bool]]:
    """How probable each continuation is after its context.

    Args:
        model, params: as from `jaxlm.load`.
        pairs: (context, continuation) as token ids, neither of them empty.
        batch_size: pairs at a time; pairs of similar length share a batch.
        max_length: most tokens that the model reads; the start of a longer context is left out.
            None: the model's context length.
        track: goes around the loop over batches, to say how far it is.

    Returns:
        For each pair the sum of the continuation's log-probabilities (nats), and whether greedy
        decoding would give it. A token that shares the first place counts as greedy.

    Raises:
        ValueError: an empty context or continuation, a continuation longer than max_length, a
            max_length beyond the position encoding's table.
    """
    limit, most = model.config.encoding.max_length, max_length or model.config.context_length
    check(
        "score_continuations",
        batch_size=at_least(batch_size, 1),
        max_length=(most, 1 <= most <= (limit or most), f"1 to {limit or 'any length'}"),
    )
    for context, continuation in pairs:
        fine = len(context) >= 1 and 1 <= len(continuation) <= most
        if not fine:
            raise ValueError(
                f"context and continuation of {len(context)} and {len(continuation)} tokens; "
                f"allowed: at least 1, and 1 to max_length={most}"
            )
    # The last token is predicted, not read.
    rows = [([*context, *continuation])[-(most + 1) :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for start in track(range(0, len(order), batch_size)):
        chosen = order[start : start + batch_size]
        tokens, sizes, width = _batch(
            [(rows[i], len(pairs[i][1])) for i in chosen], batch_size, most
        )
        sums, greedy = jax.device_get(_score(model, params, tokens, sizes, width))
        for i, total, top in zip(chosen, sums, greedy, strict=False):
            found[i] = (float(total), bool(top))
    return found


def bucket(length: int, limit: int) -> int:
    """The next power of two, if the limit allows it."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def _batch(
    rows: Sequence[tuple[Sequence[int], int]], size: int, limit: int
) -> tuple[Array, tuple[Array, Array], int]:
    """Left-padded tokens [size, bucket + 1], their numbers, and the width of what is scored."""
    length = bucket(max(len(row) for row, _ in rows) - 1, limit)
    tokens = np.zeros((size, length + 1), np.int32)
    lengths, scored = np.zeros((2, size), np.int32)
    for i, (row, count) in enumerate(rows):
        tokens[i, length + 1 - len(row) :] = row
        lengths[i], scored[i] = len(row), count
    width = bucket(max(count for _, count in rows), length)
    return jnp.asarray(tokens), (jnp.asarray(lengths), jnp.asarray(scored)), width
