"""A table of small models in which every option of ModelConfig is used at least once.

`test_config.py` holds the table to that: a new option needs a line here, and the tests that run
over the table then cover it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jaxlm.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    NumericsConfig,
)
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer

VOCAB, LENGTH = 29, 13


def small(**changes: Any) -> ModelConfig:
    """Two layers of width 32; a part is given as a dict of the fields that differ."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 32,
        "context_length": 16,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "feed_forward": {"d_ff": 48},
    }
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    return ModelConfig.from_dict(values)


KINDS = (*FeedForwardConfig.GATED, *FeedForwardConfig.PLAIN)
# Five layers are two rounds of it and one layer more.
PATTERN = ("sliding", "global")
EXPERTS = {"num_experts": 5, "top_k": 2, "d_ff": 24}

CONFIGS: dict[str, ModelConfig] = {
    "base": small(),
    "mha": small(attention={"num_kv_heads": None}),
    "mqa": small(attention={"num_kv_heads": 1}),
    "head_dim": small(attention={"head_dim": 12}),
    "qkv_bias": small(attention={"qkv_bias": True}),
    "out_bias": small(attention={"out_bias": True}),
    "qk_norm_head": small(attention={"qk_norm": "head"}),
    "qk_norm_full": small(attention={"qk_norm": "full"}),
    "qk_layernorm": small(attention={"qk_norm": "head"}, norm={"kind": "layernorm", "bias": True}),
    "softcap": small(attention={"softcap": 0.7}),
    "scale": small(attention={"scale": 0.9}),
    "sink_logits": small(attention={"sink_logits": True}),
    "sliding": small(attention={"layer_pattern": ("sliding",), "sliding_window": 3}),
    "pattern": small(num_layers=5, attention={"layer_pattern": PATTERN, "sliding_window": 3}),
    "long_pattern": small(
        attention={"layer_pattern": ("sliding", "global", "global"), "sliding_window": 3}
    ),
    "reference": small(attention={"implementation": "reference"}),
    "blockwise": small(attention={"implementation": "blockwise"}),
    "block_sampled": small(attention={"implementation": "block_sampled"}),
    **{kind: small(feed_forward={"kind": kind}) for kind in KINDS},
    "default_width": small(feed_forward={"d_ff": None}),
    "feed_forward_bias": small(feed_forward={"bias": True}),
    "plain_bias": small(feed_forward={"bias": True, "kind": "gelu"}),
    "parallel_shared": small(feed_forward={"parallel": "shared"}),
    "parallel_separate": small(feed_forward={"parallel": "separate"}),
    "parallel_sandwich": small(
        feed_forward={"parallel": "separate"}, norm={"placement": "sandwich"}
    ),
    "experts": small(moe=EXPERTS),
    "experts_top_1": small(moe={**EXPERTS, "num_experts": 8, "top_k": 1}),
    "experts_unnormalized": small(moe={**EXPERTS, "normalize": False}),
    "experts_shared": small(moe={**EXPERTS, "num_shared_experts": 2}),
    "experts_wide": small(moe={**EXPERTS, "d_ff": None}),
    "experts_plain_bias": small(
        moe={**EXPERTS, "num_shared_experts": 1}, feed_forward={"kind": "gelu", "bias": True}
    ),
    "experts_gated_bias": small(moe=EXPERTS, feed_forward={"bias": True}),
    "experts_weights": small(
        moe={**EXPERTS, "load_balance_weight": 0.3, "router_z_weight": 0.2}, num_layers=3
    ),
    "experts_gated_shared": small(
        moe={**EXPERTS, "num_shared_experts": 1, "shared_d_ff": 40, "shared_gate": True}
    ),
    "gpt_oss_like": small(
        moe={**EXPERTS, "router_bias": True},
        feed_forward={"kind": "clamped_swiglu", "bias": True},
        attention={"sink_logits": True, "layer_pattern": PATTERN, "sliding_window": 3},
    ),
    "experts_parallel": small(moe=EXPERTS, feed_forward={"parallel": "shared"}),
    "layernorm": small(norm={"kind": "layernorm"}),
    "layernorm_bias": small(norm={"kind": "layernorm", "bias": True}),
    "no_scale": small(norm={"kind": "layernorm", "scale": False}),
    "no_scale_bias_qk": small(
        norm={"kind": "layernorm", "scale": False, "bias": True}, attention={"qk_norm": "head"}
    ),
    "clip_qkv": small(norm={"clip_qkv": 0.6}, attention={"qk_norm": "head"}),
    "post_norm": small(norm={"placement": "post"}),
    "residual_norm": small(norm={"placement": "residual"}),
    "sandwich_norm": small(norm={"placement": "sandwich"}),
    "epsilon": small(norm={"epsilon": 0.3}),
    "scale_plus_one": small(norm={"scale_plus_one": True}),
    "tied": small(embedding={"tied": True}),
    "embedding_scale": small(embedding={"scale": 5.5}),
    "embedding_norm": small(embedding={"norm": True, "scale": 5.5}, position_encoding="learned"),
    "token_types": small(embedding={"num_token_types": 3}),
    "head_transform": small(embedding={"head_transform": True}),
    "logit_scale": small(embedding={"logit_scale": 0.3}),
    "head_bias": small(embedding={"head_bias": True}),
    "tied_head_bias": small(embedding={"tied": True, "head_bias": True}),
    "logit_softcap": small(embedding={"logit_softcap": 0.8}),
    "bidirectional": small(attention={"layer_pattern": ("bidirectional",)}),
    "bidirectional_and_sliding": small(
        attention={"layer_pattern": ("bidirectional", "sliding"), "sliding_window": 3}
    ),
    "two_sided_t5": small(
        attention={"layer_pattern": ("bidirectional",)},
        position_encoding="t5(num_buckets=8, max_distance=6, bidirectional=True)",
    ),
    "t5": small(position_encoding="t5(num_buckets=6, max_distance=8)"),
    "learned_offset": small(position_encoding="learned(offset=2)"),
    "nope": small(position_encoding="nope"),
    "learned": small(position_encoding="learned"),
    "alibi": small(position_encoding="alibi"),
    "alibi_scale": small(position_encoding="alibi(scale=0.4)"),
    "partial_rope": small(position_encoding="rope(base=50, fraction=0.5)"),
    "by_kind": small(
        position_encoding="by_kind(rope(base=50, fraction=0.5), sliding=alibi)",
        num_layers=5,
        attention={"layer_pattern": PATTERN, "sliding_window": 3},
    ),
    "by_kind_rope": small(
        position_encoding="by_kind(rope(base=1000), sliding=rope(base=50))",
        attention={"layer_pattern": PATTERN, "sliding_window": 6},
    ),
    "unrolled": small(numerics={"scan_layers": False}),
    "remat_dots": small(numerics={"remat": "dots"}),
    "remat_full": small(
        numerics={"remat": "full"},
        num_layers=5,
        attention={"layer_pattern": PATTERN, "sliding_window": 3},
    ),
    "bfloat16": small(numerics={"dtype": "bfloat16"}),
    "bfloat16_params": small(numerics={"dtype": "bfloat16", "param_dtype": "bfloat16"}),
    "float16": small(numerics={"dtype": "float16", "param_dtype": "float16"}),
    "dropout": small(dropout=0.1),
    # Three families that combine many of them.
    "gemma_like": small(
        num_layers=3,
        attention={
            "layer_pattern": ("sliding", "global"),
            "sliding_window": 4,
            "softcap": 2.0,
            "qk_norm": "head",
            "head_dim": 16,
        },
        feed_forward={"kind": "geglu_tanh"},
        norm={"placement": "sandwich", "scale_plus_one": True},
        embedding={"tied": True, "scale": 32**0.5, "logit_softcap": 3.0},
    ),
    "bert_like": small(
        position_encoding="learned",
        attention={
            "num_kv_heads": None,
            "qkv_bias": True,
            "out_bias": True,
            "layer_pattern": ("bidirectional",),
        },
        feed_forward={"kind": "gelu", "bias": True},
        norm={"kind": "layernorm", "bias": True, "placement": "residual"},
        embedding={
            "tied": True,
            "num_token_types": 2,
            "norm": True,
            "head_transform": True,
            "head_bias": True,
        },
    ),
    "neox_like": small(
        position_encoding="rope(fraction=0.25)",
        attention={"num_kv_heads": None, "qkv_bias": True, "out_bias": True},
        feed_forward={"kind": "gelu", "bias": True, "parallel": "separate"},
        norm={"kind": "layernorm", "bias": True},
    ),
}

