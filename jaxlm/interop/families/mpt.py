"""MPT: ALiBi, no biases at all; what its attention is stands in a config of its own."""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Field, Fixed, Key, Only
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "transformer.blocks.{layer}."
ATTENTION: tuple[Field, ...] = (
    Key("softmax_scale", "attention.scale", None),
    Key("clip_qkv", "norm.clip_qkv", None),
    Only("attn_type", "multihead_attention"),
    Only("alibi", True),
    Only("alibi_bias_max", 8),
    Only("qk_ln", False),
    Only("prefix_lm", False),
)
# Of software that is not used here: how attention is computed, and packed rows in training.
ELSEWHERE = {"attn_impl", "attn_uses_sequence_id"}


def read_attention(config: HubConfig) -> dict[str, Any]:
    """The keys within attn_config."""
    within = HubConfig(config.get("attn_config", {}, dict), f"{config.name}: attn_config")
    values: dict[str, Any] = {}
    for field in ATTENTION:
        values |= field.read(within)
    config.unread |= {f"attn_config.{k}" for k in within.unread - ELSEWHERE}
    return values


def write_attention(config: ModelConfig) -> dict[str, Any]:
    """attn_config."""
    keys: dict[str, Any] = {}
    for field in ATTENTION:
        keys |= field.write(config)
    return {"attn_config": {k: v for k, v in keys.items() if v is not None}}


FIELDS: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("n_layers", "num_layers"),
    Key("d_model", "d_model"),
    Key("max_seq_len", "context_length"),
    Key("n_heads", "attention.num_heads"),
    Fixed("position_encoding", "alibi"),
    Derived(read_attention, write_attention),
    Only("expansion_ratio", 4),
    Fixed("feed_forward.kind", "gelu"),
    Only("no_bias", True),
    Fixed("norm.kind", "layernorm"),
    Key("layer_norm_epsilon", "norm.epsilon", 1e-5),
    Only("norm_type", "low_precision_layernorm"),
    Key("tie_word_embeddings", "embedding.tied", True),
    Only("logit_scale", None),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    heads = "attention/q attention/k attention/v"
    table = [
        Row("transformer.wte.weight", "embedding", "v d -> v d"),
        *norm("transformer.norm_f", "final_norm", False),
        *norm(f"{LAYER}norm_1", "attention_norm", False),
        *norm(f"{LAYER}norm_2", "feed_forward_norm", False),
        *linear(f"{LAYER}attn.Wqkv", heads, "(p h) d -> d p h"),
        *linear(f"{LAYER}attn.out_proj", "attention/out", "d (n h) -> n h d"),
        *linear(f"{LAYER}ffn.up_proj", "feed_forward/up", "o i -> i o"),
        *linear(f"{LAYER}ffn.down_proj", "feed_forward/down", "o i -> i o"),
    ]
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("MptForCausalLM",), "mpt", FIELDS, rows)
