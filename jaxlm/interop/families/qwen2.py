"""Qwen 2 and 2.5: biases on queries, keys and values; some layers may slide."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig


def slides(config: HubConfig, fields: dict[str, Any]) -> None:
    """Puts the layers' kinds right: the window counts only where use_sliding_window says so."""
    first = config.get("max_window_layers", 0)
    attention = fields["attention"]
    if not config.get("use_sliding_window", False):
        attention |= {"layer_pattern": ("global",), "sliding_window": None}
    elif config.get("layer_types") is None:
        layers, window = fields["num_layers"], config.require("sliding_window")
        kinds = ("global",) * first + ("sliding",) * (layers - first)
        attention |= {"layer_pattern": kinds, "sliding_window": window}


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    fields = llama_like.model(config)
    fields["attention"]["qkv_bias"] = True
    slides(config, fields)
    return fields


FAMILY = Family(("Qwen2ForCausalLM",), model, llama_like.rows)
