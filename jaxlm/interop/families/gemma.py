"""Gemma 1 and 2: scaled embeddings, norms stored minus one, a tanh GeGLU.

Gemma 2 adds norms after the sublayers, caps on scores and logits, and sliding layers.
"""

from __future__ import annotations

import math
from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family, HubConfig, layer_pattern


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields of Gemma 1."""
    config.get("hidden_act")
    fields = llama_like.model(
        config, "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    )
    # Early files say "gelu" and mean its tanh form, which hidden_activation then names.
    if fields["feed_forward"]["kind"] == "geglu":
        fields["feed_forward"]["kind"] = "geglu_tanh"
    fields["norm"]["scale_plus_one"] = True
    fields["embedding"] = {
        "tied": config.get("tie_word_embeddings", True),
        "scale": math.sqrt(fields["d_model"]),
    }
    return fields


def model_2(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields of Gemma 2."""
    fields = model(config)
    fields["attention"] |= layer_pattern(config, ("sliding", "global")) | {
        "softcap": config.get("attn_logit_softcapping"),
        "scale": config.require("query_pre_attn_scalar") ** -0.5,
    }
    fields["norm"]["placement"] = "sandwich"
    fields["embedding"]["logit_softcap"] = config.get("final_logit_softcapping")
    return fields


FAMILY = Family(("GemmaForCausalLM",), model, llama_like.rows)
FAMILY_2 = Family(("Gemma2ForCausalLM",), model_2, llama_like.rows)
