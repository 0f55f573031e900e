"""Which processors there are, and in what order they come.

A class of them has the names of its `settings`, and makes one from those that are given, each for
all rows or one a row: `make(batch, **settings)`, None if no row wants it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.processors.ngrams import NoRepeatNGrams
from jaxlm.decoding.processors.penalties import OutputPenalty, RepetitionPenalty
from jaxlm.decoding.processors.sequences import BadWords, SequenceBias
from jaxlm.decoding.processors.tokens import (
    BannedTokens,
    BeginBan,
    ForcedTokens,
    LogitBias,
    MinNewTokens,
)
from jaxlm.decoding.processors.truncation import EpsilonCutoff, EtaCutoff, MinP, TypicalP

# Hugging Face's order, but for the bans, which come first or last with the same result, and for a
# token that is both forced and suppressed, which here is forced.
BEFORE_TEMPERATURE: tuple[Any, ...] = (
    MinNewTokens,
    LogitBias,
    SequenceBias,
    RepetitionPenalty,
    OutputPenalty,
    NoRepeatNGrams,
    BadWords,
    BannedTokens,
    BeginBan,
    ForcedTokens,
)
# After temperature, top-k and top-p.
TRUNCATIONS: tuple[Any, ...] = (MinP, TypicalP, EpsilonCutoff, EtaCutoff)


def available() -> tuple[str, ...]:
    """The names of all settings that make a processor."""
    kinds = (*BEFORE_TEMPERATURE, *TRUNCATIONS)
    return tuple(dict.fromkeys(name for kind in kinds for name in kind.settings))


def make_chain(batch: Batch, settings: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Processors before the temperature, and truncations after it, that some row switches on.

    Raises:
        ValueError: an unknown setting, or a value out of range.
    """
    for name in settings:
        if name not in available():
            near = difflib.get_close_matches(name, available(), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown setting {name!r}{hint}; allowed: {', '.join(available())}")
    given = {name: value for name, value in settings.items() if value is not None}

    def made(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
        asked = [(k, {n: given[n] for n in k.settings if n in given}) for k in kinds]
        found = (kind.make(batch, **own) for kind, own in asked if own)
        return tuple(p for p in found if p is not None)

    return made(BEFORE_TEMPERATURE), made(TRUNCATIONS)


def of_user(batch: Batch, processors: Sequence[Any]) -> tuple[Any, ...]:
    """A user's processors as pytrees: a plain function is one without arrays.

    Raises:
        ValueError: one that is not callable, or whose arrays have no entry for each row.
    """
    if not isinstance(processors, list | tuple):
        raise ValueError(f"processors={processors!r}; allowed: a list of callables")
    found = []
    for one in processors:
        if not callable(one):
            raise ValueError(f"processors: {one!r}; allowed: callables of (logits, past)")
        if jax.tree_util.all_leaves([one]):
            one = jax.tree_util.Partial(one)  # noqa: PLW2901
        for leaf in jax.tree.leaves(one):
            if np.shape(leaf)[:1] != (batch.rows,):
                shape = list(np.shape(leaf))
                told = f"allowed: {batch.rows} rows on the first axis"
                raise ValueError(f"processors: an array of shape {shape}; {told}")
        found.append(jax.tree.map(jnp.asarray, one))
    return tuple(found)


def needs_of(processor: Any) -> frozenset[str]:
    """Which of `Past`'s arrays it reads; a user's, unless it says so, the tokens."""
    return getattr(processor, "needs", frozenset({"tokens"}))
