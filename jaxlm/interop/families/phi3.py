"""Phi-3 and Phi-4: Llama with fused projections, LongRoPE in the long ones."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Layers
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.llama_like import LAYER
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

FIELDS = (
    *llama_like.WIDTHS,
    Rope(partial=True),
    *llama_like.HEADS,
    llama_like.NO_ATTENTION_BIAS,
    llama_like.WIDTH,
    llama_like.NO_MLP_BIAS,
    Activation(GATED),
    *llama_like.RMSNORM,
    llama_like.TIED,
    Layers(("sliding",), listed=False),
)
# Whatever rope_scaling says.
ABSENT = {"original_max_position_embeddings": 4096}


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    heads = " ".join(f"attention/{name}/kernel" for name in ("q", "k", "v"))
    gate_up = " ".join(f"feed_forward/{name}/kernel" for name in ("gate", "up"))
    return [
        *llama_like.other_rows(config),
        Row(f"{LAYER}self_attn.qkv_proj.weight", heads, "(p h) d -> d p h"),
        Row(f"{LAYER}self_attn.o_proj.weight", "attention/out/kernel", "d (n h) -> n h d"),
        Row(f"{LAYER}mlp.gate_up_proj.weight", gate_up, "p d -> d p"),
        Row(f"{LAYER}mlp.down_proj.weight", "feed_forward/down/kernel", "o i -> i o"),
    ]


FAMILY = Family(("Phi3ForCausalLM",), "phi3", FIELDS, rows, absent=ABSENT)
