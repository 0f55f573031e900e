"""Falcon: queries, keys and values of a group of heads side by side in one matrix.

7B has one key/value head and one norm before attention and MLP; 40B, 180B and 11B, in their "new
decoder architecture", groups of heads and a norm each (11B one); RW ALiBi and sublayers in turn.

Transformers rounds ALiBi's slopes and their products with positions to bfloat16, and its eager
attention adds the bias twice; here it is float32 and added once, as in its default attention.
"""

from __future__ import annotations

from typing import Any

from jaxlm import positions
from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import PLAIN, Activation, Derived, Field, Key, Only
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig
from jaxlm.positions.alibi import ALiBi

LAYER = "transformer.h.{layer}."


def read_positions(config: HubConfig) -> dict[str, Any]:
    """ALiBi's bias is scaled as the scores are."""
    rope = Rope().read(config)
    if not config.get("alibi", False, bool):
        return rope
    heads = config.get("num_attention_heads", config.get("n_head", None, int), int)
    head_dim = config.require("hidden_size", int) // (
        heads or config.require("num_attention_heads", int)
    )
    return {"position_encoding": ALiBi(head_dim**-0.5)}


def write_positions(config: ModelConfig) -> dict[str, Any]:
    """Whether it is ALiBi, or else RoPE's keys."""
    alibi = isinstance(positions.parse(config.position_encoding), ALiBi)
    return {"alibi": True} if alibi else {"alibi": False, **Rope().write(config)}


def read_blocks(config: HubConfig) -> dict[str, Any]:
    """How many key/value heads and norms there are is said in several ways."""
    new, one = (
        config.get("new_decoder_architecture", False, bool),
        config.get("multi_query", True, bool),
    )
    heads = config.get("num_kv_heads", config.get("n_head_kv", None, int), int)
    norms = config.get("num_ln_in_parallel_attn", 2 if new else 1)
    parallel = "separate" if new and norms == 2 else "shared"
    if not config.get("parallel_attn", True, bool) and not new:
        parallel = "none"
    return {
        "attention.num_kv_heads": 1 if one and not new else heads,
        "feed_forward.parallel": parallel,
    }


def write_blocks(config: ModelConfig) -> dict[str, Any]:
    """The new architecture only where the old one has no word for it."""
    heads, parallel = config.num_kv_heads, config.feed_forward.parallel
    old = parallel != "separate" and heads in (1, config.attention.num_heads)
    return {
        "new_decoder_architecture": not old,
        "multi_query": heads == 1,
        "parallel_attn": parallel != "none",
        "num_kv_heads": heads,
        "num_ln_in_parallel_attn": 2 if parallel == "separate" else 1,
    }


FIELDS: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("num_hidden_layers n_layer", "num_layers"),
    Key("hidden_size n_embed", "d_model"),
    Key("max_position_embeddings", "context_length", 2048),
    Key("num_attention_heads n_head", "attention.num_heads"),
    Derived(read_positions, write_positions),
    Derived(read_blocks, write_blocks),
    Key("bias", "attention.qkv_bias attention.out_bias feed_forward.bias", False),
    Key("ffn_hidden_size", "feed_forward.d_ff", None),
    Activation(PLAIN, "activation", default="gelu"),
    *llama_like.LAYERNORM,
    Key("layer_norm_epsilon", "norm.epsilon", 1e-5),
    Key("tie_word_embeddings", "embedding.tied", True),
    Only("apply_residual_connection_post_layernorm", False),
)


def block_rows(config: ModelConfig) -> list[Row]:
    """Embedding, projections and head, under the names that BLOOM began."""
    heads, a = "attention/q attention/k attention/v", config.attention
    attention, bias = f"{LAYER}self_attention.", config.feed_forward.bias
    table = [
        Row("transformer.word_embeddings.weight", "embedding", "v d -> v d"),
        *norm("transformer.ln_f", "final_norm", True),
        *linear(
            f"{attention}query_key_value",
            heads,
            "(g p h) d -> d (g p) h",
            "(g p h) -> (g p) h" if a.qkv_bias else None,
            groups=config.num_kv_heads,
        ),
        *linear(
            f"{attention}dense",
            "attention/out",
            "d (n h) -> n h d",
            "d -> d" if a.out_bias else None,
        ),
    ]
    for ours, theirs in {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}.items():
        path = f"feed_forward/{ours}"
        table += linear(f"{LAYER}mlp.{theirs}", path, "o i -> i o", "o -> o" if bias else None)
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


# Our norms of a block and theirs, by how attention and MLP stand.
NORMS = {
    "none": llama_like.NORMS["pre"],
    "shared": {"attention_norm": "input_layernorm"},
    "separate": {"attention_norm": "ln_attn", "feed_forward_norm": "ln_mlp"},
}


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    table = block_rows(config)
    for ours, theirs in NORMS[config.feed_forward.parallel].items():
        table += norm(f"{LAYER}{theirs}", ours, True)
    return table


FAMILY = Family(("FalconForCausalLM",), "falcon", FIELDS, rows)
