"""Attention on one device of a mesh, within `jax.shard_map`: what the context forms are made of."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxlm.attention import blockwise, flash
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec


def attend_local(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention of the tokens here: by kernels where they do it, else blockwise."""
    if flash.unsupported(spec, x) is None:
        return flash.attend_here(spec, x)
    return blockwise.attend_here(spec, x)
