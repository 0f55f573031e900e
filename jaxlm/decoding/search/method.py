"""What a method of search is to the rest of the library: settings that find texts."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Float, Int

from jaxlm.caches.kind import KVCache
from jaxlm.decoding.sampling import Sampling
from jaxlm.model.transformer import Transformer
from jaxlm.registry import Registry, text_of


class Found(NamedTuple):
    """The texts of N prompts, n of each, best first.

    Attributes:
        tokens: of each text, a stop token included.
        lengths: how many they are; 0: there is no such text.
        scores: what the method ranks texts by.
        steps: calls of the model since the prompts were read.
    """

    tokens: Int[Array, "N n M"]
    lengths: Int[Array, "N n"]
    scores: Float[Array, "N n"]
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """Settings of a search; the text form is `name(option=value)`."""

    name: ClassVar[str] = ""

    @property
    @abc.abstractmethod
    def num_texts(self) -> int:
        """Texts of each prompt."""

    @abc.abstractmethod
    def search(
        self,
        model: Transformer,
        params: Any,
        prompt: tuple[Int[Array, "N T"], Int[Array, "N"]],
        cache: KVCache,
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Int[Array, "E"],
    ) -> Found:
        """Continues prompts.

        Args:
            prompt: tokens, padded behind, and true lengths.
            cache: an empty one of N rows, for prompts and `max_new_tokens` more.
            max_new_tokens: most tokens of a text, M.
            sampling: of N rows, whose processors change the logits; nothing is drawn.
            stop_tokens: at which a text ends.
        """

    def __str__(self) -> str:
        """The text that `METHODS.parse` turns back into equal settings."""
        return text_of(self)


METHODS = Registry("method", Method)
