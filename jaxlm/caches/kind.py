"""What a KV cache is to the rest of the library: settings that make one, and the verbs it has.

A cache is a pytree of static shapes. Beside `commit` and `layer` it needs to say what part of the
past it keeps (`mask`): keys that it would have dropped must not be seen where they still are, be it
in a prompt that is read at once or in slots not yet written over. So what a model says with a cache
is a function of the tokens alone, and not of how many came at a time.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int

from jaxlm.attention.layer_view import LayerView
from jaxlm.attention.mask import AttentionMask
from jaxlm.model.config import ModelConfig
from jaxlm.registry import Registry, text_of

ROWS_AND_HEADS = ("batch", "kv_heads")


@runtime_checkable
class KVCache(Protocol):
    """Keys and values of all layers. B batch."""

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row so far."""
        ...

    @property
    def axes(self) -> tuple[str | None, str | None]:
        """Logical names (`jaxlm.sharding.mesh.RULES`) of its axes of rows and of kv heads, axes 1
        and 2 of arrays by layer, 0 of the others; None where a mesh may not cut it.
        """
        ...

    @property
    def mask(self) -> AttentionMask | None:
        """What it keeps for each query; None: all."""
        ...

    @property
    def appendable(self) -> Int[Array, "B"] | None:
        """How many tokens may be appended to each row before what is kept changes its form; None:
        any number. A draft's tokens, which see the cache as it is at the root, go no deeper.
        """
        ...

    def layer(self, index: int | Int[Array, ""]) -> LayerView:
        """What a layer attends to."""
        ...

    def commit(
        self,
        kv: tuple[Array, ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> KVCache:
        """With T more tokens a row; those of segment 0 are padding, come last and are left out.

        Args:
            kv: keys and values [layers, batch, length, kv_heads, head_dim].
        """
        ...

    def reorder(self, rows: Int[Array, "R"]) -> KVCache:
        """Row i becomes what row `rows[i]` was, of any number of rows."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of what they need to be read: scales, sums."""
        ...


@dataclasses.dataclass(frozen=True)
class CacheKind(abc.ABC):
    """Settings of a cache; the text form is `name(option=value)`."""

    name: ClassVar[str] = ""

    @abc.abstractmethod
    def init(self, config: ModelConfig, batch: int, capacity: int) -> Any:
        """An empty cache for sequences of up to `capacity` tokens, in the config's dtype.

        Raises:
            ValueError: capacity below 1, or a model that this cache cannot serve.
        """

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether there is room for sequences that have these lengths and nothing in common."""
        return True

    def nbytes_of(self, config: ModelConfig, batch: int, capacity: int) -> int:
        """Bytes that `init` would take."""
        found = 0

        def make() -> None:  # of a traced cache, which takes none
            nonlocal found
            found = self.init(config, batch, capacity).nbytes

        jax.eval_shape(make)
        return found

    def __str__(self) -> str:
        """The text that `caches.parse` turns back into equal settings."""
        return text_of(self)


CACHES = Registry("cache", CacheKind)
