"""Whether a model still finds a number that a long text said once: the pass key task.

The protocol is that of LM-Infinite's experiments (arXiv 2308.16137): a task, sentences that say
nothing, somewhere among them the number, and the question. The words are ours. None of them but the
key's is an "is", so that the question's last words lead to one place of the text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.generate import generate
from jaxlm.model.transformer import Transformer

TASK = (
    "One important number hides in a long and dull text. Find it and keep it in mind, for you will "
    "be asked about it at the end.\n"
)
FILLER = (
    "The river runs past the mill. Cows stand under the trees. A cart comes along the road. "
    "Clouds drift over the hill. Evening falls and the lamps go on.\n"
)
KEY = "The pass key is {key}. Remember it: {key}.\n"
QUESTION = "Which pass key did the text name? The pass key is"
MOST = 10_000_000  # a key is below it

# A key of seven digits, each a token, a space before it, and one more to see that it ends.
NEW_TOKENS = 9


@dataclasses.dataclass(frozen=True)
class Passkey:
    """One prompt.

    Attributes:
        prompt: ends where the key is to be said.
        key: what is to be said.
        depth: where the text says it, 0 the beginning and 1 the end.
    """

    prompt: str
    key: int
    depth: float


def make(length: int, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Passkey]:
    """Prompts of as many tokens as fit into `length`, the same for the same arguments.

    Raises:
        ValueError: a count below 1, or a length without room for one sentence.
    """
    check(
        "passkey",
        count=integer_at_least(count, 1),
        length=integer_at_least(length, 1),
        seed=integer_at_least(seed, 0),
    )
    rng = np.random.default_rng((seed, length))
    keys, places = rng.integers(1, MOST, count), rng.random(count)
    return [_made(length, tokenizer, *one) for one in zip(keys.tolist(), places, strict=True)]


def _made(length: int, tokenizer: Tokenizer, key: int, place: float) -> Passkey:
    least, most = (_tokens(tokenizer, n * FILLER, key) for n in (1, 2))
    if least > length:
        raise ValueError(f"length={length}; allowed: at least {least} tokens for a pass key")
    copies = 1 + (length - least) // (most - least)
    while _tokens(tokenizer, copies * FILLER, key) > length:  # where pieces join otherwise
        copies -= 1
    before = int(place * (copies + 1))
    said = KEY.format(key=key)
    text = TASK + before * FILLER + said + (copies - before) * FILLER + QUESTION
    return Passkey(text, key, before / copies)


def _tokens(tokenizer: Tokenizer, filler: str, key: int) -> int:
    text = TASK + filler + KEY.format(key=key) + QUESTION
    return len(tokenizer.encode(text)) + (tokenizer.bos_id is not None)


def is_found(answer: str, key: int) -> bool:
    """Whether the first number that an answer says is the key."""
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[0]) == key


def evaluate_passkey(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    length: int,
    count: int = 20,
    seed: int = 0,
    cache: str | CacheKind = "dense",
    track: Callable[[Sequence[Passkey]], Iterable[Passkey]] = iter,
) -> float:
    """The share of `count` pass keys that greedy decoding says, in texts of up to `length` tokens.

    A prompt is read at once; what is said after it reads the cache.

    Args:
        cache: see `jaxlm.caches`.
        track: goes around the loop over prompts, to say how far it is.

    Raises:
        ValueError: as `make`, or `generate`.
    """
    found = 0
    for one in track(make(length, tokenizer, count, seed)):
        given = (model, params, tokenizer, [one.prompt], NEW_TOKENS)
        (answer,) = generate(*given, cache=cache, temperature=0.0)
        found += is_found(answer, one.key)
    return found / count
