"""StableLM: Llama with LayerNorm, and only a part of each head rotated."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields.

    Raises:
        ValueError: norms of queries and keys, each head with a scale of its own.
    """
    config.only("qk_layernorm", False)
    norm = {"kind": "layernorm", "epsilon": config.require("layer_norm_eps"), "bias": True}
    fields = llama_like.model(config, norm=norm)
    fields["attention"]["qkv_bias"] = config.get("use_qkv_bias", False)
    if config.get("use_parallel_residual", False):
        fields["feed_forward"]["parallel"] = "shared"
    # The share that the configs of transformers 4 leave out.
    given = config.get("rope_parameters", {}), config.get("partial_rotary_factor")
    if given[0].get("partial_rotary_factor") is None and given[1] is None:
        encoding = dataclasses.replace(fields["position_encoding"], fraction=0.25)
        fields["position_encoding"] = encoding
    return fields


FAMILY = Family(("StableLmForCausalLM",), model, llama_like.rows)
