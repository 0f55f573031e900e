"""Long stretches of text, for measuring far beyond the training length."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from jaxlm.config import at_least, check
from jaxlm.data.config import as_source
from jaxlm.data.sources import documents, kind_of
from jaxlm.data.tokenizers import Tokenizer


def _ids(source: str, tokenizer: Tokenizer) -> Int[np.ndarray, "N"]:
    """The whole source as one text.

    Raises:
        ValueError: it is of conversations, which no template has made a text of.
    """
    about = as_source(source)
    if (kind := kind_of(about)) != "text":
        raise ValueError(f"source {source!r} holds {kind}; allowed: a text")
    return np.asarray(tokenizer.encode("\n\n".join(documents(about))), np.int32)


def longest_window(source: str, tokenizer: Tokenizer) -> int:
    """The greatest length, in tokens, that `long_windows` can cut from a source."""
    return len(_ids(source, tokenizer)) - (tokenizer.bos_id is None)


def long_windows(
    source: str, tokenizer: Tokenizer, length: int, count: int
) -> Int[np.ndarray, "W S"]:
    """Contiguous windows of a source, spread evenly over it: int32 [count, length + 1].

    Each begins with the tokenizer's start token, as every document does in training. Windows
    overlap where the text is short for so many.

    Raises:
        ValueError: a length or count below 1, a text shorter than one window, or conversations.
    """
    check("long_windows", length=at_least(length, 1), count=at_least(count, 1))
    ids = _ids(source, tokenizer)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    need = length + 1 - len(start)
    if len(ids) < need:
        raise ValueError(
            f"source {source!r} has {len(ids)} tokens; allowed: at least {need}, for windows of "
            f"length={length}"
        )
    firsts = np.linspace(0, len(ids) - need, count).astype(int)
    return np.stack([np.concatenate([start, ids[f : f + need]]) for f in firsts]).astype(np.int32)
