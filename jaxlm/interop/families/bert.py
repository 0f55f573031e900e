"""BERT, and sentence encoders made of it (MiniLM, E5, BGE, GTE): bidirectional, norms of the sums.

BertModel has no head: its logits, those of the tied embedding, mean nothing; take its hidden
states. The pooler, which only next-sentence prediction used, is left out.
"""

from __future__ import annotations

from jaxlm.interop.family import Family
from jaxlm.interop.fields import PLAIN, Activation, Field, Fixed, Key, Only
from jaxlm.interop.llama_like import LAYERNORM
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

ENCODER: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "d_model"),
    Key("num_attention_heads", "attention.num_heads"),
    Key("intermediate_size", "feed_forward.d_ff"),
    Key("type_vocab_size", "embedding.num_token_types"),
    Only("tie_word_embeddings", True),
    Fixed("embedding.tied", True),
    Activation(PLAIN),
    Fixed("attention.layer_pattern", ("bidirectional",)),
    Fixed("attention.qkv_bias", True),
    Fixed("attention.out_bias", True),
    Fixed("feed_forward.bias", True),
    Fixed("embedding.norm", True),
    Fixed("norm.placement", "residual"),
    *LAYERNORM,
    Key("layer_norm_eps", "norm.epsilon"),
    Only("position_embedding_type", "absolute"),
    Only("is_decoder", False),
    Only("add_cross_attention", False),
)
MASKED_LM: tuple[Field, ...] = (
    Fixed("embedding.head_transform", True),
    Fixed("embedding.head_bias", True),
)
FIELDS: tuple[Field, ...] = (
    *ENCODER,
    Key("max_position_embeddings", "context_length"),
    Fixed("position_encoding", "learned"),
)


def encoder_rows(prefix: str) -> list[Row]:
    """The tensors without a head; `prefix` is the encoder's name in the whole, with a dot."""
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{layer}}."
    table = [
        Row(f"{embeddings}word_embeddings.weight", "embedding", "v d -> v d"),
        Row(f"{embeddings}position_embeddings.weight", "position/table", "t d -> t d"),
        Row(f"{embeddings}token_type_embeddings.weight", "token_types", "t d -> t d"),
        *norm(f"{embeddings}LayerNorm", "embedding_norm", True),
        *linear(f"{layer}attention.output.dense", "attention/out", "d (n h) -> n h d", "d -> d"),
        *norm(f"{layer}attention.output.LayerNorm", "attention_residual_norm", True),
        *linear(f"{layer}intermediate.dense", "feed_forward/up", "o i -> i o", "o -> o"),
        *linear(f"{layer}output.dense", "feed_forward/down", "o i -> i o", "o -> o"),
        *norm(f"{layer}output.LayerNorm", "feed_forward_residual_norm", True),
    ]
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        name = f"{layer}attention.self.{theirs}"
        table += linear(name, f"attention/{ours}", "(n h) d -> d n h", "(n h) -> n h")
    return table


def head_rows(dense: str, layer_norm: str, bias: str) -> list[Row]:
    """The masked-LM head, by the names of its parts."""
    return [
        *linear(dense, "head_transform/dense", "o i -> i o", "o -> o"),
        *norm(layer_norm, "head_transform/norm", True),
        Row(bias, "head_bias", "v -> v"),
    ]


def body_rows(config: ModelConfig) -> list[Row]:
    """The tensors of an encoder alone."""
    return encoder_rows("")


def masked_lm_rows(config: ModelConfig) -> list[Row]:
    """The encoder's and its head's."""
    head = "cls.predictions"
    names = (f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.bias")
    return [*encoder_rows("bert."), *head_rows(*names)]


FAMILY = Family(("BertModel",), "bert", FIELDS, body_rows)
FAMILY_MASKED_LM = Family(("BertForMaskedLM",), "bert", (*FIELDS, *MASKED_LM), masked_lm_rows)
