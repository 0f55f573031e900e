"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen2, qwen3
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Field, Fixed, Ignored, Key, Only, layer_fields
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

EXPERTS: tuple[Field, ...] = (
    # Some layers could have a dense MLP, or every second.
    Only("mlp_only_layers", []),
    Only("decoder_sparse_step", 1),
    # Its name before transformers 5 and after.
    Key("num_experts num_local_experts", "moe.num_experts"),
    Key("num_experts_per_tok", "moe.top_k"),
    Key("moe_intermediate_size", "moe.d_ff"),
    Key("norm_topk_prob", "moe.normalize", False),
    Key("router_aux_loss_coef", "moe.load_balance_weight", 0.0),
    Fixed("moe.router_z_weight", 0.0),
)


def read_layers(config: HubConfig) -> dict[str, Any]:
    """All slide or none: transformers asks neither for layer_types nor for max_window_layers."""
    window = config.get("sliding_window", None, int)
    slides = config.get("use_sliding_window", False, bool)
    return layer_fields(["sliding"], window if slides else None)


def write_layers(config: ModelConfig) -> dict[str, Any]:
    """The window, from the first layer on for those who do ask."""
    window = config.attention.sliding_window
    said = {"use_sliding_window": window is not None, "sliding_window": window}
    return said | ({} if window is None else {"max_window_layers": 0})


FIELDS = (
    *qwen3.WITHOUT_LAYERS,
    Derived(read_layers, write_layers),
    Ignored("max_window_layers"),
    *EXPERTS,
)
ABSENT = qwen2.WINDOW | {"num_key_value_heads": 4}


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.expert_rows("mlp.experts", "mlp.gate"),
    ]


FAMILY = Family(("Qwen3MoeForCausalLM",), "qwen3_moe", FIELDS, rows, absent=ABSENT)
