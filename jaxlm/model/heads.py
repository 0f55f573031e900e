"""The projections around attention: into heads, and back."""

from __future__ import annotations

from jaxlm.model.config import ModelConfig
from jaxlm.model.projection import Projection


def into_heads(config: ModelConfig, name: str, heads: int, axis: str) -> Projection:
    """[..., d_model] → [..., heads, head_dim]; `axis` is the heads' logical name."""
    return Projection(
        (config.d_model,),
        (heads, config.head_dim),
        ("embed", axis, "head_dim"),
        config.attention.qkv_bias,
        config.param_dtype,
        name=name,
    )


def out_of_heads(config: ModelConfig) -> Projection:
    """[..., heads, head_dim] → [..., d_model]."""
    return Projection(
        (config.attention.num_heads, config.head_dim),
        (config.d_model,),
        ("heads", "head_dim", "embed"),
        config.attention.out_bias,
        config.param_dtype,
        (2 * config.num_layers) ** -0.5,
        name="out",
    )
