"""StarCoder 2: Llama's names with LayerNorm, biases and a plain MLP."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig, activation, layer_pattern
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    bias = config.get("use_bias", True)
    return {
        **llama_like.sizes(config),
        "attention": {
            "num_heads": config.require("num_attention_heads"),
            "num_kv_heads": config.require("num_key_value_heads"),
            "qkv_bias": bias,
            "out_bias": bias,
            **layer_pattern(config, ("sliding",)),
        },
        "feed_forward": {
            "d_ff": config.require("intermediate_size"),
            "kind": activation(config, False),
            "bias": bias,
        },
        "norm": {"kind": "layernorm", "epsilon": config.require("norm_epsilon"), "bias": True},
        "embedding": {"tied": config.get("tie_word_embeddings", True)},
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.feed_forward_rows(config, {"up": "c_fc", "down": "c_proj"}),
    ]


FAMILY = Family(("Starcoder2ForCausalLM",), model, rows)
