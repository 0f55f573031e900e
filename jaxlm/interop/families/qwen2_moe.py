"""Qwen 2 and 1.5 with a mixture of experts, and beside it an MLP that each token weighs."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen2, qwen3_moe
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Fixed, Key, layer_fields
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.llama_like import LAYER, MATRICES
from jaxlm.interop.rows import Row, linear
from jaxlm.model.config import ModelConfig


def read_layers(config: HubConfig) -> dict[str, Any]:
    """Without layer_types every second of the first max_window_layers slides."""
    if config.get("layer_types") is not None or not config.get("use_sliding_window", False, bool):
        return qwen2.read_layers(config)
    last, layers = (
        config.get("max_window_layers", 28, int),
        config.require("num_hidden_layers", int),
    )
    kinds = ["sliding" if i % 2 == 0 and i < last else "global" for i in range(layers)]
    return layer_fields(kinds, config.get("sliding_window", None, int))


FIELDS = (
    *llama_like.BARE,
    Key("qkv_bias", "attention.qkv_bias", True),
    Fixed("attention.out_bias", False),
    Derived(read_layers, qwen2.write_layers),
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


ABSENT = qwen2.WINDOW | {"num_key_value_heads": 16}
FAMILY = Family(("Qwen2MoeForCausalLM",), "qwen2_moe", FIELDS, rows, absent=ABSENT)
