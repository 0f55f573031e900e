"""Mistral: Llama with a sliding window in every layer (7B v0.1) or in none."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig, layer_pattern


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    fields = llama_like.model(config)
    fields["attention"] |= layer_pattern(config, ("sliding",))
    return fields


FAMILY = Family(("MistralForCausalLM",), model, llama_like.rows)
