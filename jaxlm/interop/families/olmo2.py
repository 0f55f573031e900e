"""OLMo 2: norms after the sublayers, queries and keys normed over all heads."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    fields = llama_like.model(config)
    fields["attention"]["qk_norm"] = "full"
    fields["norm"]["placement"] = "post"
    return fields


FAMILY = Family(("Olmo2ForCausalLM",), model, llama_like.rows)
