"""Long stretches of text, for measuring far beyond the training length."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from jaxlm.data.config import as_source
from jaxlm.data.sources import documents
from jaxlm.data.tokenizers import Tokenizer


def long_windows(
    source: str, tokenizer: Tokenizer, length: int, count: int
) -> Int[np.ndarray, "W S"]:
    """Contiguous windows of a source, spread evenly over it: int32 [count, length + 1].

    Each begins with the tokenizer's start token, as every document does in training. Windows
    overlap where the text is short for so many.

    Raises:
        ValueError: the text is shorter than one window.
    """
    text = "\n\n".join(documents(as_source(source)))
    ids = np.asarray(tokenizer.encode(text), np.int32)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    need = length + 1 - len(start)
    if len(ids) < need:
        raise ValueError(
            f"source {source!r} has {len(ids)} tokens; allowed: at least {need}, for windows of "
            f"length={length}"
        )
    firsts = np.linspace(0, len(ids) - need, count).astype(int)
    return np.stack([np.concatenate([start, ids[f : f + need]]) for f in firsts]).astype(np.int32)
