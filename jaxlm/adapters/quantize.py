"""Matrices of a frozen model in 8 or 4 bits, by qwix: what an adapter needs less memory on.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) without its normal-float type: symmetric integers,
rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.data.optional import optional
from jaxlm.model.parameters import kernel_inputs
from jaxlm.model.quantized import SCALE

# Of int4: inputs that share a scale. int8 has one for every output.
BLOCK = 32
TYPES = {"int8": jnp.int8, "int4": jnp.int4}


def quantize_params(params: Any, kind: str) -> dict[str, Any]:
    """The parameters with every projection's matrix quantized; the rest stays.

    What belongs to no projection (embeddings, the head, experts' matrices) keeps its dtype.

    Args:
        params: nested dict of arrays.
        kind: "int8", a scale for each output, or "int4", one for each output and block of inputs.

    Raises:
        ValueError: qwix is not installed (extra "hf"), or another kind.
    """
    if kind not in TYPES:
        raise ValueError(f"quantize={kind!r}; allowed: {', '.join(TYPES)}")

    def quantized(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made = {
            name: quantized(value, (*path, name)) if isinstance(value, Mapping) else value
            for name, value in tree.items()
        }
        if "kernel" in tree:
            made["kernel"], made[SCALE] = _quantized(tree["kernel"], path, kind)
        return made

    return quantized(params, ())


def _quantized(kernel: Array, path: tuple[str, ...], kind: str) -> tuple[Array, Array]:
    """(integers, float32 scales)."""
    first = int("layers" in path)
    last = first + kernel_inputs(path, kernel.ndim - first)
    alone = [i for i in range(kernel.ndim) if not first <= i < last]
    blocks: dict[int, int] = {}
    if kind == "int4":
        # The innermost inputs lie side by side; of the outer ones (heads) each is apart.
        inner = kernel.shape[last - 1]
        blocks = {last - 1: BLOCK if inner % BLOCK == 0 else inner}
        alone += range(first, last - 1)
    made = optional("qwix", "quantized weights").quantize(
        kernel.astype(jnp.float32), TYPES[kind], channelwise_axes=alone, tiled_axes=blocks
    )
    return made.qvalue, made.scale
