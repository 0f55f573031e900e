"""Qwen 3: norms of queries and keys, no biases."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.families.qwen2 import slides
from jaxlm.interop.family import Family, HubConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    fields = llama_like.model(config)
    fields["attention"]["qk_norm"] = "head"
    slides(config, fields)
    return fields


FAMILY = Family(("Qwen3ForCausalLM",), model, llama_like.rows)
