"""Two layouts of the layers' parameters, scanned and unrolled, and the way from one to the other.

    scanned    layers/block_i: layer i of every repetition of the layer pattern, stacked on axis 0;
               last_layers/block_i: the rest, where the depth is no multiple of the pattern
    unrolled   last_layers/block_i: every layer

One loop over stacked layers compiles quickly at any depth. But at each turn it cuts a layer out of
the stack, which XLA copies on a CPU: a step of decoding, which does little else than read weights,
takes twice as long as with layers that are apart.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxlm.model.config import ModelConfig


def num_scanned(config: ModelConfig) -> int:
    """How many layers, the first ones, are run by one loop."""
    period = len(config.attention.layer_pattern)
    return config.num_layers // period * period if config.numerics.scan_layers else 0


def stack_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Of how many layers each array of a cache is: all of the loop, then each of the others."""
    scanned = num_scanned(config)
    apart = (1,) * (config.num_layers - scanned)
    return (scanned, *apart) if scanned else apart


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
