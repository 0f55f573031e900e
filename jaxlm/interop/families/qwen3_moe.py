"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen3
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Field, Fixed, Key, Only
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
FIELDS = (*qwen3.FIELDS, *EXPERTS)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.expert_rows("mlp.experts", "mlp.gate"),
    ]


FAMILY = Family(("Qwen3MoeForCausalLM",), "qwen3_moe", FIELDS, rows)
