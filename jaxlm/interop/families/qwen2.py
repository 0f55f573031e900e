"""Qwen 2 and 2.5: biases on queries, keys and values; some layers may slide."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Fixed, Layers, layer_fields, layer_types
from jaxlm.interop.hub_config import HubConfig
from jaxlm.model.config import ModelConfig


def read_layers(config: HubConfig) -> dict[str, Any]:
    """The window counts only where use_sliding_window says so, and from max_window_layers on."""
    layers = config.require("num_hidden_layers", int)
    first = min(max(config.get("max_window_layers", 28, int), 0), layers)
    listed = Layers(("global",), listed=True).read(config)
    if not config.get("use_sliding_window", False, bool):
        return layer_fields(["global"], None)
    if config.get("layer_types") is not None:
        return listed
    kinds = ["global"] * first + ["sliding"] * (layers - first)
    return layer_fields(kinds, config.get("sliding_window", None, int))


def write_layers(config: ModelConfig) -> dict[str, Any]:
    """The layers one by one, which says max_window_layers as well."""
    kinds = layer_types(config)
    return {
        "use_sliding_window": config.attention.sliding_window is not None,
        "sliding_window": config.attention.sliding_window,
        "layer_types": kinds,
        "max_window_layers": kinds.count("full_attention"),
    }


LAYERS = Derived(read_layers, write_layers)
FIELDS = (
    *llama_like.BARE,
    Fixed("attention.qkv_bias", True),
    Fixed("attention.out_bias", False),
    LAYERS,
)
WINDOW = {"sliding_window": 4096}
ABSENT = WINDOW | {"num_key_value_heads": 32}
FAMILY = Family(("Qwen2ForCausalLM",), "qwen2", FIELDS, llama_like.rows, absent=ABSENT)
