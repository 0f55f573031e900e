"""gpt-oss: experts in every layer with biases and a clamped SwiGLU, sink logits, YaRN."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Fixed, Key, Layers, Only
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.llama_like import LAYER
from jaxlm.interop.rows import Row, linear
from jaxlm.model.config import ModelConfig
from jaxlm.model.feed_forward import LIMIT, STEEPNESS

# What rope_scaling's absence means.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
ABSENT = {"sliding_window": 128, "head_dim": 64, "num_key_value_heads": 8}
FIELDS = (
    *llama_like.WIDTHS,
    Rope(base=150_000.0, silent=YARN),
    *llama_like.HEADS,
    Key("attention_bias", "attention.qkv_bias attention.out_bias", True),
    Fixed("attention.sink_logits", True),
    Layers(("sliding", "global"), listed=True),
    llama_like.WIDTH,
    Fixed("feed_forward.kind", "clamped_swiglu"),
    Fixed("feed_forward.bias", True),
    Only("hidden_act", "silu"),
    Only("swiglu_alpha", STEEPNESS),
    Only("swiglu_limit", LIMIT),
    Key("num_local_experts num_experts", "moe.num_experts"),
    Key("num_experts_per_tok experts_per_token", "moe.top_k"),
    Fixed("moe.router_bias", True),
    Key("router_aux_loss_coef", "moe.load_balance_weight", 0.0),
    Fixed("moe.router_z_weight", 0.0),
    *llama_like.RMSNORM,
    llama_like.TIED,
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors; a layer's experts stand in one, columns of gate and up in turn."""
    experts, halves = f"{LAYER}mlp.experts.", "experts/gate experts/up"
    biases, width = "experts/gate_bias experts/up_bias", config.d_ff
    return [
        *llama_like.other_rows(config),
        *llama_like.attention_rows(config),
        Row(f"{LAYER}self_attn.sinks", "attention/sink_logits", "n -> n"),
        *linear(f"{LAYER}mlp.router", "experts/router", "e d -> d e", "e -> e"),
        Row(f"{experts}gate_up_proj", halves, "e d (g p) -> e d (g p)", groups=width),
        Row(f"{experts}gate_up_proj_bias", biases, "e (g p) -> e (g p)", groups=width),
        Row(f"{experts}down_proj", "experts/down", "e i o -> e i o"),
        Row(f"{experts}down_proj_bias", "experts/down_bias", "e o -> e o"),
    ]


FAMILY = Family(("GptOssForCausalLM",), "gpt_oss", FIELDS, rows, absent=ABSENT)
