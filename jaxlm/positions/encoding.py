"""What a position encoding is: at most four answers, each silent where it has nothing to say.

| question                                | method                          | who answers         |
| --------------------------------------- | ------------------------------- | ------------------- |
| what is added to the embeddings?        | `embed`                         | learned, sinusoidal |
| how are queries and keys transformed?   | `rotation`, `rotate_queries`, … | the rope family     |
| what happens to a score?                | `bias` (or `score`)             | alibi, t5, fire, …  |
| which keys take part, at what distance? | `restrict`, `ceiling`, `far_…`  | lm_infinite         |

An encoding is a frozen dataclass of plain numbers: hashable, comparable, printable as the text that
`positions.parse` reads back. Learned values live in the model's parameters under the names that
`parameters` gives, so swapping the encoding leaves every other parameter as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Float, Int

from jaxlm.attention.mask import AttentionMask
from jaxlm.registry import text_of
from kernels.flash_attention import Fire

# Bounds on options: what counts as finite, with room for float32 arithmetic, and how far positions
# reach, with room for sums of two in int32.
LARGE = 1e30
MAX_POSITION = 2**30


class Dimensions(NamedTuple):
    """The sizes of the model that an encoding may depend on."""

    num_heads: int
    head_dim: int
    d_model: int
    context_length: int


class Parameter(NamedTuple):
    """A learned array: shape, initializer `(key, shape, dtype) -> array`, names of its axes."""

    shape: tuple[int, ...]
    init: Callable[..., Array]
    axes: tuple[str | None, ...]


class Rotation(NamedTuple):
    """Per token and rotated pair: cosine, sine, and for xPos the factor of queries (or None)."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]
    scale: Float[Array, "B T R"] | None = None


@dataclasses.dataclass(frozen=True)
class PositionEncoding:
    """The base: no encoding at all. Subclasses override the answers they have.

    Class attributes:
        name: the registry's name.
        relative: scores depend on positions only through the distance i - j. Only these can be
            wrapped by `lm_infinite`.
    """

    name: ClassVar[str] = ""
    relative: ClassVar[bool] = True

    @property
    def caches_unrotated(self) -> bool:
        """Whether a cache must keep keys unrotated: they are met in more than one rotation."""
        return False

    @property
    def two_sided(self) -> bool:
        """Whether it tells keys after the query as well, which bidirectional layers need."""
        return False

    @property
    def max_length(self) -> int | None:
        """The first position that has no encoding, or None if there is none."""
        return None

    @property
    def ceiling(self) -> int | None:
        """Distances at or above it count as this distance; None: no ceiling."""
        return None

    @property
    def changes_scores(self) -> bool:
        """Whether `score` does anything: a kernel leaves it out otherwise."""
        return False

    @property
    def score_form(self) -> str | None:
        """What `score` is, for kernels that do not call it: "bias" adds what depends on the head
        and the distance alone, "slope" does so by -head_parameters·distance, "factor" multiplies
        by such a number, "network" is `network`; None: something else.
        """
        return "bias" if self.changes_scores and self.relative else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that have an encoding of their own; the others have the first's."""
        return ("global",)

    def of_kind(self, kind: str) -> PositionEncoding:
        """The encoding of layers of this kind, which answers all questions but the first."""
        del kind
        return self

    def bind(self, dims: Dimensions) -> PositionEncoding:
        """Fills defaults that depend on the model and checks the rest.

        Raises:
            ValueError: this encoding cannot be used with these dimensions.
        """
        del dims
        return self

    def parameters(self, dims: Dimensions) -> Mapping[str, Parameter]:
        """The learned arrays, by name."""
        del dims
        return {}

    def embed(
        self, params: Mapping[str, Array], x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Adds to the token embeddings."""
        del params, positions
        return x

    def rotation(
        self, positions: Int[Array, "B T"], lengths: Int[Array, "B #T"], head_dim: int
    ) -> Rotation | None:
        """The angles of tokens at `positions`; None: no rotation.

        `lengths` counts the tokens of each token's own context: a row may hold several documents.
        """
        del positions, lengths, head_dim
        return None

    def rotate_queries(
        self, q: Float[Array, "B T N H"], rotation: Rotation | None
    ) -> Float[Array, "B T N H"]:
        """Queries by their rotation."""
        del rotation
        return q

    def rotate_keys(
        self, k: Float[Array, "B S K H"], rotation: Rotation | None
    ) -> Float[Array, "B S K H"]:
        """Keys by their rotation."""
        del rotation
        return k

    def unrotate_keys(
        self, k: Float[Array, "B S K H"], rotation: Rotation | None
    ) -> Float[Array, "B S K H"]:
        """What `rotate_keys` was given, up to rounding, from what it gave."""
        del rotation
        return k

    def head_parameters(self, params: Mapping[str, Array], num_heads: int) -> Any:
        """What `score` needs to know of each head: a pytree of float32 arrays [num_heads, ...]."""
        del params, num_heads
        return ()

    def bias(
        self, head: Any, distance: Int[Array, "T S"], q_positions: Int[Array, "T 1"]
    ) -> Float[Array, "T S"]:
        """What is added to one head's scores at `distance` = query position - key position.

        Only visible pairs count; the value elsewhere (distance < 0, unless it is `two_sided`) must
        merely be finite.
        """
        raise NotImplementedError

    def score(
        self,
        head: Any,
        scores: Float[Array, "T S"],
        distance: Int[Array, "T S"],
        q_positions: Int[Array, "T 1"],
    ) -> Float[Array, "T S"]:
        """One head's scores (float32) after the encoding; kernels evaluate it tile by tile."""
        return scores + self.bias(head, distance, q_positions)

    def network(
        self, heads: Any, distance: Int[Array, "D"], q_positions: Int[Array, "B T"]
    ) -> Fire:
        """The score's network, if its form is that; `heads` is what `head_parameters` gives. The
        numerator is that of `distance`, in ascending order.
        """
        raise NotImplementedError

    def restrict(self, mask: AttentionMask) -> AttentionMask:
        """The model's mask narrowed to the keys that take part."""
        return mask

    def far_queries(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"] | None:
        """Unrotated queries → as they meet keys at the distance ceiling; None: as ever."""
        del q
        return None

    def far_keys(self, k: Float[Array, "B S K H"]) -> Float[Array, "B S K H"] | None:
        """Unrotated keys → as they are met at the distance ceiling; None: as ever."""
        del k
        return None

    def __str__(self) -> str:
        """The text that `positions.parse` turns back into an equal encoding."""
        return text_of(self)


def require(condition: bool, what: str, value: Any, allowed: str) -> None:
    """Raises ValueError with the field, the value and what is allowed, unless `condition`."""
    if not condition:
        raise ValueError(f"{what}={value!r}; allowed: {allowed}")
