"""T5 1.0 and 1.1, mT5, Flan-T5, CodeT5: encoder and decoder with a relative bias and plain RMSNorm.

Version 1.0 has a plain MLP, and a tied head on hidden states times d_model**-0.5; the later ones
have a gated MLP and a head of their own.
"""

from __future__ import annotations

from typing import Any

from jaxlm import positions
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Activation, Derived, Field, Fixed, Key, Within
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.positions.t5 import T5

ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
}
MATRICES = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
PLAIN_MATRICES = {"up": "wi", "down": "wo"}


def bias(bidirectional: bool) -> Field:
    """The relative bias of one half."""

    def read(config: HubConfig) -> dict[str, Any]:
        buckets = config.get("relative_attention_num_buckets", 32, int)
        farthest = config.get("relative_attention_max_distance", 128, int)
        return {"position_encoding": T5(buckets, farthest, bidirectional)}

    def write(config: ModelConfig) -> dict[str, Any]:
        encoding = positions.parse(config.position_encoding)
        if not isinstance(encoding, T5):
            raise ValueError(f"position_encoding={encoding}; allowed: t5")
        return {
            "relative_attention_num_buckets": encoding.num_buckets,
            "relative_attention_max_distance": encoding.max_distance,
        }

    return Derived(read, write)


HALF: tuple[Field, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("d_model", "d_model"),
    Key("num_heads", "attention.num_heads"),
    Key("d_kv", "attention.head_dim"),
    Key("d_ff", "feed_forward.d_ff"),
    Key("n_positions", "context_length", 512),
    Key("layer_norm_epsilon", "norm.epsilon"),
    Fixed("norm.kind", "rmsnorm"),
    Fixed("attention.scale", 1.0),
    Activation(ACTIVATIONS, "feed_forward_proj"),
)
ENCODER: tuple[Field, ...] = (
    *HALF,
    Key("num_layers", "num_layers"),
    bias(True),
    Fixed("attention.layer_pattern", ("bidirectional",)),
    Fixed("embedding.tied", True),
)
DECODER: tuple[Field, ...] = (
    *HALF,
    Derived(
        lambda config: {
            "num_layers": config.get("num_decoder_layers", None, int)
            or config.require("num_layers", int)
        },
        lambda config: {"num_decoder_layers": config.num_layers},
    ),
    bias(False),
    Fixed("attention.layer_pattern", ("crossed",)),
)


def tied(config: HubConfig) -> bool:
    """Transformers 5 ties what has no matrix of its own, whatever the key says."""
    said = config.get("tie_word_embeddings", True, bool)
    return "lm_head.weight" not in config.tensors if config.tensors else said


def read_head(config: HubConfig) -> dict[str, Any]:
    """What transformers 4 says by a head's being tied, 5 says by a key."""
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True, bool))
    scale = config.require("d_model", int) ** -0.5 if scaled else None
    return {"embedding.tied": tied(config), "embedding.logit_scale": scale}


def write_head(config: ModelConfig) -> dict[str, Any]:
    """For both."""
    scaled = config.embedding.logit_scale is not None
    return {"tie_word_embeddings": config.embedding.tied, "scale_decoder_outputs": scaled}


COMMON: tuple[Field, ...] = (
    *(Within("encoder", field) for field in ENCODER),
    *(Within("decoder", field) for field in DECODER),
    Key("decoder_start_token_id", "start_token", 0),
)
FIELDS = (*COMMON, Within("decoder", Derived(read_head, write_head)))
MT5_FIELDS = (
    *COMMON,
    Within(
        "decoder",
        Derived(
            lambda config: {"embedding.tied": tied(config)},
            lambda config: {"tie_word_embeddings": config.embedding.tied},
        ),
    ),
)


def attention_rows(theirs: str, ours: str) -> list[Row]:
    """The projections."""
    table = linear(f"{theirs}.o", f"{ours}/out", "d (n h) -> n h d")
    for name in ("q", "k", "v"):
        table += linear(f"{theirs}.{name}", f"{ours}/{name}", "(n h) d -> d n h")
    return table


def half_rows(config: ModelConfig, half: str) -> list[Row]:
    """The encoder or the decoder; the sublayers of a block are counted."""
    layer = f"{half}.block.{{layer}}.layer."
    first, table = f"{half}.block.0.layer.0.SelfAttention", f"{half}/position/table"
    rows = [
        Row(f"{first}.relative_attention_bias.weight", table, "b n -> n b"),
        *norm(f"{half}.final_layer_norm", f"{half}/final_norm", False),
        *attention_rows(f"{layer}0.SelfAttention", f"{half}/attention"),
    ]
    sublayers = ["attention", "feed_forward"]
    if half == "decoder":
        sublayers.insert(1, "cross_attention")
        rows += attention_rows(f"{layer}1.EncDecAttention", f"{half}/cross_attention")
    for i, name in enumerate(sublayers):
        rows += norm(f"{layer}{i}.layer_norm", f"{half}/{name}_norm", False)
    last = f"{layer}{len(sublayers) - 1}.DenseReluDense"
    matrices = MATRICES if config.feed_forward.gated else PLAIN_MATRICES
    for ours, theirs in matrices.items():
        rows += linear(f"{last}.{theirs}", f"{half}/feed_forward/{ours}", "o i -> i o")
    return rows


def rows(config: EncoderDecoderConfig) -> list[Row]:
    """All tensors."""
    table = [
        Row("shared.weight", "encoder/embedding", "v d -> v d"),
        *half_rows(config.encoder, "encoder"),
        *half_rows(config.decoder, "decoder"),
    ]
    if not config.decoder.embedding.tied:
        table.append(Row("lm_head.weight", "decoder/head", "v d -> d v"))
    return table


FAMILY = Family(("T5ForConditionalGeneration",), "t5", FIELDS, rows, EncoderDecoderConfig)
FAMILY_M = Family(("MT5ForConditionalGeneration",), "mt5", MT5_FIELDS, rows, EncoderDecoderConfig)
