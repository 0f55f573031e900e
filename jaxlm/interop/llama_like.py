"""What most decoder families on the hub share: config keys and tensor names that began as Llama's.

A family states where it differs.
"""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import HubConfig, activation, layer_pattern
from jaxlm.interop.hub_rope import rope
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

LAYER = "model.layers.{layer}."
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


def model(config: HubConfig, activation_key: str = "hidden_act") -> dict[str, Any]:
    """ModelConfig's fields."""
    bias = config.get("attention_bias", False)
    return {
        "vocab_size": config.require("vocab_size"),
        "num_layers": config.require("num_hidden_layers"),
        "d_model": config.require("hidden_size"),
        "context_length": config.require("max_position_embeddings"),
        "position_encoding": rope(config),
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
        "norm": {"kind": "rmsnorm", "epsilon": config.require("rms_norm_eps")},
        "embedding": {"tied": config.get("tie_word_embeddings", False)},
    }


def attention_rows(config: ModelConfig) -> list[Row]:
    """The projections, their biases, the norms of queries and keys."""
    a, table = config.attention, []
    for name in ("q", "k", "v"):
        theirs, ours = f"{LAYER}self_attn.{name}_proj", f"attention/{name}"
        table.append(Row(f"{theirs}.weight", f"{ours}/kernel", "(n h) d -> d n h"))
        if a.qkv_bias:
            table.append(Row(f"{theirs}.bias", f"{ours}/bias", "(n h) -> n h"))
        if a.qk_norm != "none" and name != "v":
            norm = f"{LAYER}self_attn.{name}_norm.weight"
            table.append(Row(norm, f"attention/{name}_norm/scale", "h -> h"))
    theirs = f"{LAYER}self_attn.o_proj"
    table.append(Row(f"{theirs}.weight", "attention/out/kernel", "d (n h) -> n h d"))
    if a.out_bias:
        table.append(Row(f"{theirs}.bias", "attention/out/bias", "d -> d"))
    return table


def feed_forward_rows(config: ModelConfig, theirs: str = "mlp", ours: str = "") -> list[Row]:
    """The MLP `theirs` of every layer; `ours` is its place among experts."""
    table = []
    for name in ("gate", "up", "down"):
        matrix, path = f"{LAYER}{theirs}.{name}_proj", f"{ours or 'feed_forward'}/{name}"
        table.append(Row(f"{matrix}.weight", f"{path}/kernel", "o i -> i o"))
        if config.feed_forward.bias:
            table.append(Row(f"{matrix}.bias", f"{path}/bias", "o -> o"))
    return table


def expert_rows(theirs: str, router: str, names: dict[str, str]) -> list[Row]:
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
        Row("model.norm.weight", "final_norm/scale", "d -> d"),
    ]
    for ours, theirs in NORMS[config.norm.placement].items():
        table.append(Row(f"{LAYER}{theirs}.weight", f"{ours}/scale", "d -> d"))
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


def rows(config: ModelConfig) -> list[Row]:
    """All tensors of a dense model."""
    return [*other_rows(config), *attention_rows(config), *feed_forward_rows(config)]
