"""LM-Infinite: a Λ-shaped mask and a ceiling on distance, around any relative encoding.

No parameters and no training: it goes onto a trained model when its input grows past the length it
was trained at. (Han et al. 2024, arXiv 2308.16137, section 4.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from absl import logging

from jaxlm.attention.mask import AttentionMask, lambda_shaped
from jaxlm.positions.by_kind import ByKind
from jaxlm.positions.encoding import MAX_POSITION, Dimensions, PositionEncoding, require
from jaxlm.positions.registry import available, kind, register
from jaxlm.positions.rope import RoPE


def _wrappable() -> str:
    """Names of the encodings that depend on distance alone."""
    return ", ".join(n for n in available() if n != "lm_infinite" and kind(n).relative)


@functools.cache  # models are bound more than once; each pair is told once
def _warn_of_many_sinks(num_sinks: int, window: int) -> None:
    logging.warning(
        "lm_infinite: num_sinks=%d with window=%d: most of what is seen are first tokens; "
        "usual: num_sinks < window",
        num_sinks,
        window,
    )


@register
@dataclasses.dataclass(frozen=True)
class LMInfinite(PositionEncoding):
    """Token i sees the last `window` tokens and the first `num_sinks`, none farther than
    `ceiling_distance`.

    For the rope family a key at or past the ceiling is met as at the ceiling: the query rotated to
    position `ceiling_distance`, the key unrotated. For score biases the distance is
    min(i - j, ceiling_distance).

    Attributes:
        inner: the encoding that is wrapped; None is rope, or the trained model's own where
            `Transformer.with_position_encoding` puts it on one.
        window: None is the model's context length.
        num_sinks: kept first tokens; the authors use 10 for retrieval, 100 for perplexity.
        ceiling_distance: None is `window`, the paper's choice.
        mask: False leaves all keys visible and only clamps distances: one of the paper's factors
            alone, for studies.
    """

    inner: PositionEncoding | None = None
    window: int | None = None
    num_sinks: int = 10
    ceiling_distance: int | None = None
    mask: bool = True

    name: ClassVar[str] = "lm_infinite"

    @property
    def wrapped(self) -> PositionEncoding:
        """The inner encoding."""
        return RoPE() if self.inner is None else self.inner

    @property
    def caches_unrotated(self):
        """As the inner encoding does: what few keys are met at the ceiling are turned back."""
        return self.wrapped.caches_unrotated

    @property
    def max_length(self):
        """The inner encoding's."""
        return self.wrapped.max_length

    @property
    def ceiling(self):
        """Distances at or above it count as this distance."""
        return self.ceiling_distance

    @property
    def changes_scores(self):
        """As the inner encoding does."""
        return self.wrapped.changes_scores

    @property
    def score_form(self):
        """The inner encoding's."""
        return self.wrapped.score_form

    def around(self, here: PositionEncoding) -> PositionEncoding:
        """Put on a model with the encoding `here`: it takes the place of an `lm_infinite` that is
        there, and layers with a sliding encoding of their own, which see no farther than their
        window, keep it.
        """
        if isinstance(here, ByKind):
            return dataclasses.replace(here, full=self.around(here.full))
        inner = here.wrapped if isinstance(here, LMInfinite) else here
        return dataclasses.replace(self, inner=inner)

    def bind(self, dims: Dimensions) -> LMInfinite:
        """Fills window and ceiling, and refuses encodings that are not relative."""
        inner = self.wrapped
        nested = isinstance(inner, LMInfinite)
        require(
            isinstance(inner, PositionEncoding) and inner.relative and not nested,
            "lm_infinite: inner",
            str(inner),
            f"a relative encoding ({_wrappable()}): the method needs distances",
        )
        window = dims.context_length if self.window is None else self.window
        ceiling = window if self.ceiling_distance is None else self.ceiling_distance
        sinks, most = self.num_sinks, MAX_POSITION
        require(1 <= window <= most, "lm_infinite: window", window, f"an integer in [1, {most}]")
        require(0 <= sinks <= most, "lm_infinite: num_sinks", sinks, f"an integer in [0, {most}]")
        allowed = f"an integer in [window={window}, {most}]"
        require(window <= ceiling <= most, "lm_infinite: ceiling_distance", ceiling, allowed)
        if self.mask and sinks >= window:
            _warn_of_many_sinks(sinks, window)
        return dataclasses.replace(
            self, inner=inner.bind(dims), window=window, ceiling_distance=ceiling
        )

    def parameters(self, dims):
        """The inner encoding's."""
        return self.wrapped.parameters(dims)

    def rotation(self, positions, lengths, head_dim):
        """The inner encoding's, at true positions. A scaling that looks at the document's length
        finds no more than the distances that occur: near and far keys must turn alike.
        """
        assert self.ceiling_distance is not None
        seen = jnp.minimum(lengths, self.ceiling_distance + 1)
        return self.wrapped.rotation(positions, seen, head_dim)

    def rotate_queries(self, q, rotation):
        """The inner encoding's."""
        return self.wrapped.rotate_queries(q, rotation)

    def rotate_keys(self, k, rotation):
        """The inner encoding's."""
        return self.wrapped.rotate_keys(k, rotation)

    def unrotate_keys(self, k, rotation):
        """The inner encoding's."""
        return self.wrapped.unrotate_keys(k, rotation)

    def head_parameters(self, params, num_heads):
        """The inner encoding's."""
        return self.wrapped.head_parameters(params, num_heads)

    def score(self, head, scores, distance, q_positions):
        """The inner encoding's; attention hands it the clamped distance."""
        return self.wrapped.score(head, scores, distance, q_positions)

    def restrict(self, mask: AttentionMask) -> AttentionMask:
        """The Λ mask, within the model's own."""
        assert self.window is not None
        return mask & lambda_shaped(self.window, self.num_sinks) if self.mask else mask

    def far_queries(self, q):
        """As at position `ceiling_distance`."""
        rotation = self._rotation_at(self.ceiling_distance, q.shape[-1])
        return None if rotation is None else self.wrapped.rotate_queries(q, rotation)

    def far_keys(self, k):
        """As at position 0."""
        rotation = self._rotation_at(0, k.shape[-1])
        return None if rotation is None else self.wrapped.rotate_keys(k, rotation)

    def _rotation_at(self, position, head_dim):
        assert self.ceiling_distance is not None
        at = jnp.asarray([[position]], jnp.int32)
        lengths = jnp.asarray([[self.ceiling_distance + 1]], jnp.int32)
        return self.wrapped.rotation(at, lengths, head_dim)
