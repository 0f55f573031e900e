"""What the model knows of a cache: something of each layer that new tokens attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec

# Kept keys [B, S, K, H] and their positions [B, S] → as they are met.
NearKeys = Callable[[Array, Array], Array]
# The same → as they are met at the distance ceiling; None: as ever.
FarKeys = Callable[[Array, Array], Array | None]


@runtime_checkable
class LayerView(Protocol):
    """One layer of a KV cache; a pytree."""

    def attend(
        self,
        spec: AttentionSpec,
        new: AttentionInputs,
        near_keys: NearKeys | None = None,
        far_keys: FarKeys | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of T new queries to [cache ‖ new tokens], one softmax over both.

        Args:
            spec: the static description.
            new: the new tokens attending to each other.
            near_keys: how the cache's keys are met; None: as they are kept.
            far_keys: how they are met at the distance ceiling, if that is otherwise: needed where
                `new` has `q_far`.

        Returns:
            [batch, length, heads, head_dim] in q's dtype.
        """
        ...
