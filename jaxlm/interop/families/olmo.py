"""OLMo 1: Llama with norms that learn nothing, and clipped queries, keys and values."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Fixed, Key
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

FIELDS = (
    *llama_like.SIZES,
    *llama_like.HEADS,
    llama_like.ATTENTION_BIAS,
    llama_like.WIDTH,
    llama_like.NO_MLP_BIAS,
    Activation(GATED),
    Fixed("norm.kind", "layernorm"),
    Fixed("norm.scale", False),
    Fixed("norm.epsilon", 1e-5),
    Key("clip_qkv", "norm.clip_qkv", None),
    llama_like.TIED,
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [row for row in llama_like.rows(config) if not row.ours.endswith("norm/scale")]


FAMILY = Family(("OlmoForCausalLM",), "olmo", FIELDS, rows)
