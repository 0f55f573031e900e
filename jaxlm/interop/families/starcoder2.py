"""StarCoder 2: Llama's names with LayerNorm, biases and a plain MLP."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import PLAIN, Activation, Key, Layers
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

FIELDS = (
    *llama_like.SIZES,
    Key("num_attention_heads", "attention.num_heads"),
    Key("num_key_value_heads", "attention.num_kv_heads"),
    Layers(("sliding",), listed=False),
    Key("use_bias", "attention.qkv_bias attention.out_bias feed_forward.bias", True),
    Key("intermediate_size", "feed_forward.d_ff"),
    Activation(PLAIN),
    *llama_like.LAYERNORM,
    Key("norm_epsilon", "norm.epsilon"),
    Key("tie_word_embeddings", "embedding.tied", True),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.feed_forward_rows(config, {"up": "c_fc", "down": "c_proj"}),
    ]


FAMILY = Family(("Starcoder2ForCausalLM",), "starcoder2", FIELDS, rows)
