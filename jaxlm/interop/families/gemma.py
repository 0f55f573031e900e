"""Gemma 1 and 2: scaled embeddings, norms stored minus one, a tanh GeGLU.

Gemma 2 adds norms after the sublayers, caps on scores and logits, and sliding layers.
"""

from __future__ import annotations

import math
from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Derived, Field, Fixed, Key, Layers
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
    *llama_like.ATTENTION,
    *llama_like.MLP,
    *llama_like.RMSNORM,
    Derived(read_activation, write_activation),
    Fixed("norm.scale_plus_one", True),
    Key("tie_word_embeddings", "embedding.tied", True),
    Derived(lambda config: {"embedding.scale": math.sqrt(config.require("hidden_size", int))}),
)
SINCE_2: tuple[Field, ...] = (
    *SINCE_1,
    Key("attn_logit_softcapping", "attention.softcap", None),
    Key("final_logit_softcapping", "embedding.logit_softcap", None),
    Derived(
        lambda config: {"attention.scale": config.require("query_pre_attn_scalar", float) ** -0.5},
        write_scale,
    ),
    Fixed("norm.placement", "sandwich"),
)
FIELDS = (*llama_like.SIZES, *SINCE_1)
FIELDS_2 = (*llama_like.SIZES, *SINCE_2, Layers(("sliding", "global"), listed=True))
FAMILY = Family(("GemmaForCausalLM",), "gemma", FIELDS, llama_like.rows)
FAMILY_2 = Family(("Gemma2ForCausalLM",), "gemma2", FIELDS_2, llama_like.rows)
