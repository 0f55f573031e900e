"""A vote among several ways to solve a problem, each told of those before it.

After "Correlation and Navigation in the Vocabulary Key Space of Language Models" (arXiv
2410.02284): self-consistency (arXiv 2203.11171) whose ways differ by navigation in place of draws.
Each begins with the most probable token with which none began, given all ways before; it is
continued greedily from the prompt without them, and then asked for the answer.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.generate import complete, text_after
from jaxlm.decoding.navigation import QUOTE, prompt_ids, ranking, unused_tokens
from jaxlm.decoding.stop_strings import cut_at_stop
from jaxlm.model.transformer import Transformer

ASK = "Please show me some different ways to solve this problem."
WAY = "### Way"
FINAL = f"\n**Final Answer (Only Number):** {QUOTE}"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
ANSWER_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Vote:
    """Ways in the order in which they were found.

    Attributes:
        answers: of each; None: it has none.
        paths: their texts.
    """

    answers: list[str | None]
    paths: list[str]

    @property
    def answer(self) -> str | None:
        """That most ways lead to, the first of those that as many do; None: there is none."""
        votes = collections.Counter(answer for answer in self.answers if answer is not None)
        return votes.most_common(1)[0][0] if votes else None

    def path_accuracy(self, wanted: str) -> float:
        """Share of the ways that lead to this answer."""
        return self.answers.count(wanted) / len(self.answers)


def ways(question: str, paths: Sequence[str]) -> str:
    """The prompt: the question, and ways of which the next is to come."""
    heads = [f"{WAY} {i}:\n* **Step 1:**" for i in range(1, len(paths) + 2)]
    told = [f"{head}{path}\n" for head, path in zip(heads, [*paths, ""], strict=True)]
    return f"{question}\n{ASK}\n" + "".join(told).removesuffix("\n")


def solve(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    question: str,
    num_paths: int = 4,
    max_new_tokens: int = 256,
    extract: str = NUMBER,
    cache: str | CacheKind = "dense",
) -> Vote:
    """Fewer ways than were asked for where no first token is left.

    Args:
        num_paths: ways.
        max_new_tokens: of a way, behind its first.
        extract: regular expression of what counts of an answer; where it is not found, none.

    Raises:
        ValueError: a count below 1, a prompt that is too long.
    """
    check("self_consistency", num_paths=integer_at_least(num_paths, 1))
    given, bare = (model, params, tokenizer), prompt_ids(tokenizer, ways(question, []))
    paths: list[str] = []
    used: set[str] = set()
    while len(paths) < num_paths:
        ranked = ranking(*given, prompt_ids(tokenizer, ways(question, paths)), cache)
        first = unused_tokens(tokenizer, ranked, used, 1)
        if not first:
            break
        (more,) = complete(*given, [[*bare, *first]], max_new_tokens, [WAY], cache=cache)
        text = text_after(tokenizer, bare, [*first, *more.token_ids])
        paths.append(cut_at_stop(text, [WAY]).rstrip())
    asked = [prompt_ids(tokenizer, ways(question, []) + path + FINAL) for path in paths]
    ends = complete(*given, asked, ANSWER_TOKENS, [QUOTE], cache=cache)
    found = [re.search(extract, end.text) for end in ends]
    return Vote([None if match is None else match[0] for match in found], paths)
