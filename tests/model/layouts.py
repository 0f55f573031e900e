"""Two layouts of the layers' parameters, scanned and unrolled, and the way between them.

    scanned    layers/block_i: layer i of every repetition of the layer pattern, stacked on axis 0;
               last_layers/block_i: the rest, where the depth is no multiple of the pattern
    unrolled   last_layers/block_i: every layer

Tests set and read parameters layer by layer in the unrolled one, and hold both to one result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.config import ModelConfig


def unroll_layers(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Parameters in the layout of `numerics.scan_layers=False`.

    Args:
        config: of the model; its `scan_layers` is not read.
        params: in the scanned layout.
    """
    period = len(config.attention.layer_pattern)
    scanned = config.num_layers // period * period
    rest = {n: v for n, v in params.items() if n not in ("layers", "last_layers")}
    blocks = {}
    for i in range(scanned):
        stacked = params["layers"][f"block_{i % period}"]
        blocks[f"block_{i}"] = jax.tree.map(lambda a, i=i: a[i // period], stacked)
    for i in range(scanned, config.num_layers):
        blocks[f"block_{i}"] = params["last_layers"][f"block_{i - scanned}"]
    return {**rest, "last_layers": blocks}


def stack_layers(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Parameters in the layout of `numerics.scan_layers=True`: the inverse of `unroll_layers`.

    Args:
        config: of the model; its `scan_layers` is not read.
        params: in the unrolled layout.
    """
    period = len(config.attention.layer_pattern)
    rounds = config.num_layers // period
    scanned = rounds * period
    blocks = params["last_layers"]
    made = {n: v for n, v in params.items() if n != "last_layers"}
    if rounds:
        made["layers"] = {
            f"block_{i}": jax.tree.map(
                lambda *a: jnp.stack(a), *(blocks[f"block_{j}"] for j in range(i, scanned, period))
            )
            for i in range(period)
        }
    if scanned < config.num_layers:
        made["last_layers"] = {
            f"block_{i - scanned}": blocks[f"block_{i}"] for i in range(scanned, config.num_layers)
        }
    return made