# Ends of the names of parameters that are no matrix.
VECTORS = ("scale", "bias", "sink_logits")

# Every class whose fields the table must use.
PARTS = {
    None: ModelConfig,
    "attention": AttentionConfig,
    "feed_forward": FeedForwardConfig,
    "moe": MoEConfig,
    "norm": NormConfig,
    "embedding": EmbeddingConfig,
    "numerics": NumericsConfig,
}

float32_configs = {n: c for n, c in CONFIGS.items() if c.numerics.dtype == "float32"}


def path_name(path: Any) -> str:
    """layers/block_0/attention/q/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def shapes(name: str) -> Any:
    """Of the parameters of a model of the table."""
    return abstract_params(Transformer(CONFIGS[name]))


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Normal numbers, small in matrices; nothing is 0 or 1, which would hide a mistake in its use.

    Drawn by NumPy: the library's own initialisation takes longer to compile than the model. Put
    on the device as they are: `jnp.asarray` compiles a program for each shape.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = path_name(path)
        values = rng.normal(size=x.shape) * (0.3 if name.endswith(VECTORS) else 32**-0.5)
        return jax.device_put(np.asarray(values + name.endswith("scale"), x.dtype))

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def make(name: str) -> tuple[Transformer, Any]:
    """The model of the table and random parameters."""
    return Transformer(CONFIGS[name]), random_params(shapes(name))


def packed_rows() -> tuple[jax.Array, jax.Array, jax.Array]:
    """tokens, positions and segment ids [2, LENGTH], int32.

    The first row holds documents of 5 and 6 tokens and padding; the second, behind padding, one
    document that starts at position 3.
    """
    tokens = np.random.default_rng(7).integers(0, VOCAB, (2, LENGTH), np.int32)
    positions = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0], [0, 0, *range(3, 14)]]
    segments = [[1] * 5 + [2] * 6 + [0] * 2, [0] * 2 + [1] * 11]
    return tuple(jax.device_put(np.asarray(x, np.int32)) for x in (tokens, positions, segments))


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Transformer, params: Any, *arrays: Any) -> jax.Array:
    """Of tokens, positions and segment ids."""
    return model.apply({"params": params}, *arrays)[0]
