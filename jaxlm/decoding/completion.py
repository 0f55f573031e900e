"""One continuation of a prompt, and the choice among several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.config import integer_at_least, is_number
from jaxlm.decoding.logprobs import LogProbs

# (prompt as it was given, its continuations) → what each is worth.
Scorer = Callable[[Any, list[str]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model says after a prompt.

    Attributes:
        text: without stop token and stop string.
        token_ids: as drawn, with the stop token, or those that complete the stop string.
        finish_reason: "stop": at a stop token or a stop string; "length": `max_new_tokens` are
            drawn.
        logprobs: for each token its own log-probability, and those of the most probable tokens in
            its place, best first; of the model alone, before processors and temperature. None: not
            asked for.
        score: the sum of the tokens' own; None: nobody needed it.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[dict[int, float]] | None = None
    score: float | None = None


# In place of a text that a search has not found.
NOT_FOUND = Completion("", [], "length", score=-math.inf)


def logprobs_of(logprobs: LogProbs, row: int, token_ids: list[int]) -> list[dict[int, float]]:
    """Of one row's tokens, by token id, its own first."""
    chosen, tokens, best = (
        np.asarray(a[row]).tolist() for a in (logprobs.chosen, logprobs.tokens, logprobs.best)
    )
    return [
        {token: chosen[i]} | dict(zip(tokens[i], best[i], strict=True))
        for i, token in enumerate(token_ids)
    ]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many continuations are drawn of each prompt, and which are given.

    Attributes:
        n: as many are given.
        best_of: as many are drawn; None: n.
        length_penalty: the best have the largest sum of log-probabilities divided by their length
            in tokens to this power; 1: by mean.
        scorer: in place of that: a function of (prompt, texts).
    """

    n: int = 1
    best_of: int | None = None
    length_penalty: float = 1.0
    scorer: Scorer | None = None

    def __post_init__(self):
        """Raises ValueError."""
        if not integer_at_least(self.n, 1)[1]:
            raise ValueError(f"n={self.n!r}; allowed: an integer >= 1")
        if self.best_of is not None and not integer_at_least(self.best_of, self.n)[1]:
            raise ValueError(f"best_of={self.best_of!r}; allowed: an integer >= n={self.n}")
        if not is_number(self.length_penalty) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty!r}; allowed: a finite number")
        if self.scorer is not None and not callable(self.scorer):
            raise ValueError(f"scorer={self.scorer!r}; allowed: a function of (prompt, texts)")

    @property
    def drawn(self) -> int:
        """Continuations of each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def by_score(self) -> bool:
        """Whether log-probabilities decide."""
        return self.scorer is None and self.drawn > self.n

    def best(self, prompt: Any, completions: list[Completion]) -> list[Completion]:
        """Those that are given of one prompt's, best first where something decides."""
        if self.scorer is not None:
            worth = list(self.scorer(prompt, [c.text for c in completions]))
            if len(worth) != len(completions):
                told = f"allowed: {len(completions)}, one a text"
                raise ValueError(f"scorer gave {len(worth)} scores; {told}")
        elif self.by_score:
            worth = [c.score / len(c.token_ids) ** self.length_penalty for c in completions]
        else:
            return completions
        order = sorted(range(len(worth)), key=lambda i: -worth[i])
        return [completions[i] for i in order[: self.n]]
