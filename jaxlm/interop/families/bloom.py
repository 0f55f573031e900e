"""BLOOM: ALiBi, a norm of the embeddings, biases everywhere."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import falcon
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Field, Fixed, Key, Only
from jaxlm.interop.llama_like import NORMS
from jaxlm.interop.rows import Row, norm
from jaxlm.model.config import ModelConfig

BIASES = ("attention.qkv_bias", "attention.out_bias", "feed_forward.bias")
FIELDS: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("n_layer num_hidden_layers", "num_layers"),
    Key("hidden_size n_embed", "d_model"),
    Key("seq_length", "context_length", 2048),
    Key("n_head num_attention_heads", "attention.num_heads"),
    Fixed("position_encoding", "alibi"),
    *(Fixed(name, True) for name in BIASES),
    Fixed("feed_forward.kind", "gelu_tanh"),
    *llama_like.LAYERNORM,
    Key("layer_norm_epsilon", "norm.epsilon", 1e-5),
    Fixed("embedding.norm", True),
    Key("tie_word_embeddings", "embedding.tied", True),
    Only("apply_residual_connection_post_layernorm", False),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    table = falcon.block_rows(config)
    table += norm("transformer.word_embeddings_layernorm", "embedding_norm", True)
    for ours, theirs in NORMS["pre"].items():
        table += norm(f"{falcon.LAYER}{theirs}", ours, True)
    return table


FAMILY = Family(("BloomForCausalLM",), "bloom", FIELDS, rows)
