"""GPT-NeoX and Pythia: attention and MLP side by side, each with a norm of its own."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import PLAIN, Activation, Derived, Fixed, Key
from jaxlm.interop.hub_rope import Rope
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig

LAYER = "gpt_neox.layers.{layer}."
PARALLEL = Derived(
    lambda config: {
        "feed_forward.parallel": "separate"
        if config.get("use_parallel_residual", True, bool)
        else "none"
    },
    lambda config: {"use_parallel_residual": config.feed_forward.parallel == "separate"},
)
FIELDS = (
    *llama_like.WIDTHS,
    # Under the names of transformers 4; later files have rope_parameters.
    Rope(partial=True, fraction=0.25, fraction_key="rotary_pct", base_key="rotary_emb_base"),
    Key("num_attention_heads", "attention.num_heads"),
    Key("attention_bias", "attention.qkv_bias attention.out_bias", True),
    Key("intermediate_size", "feed_forward.d_ff"),
    Activation(PLAIN),
    Fixed("feed_forward.bias", True),
    PARALLEL,
    *llama_like.LAYERNORM,
    Key("layer_norm_eps", "norm.epsilon"),
    llama_like.TIED,
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors; each head's query, key and value rows stand together."""
    heads, a = "attention/q attention/k attention/v", config.attention
    in_bias = "(g p h) -> (g p) h" if a.qkv_bias else None
    out_bias = "d -> d" if a.out_bias else None
    table = [
        Row("gpt_neox.embed_in.weight", "embedding", "v d -> v d"),
        *norm("gpt_neox.final_layer_norm", "final_norm", True),
        *norm(f"{LAYER}input_layernorm", "attention_norm", True),
        *norm(f"{LAYER}post_attention_layernorm", "feed_forward_norm", True),
        *linear(
            f"{LAYER}attention.query_key_value",
            heads,
            "(g p h) d -> d (g p) h",
            in_bias,
            groups=a.num_heads,
        ),
        *linear(f"{LAYER}attention.dense", "attention/out", "d (n h) -> n h d", out_bias),
        *linear(f"{LAYER}mlp.dense_h_to_4h", "feed_forward/up", "o i -> i o", "o -> o"),
        *linear(f"{LAYER}mlp.dense_4h_to_h", "feed_forward/down", "o i -> i o", "o -> o"),
    ]
    if not config.embedding.tied:
        table.append(Row("embed_out.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("GPTNeoXForCausalLM",), "gpt_neox", FIELDS, rows)
