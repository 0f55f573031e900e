"""StableLM: Llama with LayerNorm, and only a part of each head rotated."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Derived, Fixed, Key, Only
from jaxlm.interop.hub_rope import Rope

PARALLEL = Derived(
    lambda config: {
        "feed_forward.parallel": "shared"
        if config.get("use_parallel_residual", False, bool)
        else "none"
    },
    lambda config: {"use_parallel_residual": config.feed_forward.parallel == "shared"},
)
FIELDS = (
    *llama_like.WIDTHS,
    # The share that the configs of transformers 4 leave out.
    Rope(partial=True, fraction=0.25),
    *llama_like.HEADS,
    llama_like.NO_ATTENTION_BIAS,
    Key("use_qkv_bias", "attention.qkv_bias", False),
    Fixed("attention.out_bias", False),
    llama_like.WIDTH,
    llama_like.NO_MLP_BIAS,
    Activation(GATED),
    *llama_like.LAYERNORM,
    Key("layer_norm_eps", "norm.epsilon"),
    llama_like.TIED,
    PARALLEL,
    # Norms of queries and keys, each head with a scale of its own.
    Only("qk_layernorm", False),
)
ABSENT = {"num_key_value_heads": 32}
FAMILY = Family(("StableLmForCausalLM",), "stablelm", FIELDS, llama_like.rows, absent=ABSENT)
