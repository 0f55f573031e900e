"""What most decoder families on the hub share: config keys and tensor names that began as Llama's.

A family states where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxlm.interop.fields import GATED, Activation, Field, Fixed, Ignored, Key
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "model.layers.{layer}."
MATRICES = {name: f"{name}_proj" for name in ("gate", "up", "down")}
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


# ModelConfig's own fields: those of no part.
WIDTHS: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "d_model"),
    Key("max_position_embeddings", "context_length"),
)
SIZES: tuple[Field, ...] = (*WIDTHS, Rope())
HEADS: tuple[Field, ...] = (
    Key("num_attention_heads", "attention.num_heads"),
    Key("num_key_value_heads", "attention.num_kv_heads", None),
    Key("head_dim", "attention.head_dim", None),
)
ATTENTION_BIAS = Key("attention_bias", "attention.qkv_bias attention.out_bias", False)
WIDTH = Key("intermediate_size", "feed_forward.d_ff")
MLP_BIAS = Key("mlp_bias", "feed_forward.bias", False)
NO_ATTENTION_BIAS, NO_MLP_BIAS = Ignored("attention_bias"), Ignored("mlp_bias")
RMSNORM: tuple[Field, ...] = (
    Fixed("norm.kind", "rmsnorm"),
    Key("rms_norm_eps", "norm.epsilon"),
)
LAYERNORM: tuple[Field, ...] = (
    Fixed("norm.kind", "layernorm"),
    Fixed("norm.bias", True),
)
TIED = Key("tie_word_embeddings", "embedding.tied", False)
# All but biases, which a part of the families has a key for.
UNBIASED: tuple[Field, ...] = (*SIZES, *HEADS, WIDTH, Activation(GATED), *RMSNORM, TIED)
FIELDS: tuple[Field, ...] = (*UNBIASED, ATTENTION_BIAS, MLP_BIAS)
BARE: tuple[Field, ...] = (*UNBIASED, NO_ATTENTION_BIAS, NO_MLP_BIAS)
BIASED_ATTENTION: tuple[Field, ...] = (*UNBIASED, ATTENTION_BIAS, NO_MLP_BIAS)


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


def feed_forward_rows(config: ModelConfig, names: Mapping[str, str] = MATRICES) -> list[Row]:
    """The MLP of every layer; `names` are those of its matrices."""
    table = []
    bias = "o -> o" if config.feed_forward.bias else None
    for ours, theirs in names.items():
        table += linear(f"{LAYER}mlp.{theirs}", f"feed_forward/{ours}", "o i -> i o", bias)
    return table


def expert_rows(theirs: str, router: str, names: Mapping[str, str] = MATRICES) -> list[Row]:
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
