"""Gemma 1 and 2: scaled embeddings, norms stored minus one, a tanh GeGLU.

Gemma 2 adds norms after the sublayers, caps on scores and logits, and sliding layers.
"""

from __future__ import annotations

import math
from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Derived, Field, Fixed, Key, Layers, Only
from jaxlm.interop.hub_config import HubConfig
from jaxlm.model.config import ModelConfig


def read_activation(config: HubConfig) -> dict[str, Any]:
    """Early files say "gelu" and mean its tanh form, which hidden_activation then names."""
    early = config.get("hidden_act", None, str)
    if config.get("hidden_activation") is None and early == "gelu":
        return {"feed_forward.kind": "geglu_tanh"}
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    return Activation(GATED, name).read(config)


def write_activation(config: ModelConfig) -> dict[str, Any]:
    """The same name for early and late readers."""
    (name,) = Activation(GATED).write(config).values()
    return {"hidden_act": name, "hidden_activation": name}


def write_scale(config: ModelConfig) -> dict[str, Any]:
    """As an integer where it is one: transformers refuses 256.0."""
    assert config.attention.scale is not None
    scalar = config.attention.scale**-2
    whole = math.isclose(scalar, round(scalar), rel_tol=1e-9)
    return {"query_pre_attn_scalar": round(scalar) if whole else scalar}


# All but the positions.
SINCE_1: tuple[Field, ...] = (
    *llama_like.HEADS,
    llama_like.ATTENTION_BIAS,
    llama_like.WIDTH,
    llama_like.NO_MLP_BIAS,
    *llama_like.RMSNORM,
    Derived(read_activation, write_activation),
    Fixed("norm.scale_plus_one", True),
    Only("use_bidirectional_attention", False),
    Key("tie_word_embeddings", "embedding.tied", True),
    Derived(lambda config: {"embedding.scale": math.sqrt(config.require("hidden_size", int))}),
)
SINCE_2: tuple[Field, ...] = (
    *SINCE_1,
    Key("final_logit_softcapping", "embedding.logit_softcap", None),
    Derived(
        lambda config: {"attention.scale": config.require("query_pre_attn_scalar", float) ** -0.5},
        write_scale,
    ),
    Fixed("norm.placement", "sandwich"),
)
FIELDS = (*llama_like.SIZES, *SINCE_1)
FIELDS_2 = (
    *llama_like.SIZES,
    *SINCE_2,
    Key("attn_logit_softcapping", "attention.softcap", None),
    Layers(("sliding", "global"), listed=True),
)
ABSENT = {"head_dim": 256, "num_key_value_heads": 16}
ABSENT_2_AND_3 = ABSENT | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
ABSENT_2 = ABSENT_2_AND_3 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
FAMILY = Family(("GemmaForCausalLM",), "gemma", FIELDS, llama_like.rows, absent=ABSENT)
FAMILY_2 = Family(("Gemma2ForCausalLM",), "gemma2", FIELDS_2, llama_like.rows, absent=ABSENT_2)
