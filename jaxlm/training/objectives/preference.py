"""Direct preference optimization: the better answer of two made more probable than the other.

DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7). Rows hold pairs of segments: 1 and 2 are
the chosen and the rejected answer of a pair, 3 and 4 those of the next, ….
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.model.low_rank import LORA
from jaxlm.model.partition import split
from jaxlm.model.scores import token_scores
from jaxlm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Preference:
    """The objective of a run over pairs.

    Attributes:
        model: whose parameters are learned.
        beta: how far the model may go from the reference; smaller is farther.
        chunk: positions of every row whose logits exist at one time.
    """

    model: Transformer
    beta: float
    chunk: int

    def weight(self, batch: Mapping[str, Array]) -> Float[Array, ""]:
        """How many pairs a batch holds."""
        return _present(batch).sum().astype(jnp.float32)

    def __call__(
        self, params: Any, reference: Any, batch: Mapping[str, Array], rngs: Any = None
    ) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, ""]], Float[Array, ""]]]:
        """(the loss summed over pairs, (sums of what is reported, 0)).

        Args:
            params: all of the model's.
            reference: those of the model that answers are compared with, from which adapters are
                taken off; no gradient.
            batch: arrays [batch, length] of packed pairs.
            rngs: of dropout; the reference has none.
        """
        own = segment_log_probs(self.model, params, batch, self.chunk, rngs)
        plain, _ = split(reference, lambda path: LORA not in path)
        other = segment_log_probs(self.model, jax.lax.stop_gradient(plain), batch, self.chunk)
        # [batch, pairs]: how much more the model has moved towards the chosen answer.
        gain = own - other
        margin = self.beta * (gain[:, 0::2] - gain[:, 1::2])
        present = _present(batch)
        loss = jnp.where(present, -jax.nn.log_sigmoid(margin), 0.0).sum()
        sums = {
            "loss": loss,
            "margin": jnp.where(present, margin, 0.0).sum(),
            "accuracy": (present & (margin > 0)).sum().astype(jnp.float32),
        }
        return loss, (sums, jnp.zeros((), jnp.float32))


def _num_segments(length: int) -> int:
    """An even number that a row of this length cannot exceed."""
    return length + length % 2


def _present(batch: Mapping[str, Array]) -> Array:
    """Which pairs there are, bool [batch, pairs]."""
    segments = batch["segment_ids"]
    pairs = 2 * jnp.arange(1, _num_segments(segments.shape[1]) // 2 + 1)
    return segments.max(1, keepdims=True) >= pairs[None]


def segment_log_probs(
    model: Transformer,
    params: Any,
    batch: Mapping[str, Array],
    chunk: int,
    rngs: Any = None,
) -> Float[Array, "B S"]:
    """Σ weight·log p(target) of every segment of packed rows; S is the most that a row can hold."""
    hidden, _ = model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden",
        rngs=rngs,
    )
    log_probs = token_scores(model, params, hidden, batch["targets"], chunk)[0]
    log_probs = log_probs * batch["loss_weights"]
    T = hidden.shape[1]

    def by_segment(x: Float[Array, "T"], segments: Int[Array, "T"]) -> Float[Array, "S"]:
        return jax.ops.segment_sum(x, segments, _num_segments(T) + 1)[1:]

    return jax.vmap(by_segment)(log_probs, batch["segment_ids"])
