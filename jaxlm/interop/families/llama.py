"""Llama 1 to 3 and what is built alike: SmolLM2, Mistral (with a sliding window)."""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import Family, HubConfig
from jaxlm.interop.hub_rope import rope
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    activation = config.require("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{config.name}: hidden_act={activation!r}; allowed: {', '.join(ACTIVATIONS)}"
        )
    window = config.get("sliding_window")
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
            "layer_pattern": ("global",) if window is None else ("sliding",),
            "sliding_window": window,
        },
        "feed_forward": {
            "d_ff": config.require("intermediate_size"),
            "kind": ACTIVATIONS[activation],
            "bias": config.get("mlp_bias", False),
        },
        "norm": {"kind": "rmsnorm", "epsilon": config.require("rms_norm_eps")},
        "embedding": {"tied": config.get("tie_word_embeddings", False)},
    }


def rows(config: ModelConfig) -> list[Row]:
    """Names of the tensors; biases and an own head where the config has them."""
    layer = "model.layers.{layer}."
    table = [
        Row("model.embed_tokens.weight", "embedding", "v d -> v d"),
        Row("model.norm.weight", "final_norm/scale", "d -> d"),
        Row(f"{layer}input_layernorm.weight", "attention_norm/scale", "d -> d"),
        Row(f"{layer}post_attention_layernorm.weight", "feed_forward_norm/scale", "d -> d"),
        Row(f"{layer}self_attn.o_proj.weight", "attention/out/kernel", "d (n h) -> n h d"),
    ]
    for name in ("q", "k", "v"):
        theirs, ours = f"{layer}self_attn.{name}_proj", f"attention/{name}"
        table.append(Row(f"{theirs}.weight", f"{ours}/kernel", "(n h) d -> d n h"))
        if config.attention.qkv_bias:
            table.append(Row(f"{theirs}.bias", f"{ours}/bias", "(n h) -> n h"))
    if config.attention.out_bias:
        table.append(Row(f"{layer}self_attn.o_proj.bias", "attention/out/bias", "d -> d"))
    for name in ("up", "gate", "down"):
        theirs, ours = f"{layer}mlp.{name}_proj", f"feed_forward/{name}"
        table.append(Row(f"{theirs}.weight", f"{ours}/kernel", "o i -> i o"))
        if config.feed_forward.bias:
            table.append(Row(f"{theirs}.bias", f"{ours}/bias", "o -> o"))
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("LlamaForCausalLM", "MistralForCausalLM"), model, rows)
