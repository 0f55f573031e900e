"""Whether a ranking of next tokens follows what fits or what looks alike.

The probe of "Correlation and Navigation in the Vocabulary Key Space of Language Models" (arXiv
2410.02284): in the middle of a ranking, tokens of the clusters of its first ones are compared with
all others. Where the others lead to right answers more often, ranks come from likeness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.key_space import KeySpace
from jaxlm.decoding.navigation import answers_of, listed, prompt_ids, ranking
from jaxlm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class RankBias:
    """Of the ranks behind the first `top_k`: tokens in the clusters of those, and out of them.

    Attributes:
        precision_in, precision_out: share that leads to right answers; None: there are no tokens.
        rank_in, rank_out: mean rank, from 1; None: the same.
        share_in: of the tokens, those in the clusters.
    """

    precision_in: float | None
    precision_out: float | None
    rank_in: float | None
    rank_out: float | None
    share_in: float


def probe_rank_bias(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    instruction: str,
    judge: Callable[[str], bool],
    key_space: KeySpace,
    top_n: int = 100,
    top_k: int = 10,
    max_new_tokens: int = 64,
    cache: str | CacheKind = "dense",
) -> RankBias:
    """Each of the first tokens that an instruction's answer may begin with, completed greedily.

    Args:
        judge: whether an answer is right; one that no quote ends is wrong.
        key_space: of this model and tokenizer.
        top_n: tokens of the ranking that are looked at.
        top_k: the first of them, whose clusters count.
        max_new_tokens: of an answer, behind its first.

    Raises:
        ValueError: counts that leave no tokens behind the first, a key space of other tokens, a
            judge that is no function.
    """
    size = min(tokenizer.vocab_size, model.config.vocab_size)
    fine = integer_at_least(top_n, 2)[1] and top_n <= size
    check("rank_bias", top_n=(top_n, fine, f"an integer from 2 to {size}"))
    fine = integer_at_least(top_k, 1)[1] and top_k < top_n
    clustered = len(key_space.cluster_ids)
    check(
        "rank_bias",
        top_k=(top_k, fine, f"an integer from 1 to {top_n - 1}, below top_n"),
        judge=(judge, callable(judge), "a function of an answer"),
        key_space=(f"of {clustered} tokens", clustered == size, f"of {size}"),
    )
    given, prompt = (model, params, tokenizer), prompt_ids(tokenizer, listed(instruction, []))
    ranked = ranking(*given, prompt, cache)[:top_n]
    answers = answers_of(*given, prompt, ranked, max_new_tokens, cache)
    correct = [bool(answer) and bool(judge(answer)) for answer in answers]
    return rank_bias([int(key_space.cluster_ids[t]) for t in ranked], correct, top_k)


def rank_bias(clusters: Sequence[int], correct: Sequence[bool], top_k: int) -> RankBias:
    """Of the clusters of ranked tokens, best first, and whether each leads to a right answer."""
    first, behind = set(clusters[:top_k]), range(top_k, len(clusters))
    inside = [i for i in behind if clusters[i] in first]
    outside = [i for i in behind if clusters[i] not in first]

    def mean(numbers: list[float]) -> float | None:
        return sum(numbers) / len(numbers) if numbers else None

    return RankBias(
        mean([correct[i] for i in inside]),
        mean([correct[i] for i in outside]),
        mean([i + 1 for i in inside]),
        mean([i + 1 for i in outside]),
        len(inside) / len(behind),
    )
