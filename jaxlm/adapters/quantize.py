"""Matrices in 8 or 4 bits, by qwix: less memory for a frozen model below an adapter, and faster
decoding, which is reading weights.

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
from jaxlm.model.quantized import scale_name

# Of int4: inputs that share a scale. int8 has one for every output.
BLOCK = 32
TYPES = {"int8": jnp.int8, "int4": jnp.int4}


def check_kind(kind: str) -> None:
    """Raises ValueError unless it is a key of TYPES."""
    if kind not in TYPES:
        raise ValueError(f"quantize={kind!r}; allowed: {', '.join(TYPES)}")


def quantize_params(params: Any, kind: str, tables: bool = False) -> dict[str, Any]:
    """The parameters with every projection's matrix quantized; the rest stays.

    What belongs to no projection (norms, biases, experts' matrices) keeps its dtype.

    Args:
        params: nested dict of arrays.
        kind: "int8", a scale for each output, or "int4", one for each output and block of inputs.
        tables: the embedding, a scale or several for each token, and an untied head too.

    Raises:
        ValueError: qwix is not installed (extra "hf"), or another kind.
    """
    check_kind(kind)

    def quantized(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made = {
            name: quantized(value, (*path, name)) if isinstance(value, Mapping) else value
            for name, value in tree.items()
        }
        for name in tree:
            inputs = _inputs(name, tree[name], path, tables)
            if inputs is not None and scale_name(name) not in tree:
                made[name], made[scale_name(name)] = _quantized(tree[name], inputs, kind)
        return made

    return quantized(params, ())


def _inputs(name: str, matrix: Any, path: tuple[str, ...], tables: bool) -> range | None:
    """Which axes are contracted with what comes in; None: it is not to be quantized."""
    if name == "kernel":
        first = int("layers" in path)
        return range(first, first + kernel_inputs(path, matrix.ndim - first))
    return {"embedding": range(1, 2), "head": range(1)}.get(name) if tables else None


def _quantized(matrix: Array, inputs: range, kind: str) -> tuple[Array, Array]:
    """(integers, float32 scales)."""
    alone = [i for i in range(matrix.ndim) if i not in inputs]
    blocks: dict[int, int] = {}
    if kind == "int4":
        # The innermost inputs lie side by side; of the outer ones (heads) each is apart.
        last = inputs[-1]
        inner = matrix.shape[last]
        blocks = {last: BLOCK if inner % BLOCK == 0 else inner}
        alone += inputs[:-1]
    made = optional("qwix", "quantized weights").quantize(
        matrix.astype(jnp.float32), TYPES[kind], channelwise_axes=alone, tiled_axes=blocks
    )
    return made.qvalue, made.scale
