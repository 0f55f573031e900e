"""GPT-NeoX and Pythia: attention and MLP side by side, each with a norm of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig, activation
from jaxlm.interop.hub_rope import rope
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig
from jaxlm.positions.rope import RoPE

LAYER = "gpt_neox.layers.{layer}."


def encoding(config: HubConfig) -> RoPE:
    """RoPE, under the names of transformers 4 if it has those."""
    share, base = config.get("rotary_pct"), config.get("rotary_emb_base")
    own: dict[str, Any] = {} if share is None else {"fraction": float(share)}
    own |= {} if base is None else {"base": float(base)}
    return dataclasses.replace(rope(config), **own)


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    bias = config.get("attention_bias", True)
    return {
        **llama_like.sizes(config),
        "position_encoding": encoding(config),
        "attention": {
            "num_heads": config.require("num_attention_heads"),
            "qkv_bias": bias,
            "out_bias": bias,
        },
        "feed_forward": {
            "d_ff": config.require("intermediate_size"),
            "kind": activation(config, False),
            "bias": True,
            "parallel": "separate" if config.get("use_parallel_residual", True) else "none",
        },
        "norm": {"kind": "layernorm", "epsilon": config.require("layer_norm_eps"), "bias": True},
        "embedding": {"tied": config.get("tie_word_embeddings", False)},
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors; each head's query, key and value rows stand together."""
    heads, a = "attention/q attention/k attention/v", config.attention
    in_bias = "(g p h) -> (g p) h" if a.qkv_bias else None
    out_bias = "d -> d" if a.out_bias else None
    table = [
        Row("gpt_neox.embed_in.weight", "embedding", "v d -> v d"),
        *norm("gpt_neox.final_layer_norm", "final_norm", True),
        *norm(f"{LAYER}input_layernorm", "attention_norm", True),
        *norm(f"{LAYER}post_attention_layernorm", "feed_forward_norm", True),
        *linear(
            f"{LAYER}attention.query_key_value",
            heads,
            "(g p h) d -> d (g p) h",
            in_bias,
            groups=a.num_heads,
        ),
        *linear(f"{LAYER}attention.dense", "attention/out", "d (n h) -> n h d", out_bias),
        *linear(f"{LAYER}mlp.dense_h_to_4h", "feed_forward/up", "o i -> i o", "o -> o"),
        *linear(f"{LAYER}mlp.dense_4h_to_h", "feed_forward/down", "o i -> i o", "o -> o"),
    ]
    if not config.embedding.tied:
        table.append(Row("embed_out.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("GPTNeoXForCausalLM",), model, rows)
