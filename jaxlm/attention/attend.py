"""The one door to attention: picks the implementation by name or by platform."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float

from jaxlm.attention.blockwise import attend_blockwise
from jaxlm.attention.flash import attend_flash, unsupported
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference

Implementation = Callable[[AttentionSpec, AttentionInputs], tuple[Array, Array]]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "blockwise": attend_blockwise,
    "flash": attend_flash,
    "reference": attend_reference,
}


def attend(
    spec: AttentionSpec, x: AttentionInputs, implementation: str = "auto"
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention.

    Args:
        spec: the static description.
        x: the arrays.
        implementation: "flash" (TPU kernels), "blockwise", "reference", or "auto": where queries
            and keys are the same tokens in order (`spec.aligned`) flash on a TPU for what its
            kernels do, else blockwise; otherwise flash, else the reference form. Attention to a KV
            cache has a door of its own, `jaxlm.attention.layer_view`.

    Returns:
        The output [batch, length, heads, head_dim] in q's dtype and the float32 log-sum-exp of the
        visible scores [batch, length, heads], by which two partial attentions can be merged.

    Raises:
        ValueError: unknown implementation, or one that cannot do what the call needs.
    """
    if implementation == "auto":
        others = "blockwise" if spec.aligned else "reference"
        implementation = "flash" if unsupported(spec, x) is None else others
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation={implementation!r}; allowed: {allowed}")
    return IMPLEMENTATIONS[implementation](spec, x)
