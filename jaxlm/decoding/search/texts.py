"""What a search over several texts of a prompt carries, and how texts end in it.

The rules are those of Hugging Face's `generate`, so that texts and scores agree with it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The score of what is no candidate: finite, so that a sum with it is a number. Sums of
# log-probabilities never come near it; divided by a power of a length they may.
NEVER = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """W texts of each of N prompts, of up to M tokens.

    Attributes:
        tokens: drawn so far.
        scores: what they are ranked by.
        log_probs: of the tokens, summed.
        lengths: in tokens, a stop token included; 0: no text.
    """

    tokens: Int[Array, "N W M"]
    scores: Float[Array, "N W"]
    log_probs: Float[Array, "N W"]
    lengths: Int[Array, "N W"]

    @classmethod
    def none(cls, N: int, W: int, M: int) -> Texts:
        """No text yet."""
        zeros = jnp.zeros((N, W))
        tokens = jnp.zeros((N, W, M), jnp.int32)
        return cls(tokens, zeros - jnp.inf, zeros, jnp.zeros((N, W), jnp.int32))

    @property
    def there(self) -> Bool[Array, "N W"]:
        """Which are texts."""
        return self.lengths > 0

    def take(self, index: Int[Array, "N K"]) -> Texts:
        """Those at `index`."""
        rows = jnp.arange(index.shape[0])[:, None]
        return jax.tree.map(lambda a: a[rows, index], self)


EARLY_STOPPING = (False, True, "never")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ending:
    """When a search is over; arrays, so that other settings need no other program.

    Attributes:
        length_penalty: a finished text's score is its sum divided by its length to this power.
        early_stopping: which of `EARLY_STOPPING`. True: as soon as W texts are finished; False:
            once no text that goes on would beat the worst of them if it ended now; "never": nor if
            it ended at the limit.
    """

    length_penalty: Float[Array, ""]
    early_stopping: Int[Array, ""]

    def score(self, sums: Float[Array, "*any"], length: Int[Array, ""]) -> Float[Array, "*any"]:
        """Of texts that end with `length` tokens."""
        return sums / length.astype(jnp.float32) ** self.length_penalty

    def leaves_open(
        self, running: Texts, finished: Texts, length: Int[Array, ""], limit: int
    ) -> Bool[Array, "N"]:
        """Whether better texts may still come than those in `finished`; both are best first."""
        full = finished.there.all(1)
        late = (self.early_stopping == EARLY_STOPPING.index("never")) & (self.length_penalty > 0)
        best = self.score(running.scores[:, 0], jnp.where(late, limit, length))
        better = (best > finished.scores[:, -1]) & (
            self.early_stopping != EARLY_STOPPING.index(True)
        )
        return ~full | better


def merged(finished: Texts, ended: Texts) -> Texts:
    """The best of both, best first, as many as there were."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), finished, ended)
    return both.take(jax.lax.top_k(both.scores, finished.scores.shape[1])[1])
