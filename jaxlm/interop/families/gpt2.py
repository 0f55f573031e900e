"""GPT-2: learned positions, LayerNorm, and matrices stored inputs first."""

from __future__ import annotations

from jaxlm.interop.family import Family
from jaxlm.interop.fields import PLAIN, Activation, Field, Fixed, Key, Only
from jaxlm.interop.llama_like import LAYERNORM
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "transformer.h.{layer}."
# Under GPT-2's names, which GPT-J took over.
SIZES: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("n_layer", "num_layers"),
    Key("n_embd", "d_model"),
    Key("n_positions", "context_length"),
    Key("n_head", "attention.num_heads"),
    Key("n_inner", "feed_forward.d_ff", None),
    Activation(PLAIN, "activation_function"),
    Fixed("feed_forward.bias", True),
    *LAYERNORM,
    Key("layer_norm_epsilon", "norm.epsilon"),
)
FIELDS: tuple[Field, ...] = (
    *SIZES,
    Fixed("position_encoding", "learned"),
    Fixed("attention.qkv_bias", True),
    Fixed("attention.out_bias", True),
    Key("tie_word_embeddings", "embedding.tied", True),
    Only("scale_attn_weights", True),
    Only("scale_attn_by_inverse_layer_idx", False),
    Only("add_cross_attention", False),
)


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


FAMILY = Family(("GPT2LMHeadModel",), "gpt2", FIELDS, rows)
