"""Mixtral: Mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import mistral
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Fixed, Key
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

FIELDS = (
    *mistral.FIELDS,
    Rope(base=1e6),
    Key("num_local_experts", "moe.num_experts"),
    Key("num_experts_per_tok", "moe.top_k"),
    Key("router_aux_loss_coef", "moe.load_balance_weight", 0.0),
    Fixed("moe.router_z_weight", 0.0),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        *llama_like.expert_rows("block_sparse_moe.experts", "block_sparse_moe.gate", names),
    ]


ABSENT = {"num_key_value_heads": 8}
FAMILY = Family(("MixtralForCausalLM",), "mixtral", FIELDS, rows, absent=ABSENT)
