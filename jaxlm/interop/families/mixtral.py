"""Mixtral: Mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.families import mistral
from jaxlm.interop.family import Family, HubConfig
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields."""
    return mistral.model(config) | {
        "moe": {
            "num_experts": config.require("num_local_experts"),
            "top_k": config.require("num_experts_per_tok"),
            "load_balance_weight": config.get("router_aux_loss_coef", 0.0),
            "router_z_weight": 0.0,
        }
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.expert_rows("block_sparse_moe.experts", "block_sparse_moe.gate", names),
    ]


FAMILY = Family(("MixtralForCausalLM",), model, rows)
