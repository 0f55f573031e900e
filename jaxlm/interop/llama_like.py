"""What most decoder families on the hub share: config keys and tensor names that began as Llama's.

A family states where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.family import HubConfig, activation, layer_pattern
from jaxlm.interop.hub_rope import rope
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "model.layers.{layer}."
MLP = {name: f"{name}_proj" for name in ("gate", "up", "down")}
# Our norms of a layer and theirs, by placement.
NORMS = {
    "pre": {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    },
    "post": {
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    },
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    },
}


def sizes(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's own fields: those of no part."""
    return {
        "vocab_size": config.require("vocab_size"),
        "num_layers": config.require("num_hidden_layers"),
        "d_model": config.require("hidden_size"),
        "context_length": config.require("max_position_embeddings"),
        "position_encoding": rope(config),
    }


def model(
    config: HubConfig, activation_key: str = "hidden_act", norm: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """ModelConfig's fields; the norm is an RMSNorm unless another is given."""
    bias = config.get("attention_bias", False)
    return {
        **sizes(config),
        "attention": {
            "num_heads": config.require("num_attention_heads"),
            "num_kv_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "qkv_bias": bias,
            "out_bias": bias,
            **layer_pattern(config),
        },
        "feed_forward": {
            "d_ff": config.require("intermediate_size"),
            "kind": activation(config, True, activation_key),
            "bias": config.get("mlp_bias", False),
        },
        "norm": norm or {"kind": "rmsnorm", "epsilon": config.require("rms_norm_eps")},
        "embedding": {"tied": config.get("tie_word_embeddings", False)},
    }


def attention_rows(config: ModelConfig) -> list[Row]:
    """The projections, their biases, the norms of queries and keys."""
    a, attention = config.attention, f"{LAYER}self_attn."
    table = linear(
        f"{attention}o_proj",
        "attention/out",
        "d (n h) -> n h d",
        "d -> d" if a.out_bias else None,
    )
    bias = "(n h) -> n h" if a.qkv_bias else None
    for name in ("q", "k", "v"):
        table += linear(f"{attention}{name}_proj", f"attention/{name}", "(n h) d -> d n h", bias)
        if a.qk_norm != "none" and name != "v":
            table += norm(f"{attention}{name}_norm", f"attention/{name}_norm", config.norm.bias)
    return table


def feed_forward_rows(config: ModelConfig, names: Mapping[str, str] = MLP) -> list[Row]:
    """The MLP of every layer; `names` are those of its matrices."""
    table = []
    bias = "o -> o" if config.feed_forward.bias else None
    for ours, theirs in names.items():
        table += linear(f"{LAYER}mlp.{theirs}", f"feed_forward/{ours}", "o i -> i o", bias)
    return table


def expert_rows(theirs: str, router: str, names: Mapping[str, str] = MLP) -> list[Row]:
    """The experts of every layer and their router; `names` are those of gate, up and down."""
    table = [Row(f"{LAYER}{router}.weight", "experts/router/kernel", "e d -> d e")]
    for ours, name in names.items():
        matrix = f"{LAYER}{theirs}.{{expert}}.{name}.weight"
        table.append(Row(matrix, f"experts/{ours}", "o i -> i o"))
    return table


def other_rows(config: ModelConfig) -> list[Row]:
    """Embedding, norms and head."""
    table = [
        Row("model.embed_tokens.weight", "embedding", "v d -> v d"),
        *norm("model.norm", "final_norm", config.norm.bias),
    ]
    for ours, theirs in NORMS[config.norm.placement].items():
        if ours == "feed_forward_norm" and config.feed_forward.parallel == "shared":
            continue
        table += norm(f"{LAYER}{theirs}", ours, config.norm.bias)
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


def rows(config: ModelConfig) -> list[Row]:
    """All tensors of a dense model."""
    return [*other_rows(config), *attention_rows(config), *feed_forward_rows(config)]
