"""Qwen 2 and 1.5 with a mixture of experts, and beside it an MLP that each token weighs."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen2, qwen3_moe
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Fixed, Key
from jaxlm.interop.llama_like import LAYER, MATRICES
from jaxlm.interop.rows import Row, linear
from jaxlm.model.config import ModelConfig

FIELDS = (
    *llama_like.FIELDS,
    Key("qkv_bias", "attention.qkv_bias", True),
    Fixed("attention.out_bias", False),
    qwen2.LAYERS,
    *qwen3_moe.EXPERTS,
    Fixed("moe.num_shared_experts", 1),
    Fixed("moe.shared_gate", True),
    Derived(
        lambda config: {"moe.shared_d_ff": config.require("shared_expert_intermediate_size", int)},
        lambda config: {"shared_expert_intermediate_size": config.shared_d_ff},
    ),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    table = qwen3_moe.rows(config)
    for ours, theirs in MATRICES.items():
        path = f"experts/shared/{ours}"
        table += linear(f"{LAYER}mlp.shared_expert.{theirs}", path, "o i -> i o")
    return table + linear(f"{LAYER}mlp.shared_expert_gate", "experts/shared_gate", "o i -> i o")


FAMILY = Family(("Qwen2MoeForCausalLM",), "qwen2_moe", FIELDS, rows)
