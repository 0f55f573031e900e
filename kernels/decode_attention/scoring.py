"""Which cached keys a row of queries sees and what their scores become, by position alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·LOG2_E), and TPUs have an exp2
EMPTY = jnp.iinfo(jnp.int32).max  # position of a slot that no query sees


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The static description of a call.

    A key is seen if its position is at most the query's, and if it is one of the last `window`
    (None: all) or its position is below `num_sinks`.

    Attributes:
        scale: multiplies q·k.
        softcap: scores become softcap·tanh(scores / softcap), before ALiBi; None: they don't.
        window, num_sinks: see above.
        segments: whether a query sees keys of its own segment only.
        alibi: whether scores fall by slope·distance.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    num_sinks: int = 0
    segments: bool = False
    alibi: bool = False

    def __call__(
        self, dots: jax.Array, rows: jax.Array, keys: jax.Array, slopes: jax.Array | None
    ) -> jax.Array:
        """Scores in base 2: exp2 of them is exp of the scores; -inf where a key is hidden.

        Args:
            dots: q·k, float32 [R, W].
            rows: int32 [R, 1 or 2]: position and, with segments, segment of each row's query.
            keys: int32 [1 or 2, W]: position and, with segments, segment of each key.
            slopes: float32 [R, 1] with ALiBi.
        """
        q, k = rows[:, :1], keys[:1]
        distance = q - k
        seen = distance >= 0
        if self.window is not None:
            near = distance < self.window
            seen &= (near | (k < self.num_sinks)) if self.num_sinks else near
        if self.segments:
            seen &= rows[:, 1:] == keys[1:]
        if self.softcap is None:
            scores = dots * (self.scale * LOG2_E)
        else:
            scores = (self.softcap * LOG2_E) * jnp.tanh(dots * (self.scale / self.softcap))
        if slopes is not None:
            scores -= (slopes * LOG2_E) * distance.astype(jnp.float32)
        return jnp.where(seen, scores, -jnp.inf)
