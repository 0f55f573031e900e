"""GPT-J: attention and MLP side by side on one norm; neighbouring dims are rotated."""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import Family, HubConfig, activation
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig
from jaxlm.positions.rope import RoPE

LAYER = "transformer.h.{layer}."


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    heads, width = config.require("n_head"), config.require("n_embd")
    rotated = config.get("rotary_dim", width // heads)
    return {
        "vocab_size": config.require("vocab_size"),
        "num_layers": config.require("n_layer"),
        "d_model": width,
        "context_length": config.require("n_positions"),
        "position_encoding": RoPE(fraction=rotated * heads / width, interleaved=True),
        "attention": {"num_heads": heads},
        "feed_forward": {
            "d_ff": config.get("n_inner"),
            "kind": activation(config, False, "activation_function"),
            "bias": True,
            "parallel": "shared",
        },
        "norm": {
            "kind": "layernorm",
            "epsilon": config.require("layer_norm_epsilon"),
            "bias": True,
        },
        "embedding": {"tied": config.get("tie_word_embeddings", False), "head_bias": True},
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    table = [
        Row("transformer.wte.weight", "embedding", "v d -> v d"),
        *norm("transformer.ln_f", "final_norm", True),
        *norm(f"{LAYER}ln_1", "attention_norm", True),
        *linear(f"{LAYER}attn.out_proj", "attention/out", "d (n h) -> n h d"),
        *linear(f"{LAYER}mlp.fc_in", "feed_forward/up", "o i -> i o", "o -> o"),
        *linear(f"{LAYER}mlp.fc_out", "feed_forward/down", "o i -> i o", "o -> o"),
        Row("lm_head.bias", "head_bias", "v -> v"),
    ]
    for name in ("q", "k", "v"):
        table += linear(f"{LAYER}attn.{name}_proj", f"attention/{name}", "(n h) d -> d n h")
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("GPTJForCausalLM",), model, rows)
