"""In-context navigation: many different answers, by telling the model what it has said already.

After "Correlation and Navigation in the Vocabulary Key Space of Language Models" (arXiv
2410.02284): beyond the first ranks a next token often ranks high only because its vector is like
that of a good one. So a few first tokens are taken from the ranking, what they lead to is put into
the prompt's list, and the ranking is made anew, until enough has been explored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import logging

from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.generate import complete, text_after
from jaxlm.decoding.stop_strings import cut_at_stop
from jaxlm.model.transformer import Transformer

# What an answer stands between in the list of them.
QUOTE = '"'


@dataclasses.dataclass(frozen=True)
class Navigation:
    """Settings. One round is the plain ranking of first tokens.

    Attributes:
        rounds: rankings.
        per_round: answers of each.
        reset: answers are continued from the prompt without a list, which then chooses their first
            tokens alone.
        max_new_tokens: of an answer, behind its first.
    """

    rounds: int = 10
    per_round: int = 10
    reset: bool = True
    max_new_tokens: int = 64

    def __post_init__(self):
        check(
            "navigation",
            rounds=integer_at_least(self.rounds, 1),
            per_round=integer_at_least(self.per_round, 1),
            max_new_tokens=integer_at_least(self.max_new_tokens, 1),
        )


@dataclasses.dataclass(frozen=True)
class Explored:
    """Answers in the order in which they were found.

    Attributes:
        items: without their quotes; "" where none ends within the tokens that it may take.
        first_tokens: of each, no two alike.
        rounds: in which each was found.
        exhausted: there are fewer answers than were asked for, as no first token is left.
    """

    items: list[str] = dataclasses.field(default_factory=list)
    first_tokens: list[int] = dataclasses.field(default_factory=list)
    rounds: list[int] = dataclasses.field(default_factory=list)
    exhausted: bool = False


def listed(instruction: str, items: Sequence[str]) -> str:
    """The prompt: the instruction, and a list that its next answer continues."""
    said = "".join(f"{i}. {QUOTE}{item}{QUOTE}\n" for i, item in enumerate(items, 1))
    return f"{instruction}\nAnswer:\n{said}{len(items) + 1}. {QUOTE}"


def navigate(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    instruction: str,
    navigation: Navigation,
    cache: str | CacheKind = "dense",
) -> Explored:
    """Greedy answers to an instruction, up to `rounds` × `per_round` of them.

    A list that would take the prompt past `context_length` keeps its newest entries, with a
    warning.

    Raises:
        ValueError: more answers a round than there are tokens, or a prompt that is too long.
    """
    check(
        "navigation",
        per_round=(
            navigation.per_round,
            navigation.per_round <= model.config.vocab_size,
            f"at most vocab_size={model.config.vocab_size}",
        ),
    )
    given, found = (model, params, tokenizer), Explored()
    used: set[str] = set()
    bare = prompt_ids(tokenizer, listed(instruction, []))
    room = model.config.context_length - 1 - (0 if navigation.reset else navigation.max_new_tokens)
    shown: list[str] = []  # what of the answers is in the prompt
    warned = False
    for turn in range(navigation.rounds):
        fitting = _newest(tokenizer, instruction, shown, room)
        if len(fitting) < len(shown) and not warned:
            logging.warning("the list grows past %d tokens: it keeps its newest entries", room)
            warned = True
        shown, prompt = fitting, prompt_ids(tokenizer, listed(instruction, fitting))
        ranked = ranking(*given, prompt, cache)
        chosen = unused_tokens(tokenizer, ranked, used, navigation.per_round)
        if not chosen:
            break
        base = bare if navigation.reset else prompt
        items = answers_of(*given, base, chosen, navigation.max_new_tokens, cache)
        shown += [item for item in items if item]
        found.items.extend(items)
        found.first_tokens.extend(chosen)
        found.rounds.extend([turn] * len(chosen))
    wanted = navigation.rounds * navigation.per_round
    return dataclasses.replace(found, exhausted=len(found.items) < wanted)


def _newest(tokenizer: Tokenizer, instruction: str, items: list[str], room: int) -> list[str]:
    """As many of the last items as a prompt of `room` tokens can list."""
    while items and len(prompt_ids(tokenizer, listed(instruction, items))) > room:
        items = items[1:]
    return items


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text that begins with the start token, if there is one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(text)]


def ranking(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompt: list[int],
    cache: str | CacheKind = "dense",
) -> list[int]:
    """The tokenizer's tokens, the most probable next one first."""
    size = model.config.vocab_size
    (ranked,) = complete(model, params, tokenizer, [prompt], 1, cache=cache, logprobs=size)
    assert ranked.logprobs is not None
    return [token for token in ranked.logprobs[0] if token < tokenizer.vocab_size]


def answers_of(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompt: list[int],
    first_tokens: Sequence[int],
    max_new_tokens: int,
    cache: str | CacheKind = "dense",
) -> list[str]:
    """What each first token of an answer leads to, greedily and as one batch; "" where no quote
    ends it.
    """
    given, starts = (model, params, tokenizer), [[*prompt, token] for token in first_tokens]
    completions = complete(*given, starts, max_new_tokens, [QUOTE], cache=cache)
    answers = []
    for first, more in zip(first_tokens, completions, strict=True):
        text = text_after(tokenizer, prompt, [first, *more.token_ids])
        item = cut_at_stop(text, [QUOTE])
        ended = item != text or more.finish_reason == "stop"
        answers.append(item.strip() if ended else "")
    return answers


def unused_tokens(tokenizer: Tokenizer, ranked: list[int], used: set[str], count: int) -> list[int]:
    """The first tokens of a ranking whose text was not yet used, which it then is; two that differ
    by a space are one.
    """
    chosen = []
    for token in ranked:
        text = tokenizer.decode([token]).strip()
        if text and text != QUOTE and text not in used:
            used.add(text)
            chosen.append(token)
        if len(chosen) == count:
            break
    return chosen


def unique_items(items: Sequence[str]) -> list[str]:
    """Those that are there, the first of each that differ by case and outer space alone."""
    first: dict[str, str] = {}
    for item in items:
        if item.strip():
            first.setdefault(item.strip().lower(), item)
    return list(first.values())


def coverage(items: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the wanted answers that were found."""
    said = {item.strip().lower() for item in items}
    return sum(w.strip().lower() in said for w in wanted) / len(wanted)


def mean_precision(correct: Sequence[bool]) -> float:
    """The mean over n of the share of correct ones among the first n."""
    right, total = 0, 0.0
    for i, one in enumerate(correct, 1):
        right += one
        total += right / i
    return total / len(correct)
