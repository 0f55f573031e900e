"""GPT-2: learned positions, LayerNorm, and matrices stored inputs first."""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import Family, HubConfig, activation
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "transformer.h.{layer}."


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    return {
        "vocab_size": config.require("vocab_size"),
        "num_layers": config.require("n_layer"),
        "d_model": config.require("n_embd"),
        "context_length": config.require("n_positions"),
        "position_encoding": "learned",
        "attention": {"num_heads": config.require("n_head"), "qkv_bias": True, "out_bias": True},
        "feed_forward": {
            "d_ff": config.get("n_inner"),
            "kind": activation(config, False, "activation_function"),
            "bias": True,
        },
        "norm": {
            "kind": "layernorm",
            "epsilon": config.require("layer_norm_epsilon"),
            "bias": True,
        },
        "embedding": {"tied": config.get("tie_word_embeddings", True)},
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    heads = "attention/q attention/k attention/v"
    table = [
        Row("transformer.wte.weight", "embedding", "v d -> v d"),
        Row("transformer.wpe.weight", "position/table", "t d -> t d"),
        *norm("transformer.ln_f", "final_norm", True),
        *norm(f"{LAYER}ln_1", "attention_norm", True),
        *norm(f"{LAYER}ln_2", "feed_forward_norm", True),
        *linear(f"{LAYER}attn.c_attn", heads, "d (p h) -> d p h", "(p h) -> p h"),
        *linear(f"{LAYER}attn.c_proj", "attention/out", "(n h) d -> n h d", "d -> d"),
        *linear(f"{LAYER}mlp.c_fc", "feed_forward/up", "i o -> i o", "o -> o"),
        *linear(f"{LAYER}mlp.c_proj", "feed_forward/down", "i o -> i o", "o -> o"),
    ]
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("GPT2LMHeadModel",), model, rows)
