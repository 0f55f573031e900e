"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen3
from jaxlm.interop.family import Family, HubConfig
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig


def model(config: HubConfig) -> dict[str, Any]:
    """ModelConfig's fields.

    Raises:
        ValueError: some layers have a dense MLP.
    """
    config.only("mlp_only_layers", [])
    config.only("decoder_sparse_step", 1)
    return qwen3.model(config) | {
        "moe": {
            # Its name before transformers 5 and after.
            "num_experts": config.get("num_experts") or config.require("num_local_experts"),
            "top_k": config.require("num_experts_per_tok"),
            "d_ff": config.require("moe_intermediate_size"),
            "normalize": config.get("norm_topk_prob", False),
            "load_balance_weight": config.get("router_aux_loss_coef", 0.0),
            "router_z_weight": 0.0,
        }
    }


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.expert_rows("mlp.experts", "mlp.gate"),
    ]


FAMILY = Family(("Qwen3MoeForCausalLM",), model, rows)
