"""The way back of jaxlm.model.layouts: tests set and read parameters layer by layer in the unrolled
layout, and hold both to one result.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxlm.model.config import ModelConfig


def stack_layers(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Parameters in the layout of `numerics.scan_layers=True`: the inverse of `unroll_layers`; what
    is stacked is NumPy's, so that nothing is compiled.

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
                lambda *a: np.stack(a), *(blocks[f"block_{j}"] for j in range(i, scanned, period))
            )
            for i in range(period)
        }
    if scanned < config.num_layers:
        made["last_layers"] = {
            f"block_{i - scanned}": blocks[f"block_{i}"] for i in range(scanned, config.num_layers)
        }
    return made
