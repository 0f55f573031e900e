"""Gemma 3, its text models: norms of queries and keys; full and sliding layers rotate apart."""

from __future__ import annotations

from typing import Any

from jaxlm import positions
from jaxlm.interop import llama_like
from jaxlm.interop.families import gemma
from jaxlm.interop.family import Family
from jaxlm.interop.fields import KINDS, Derived, Fixed, Ignored, Layers
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.hub_rope import plain_rope, read_rope, write_scaling
from jaxlm.model.config import ModelConfig
from jaxlm.positions.by_kind import ByKind


def read_layers(config: HubConfig) -> dict[str, Any]:
    """Of early files sliding_window_pattern says that every so many layers one sees everything."""
    early = config.get("_sliding_window_pattern", 6, int)
    period = config.get("sliding_window_pattern", early, int)
    if period < 1:
        raise ValueError(f"{config.name}: sliding_window_pattern={period}; allowed: at least 1")
    slide = min(period - 1, config.require("num_hidden_layers", int))
    return Layers(("sliding",) * slide + ("global",), listed=True).read(config)


def read_rotations(config: HubConfig) -> dict[str, Any]:
    """RoPE of full and of sliding layers: in rope_parameters by the kind of layer, in early files
    under names of their own.
    """
    by_kind = dict(config.get("rope_parameters", {}, dict))
    config.unread |= {f"rope_parameters.{k}" for k in by_kind.keys() - KINDS.keys()}
    full = dict(by_kind.get("full_attention") or {}) | dict(config.get("rope_scaling", {}, dict))
    sliding = dict(by_kind.get("sliding_attention") or {})
    encoding = ByKind(
        read_rope(full, config, config.get("rope_theta", 1e6, float)),
        read_rope(sliding, config, config.get("rope_local_base_freq", 1e4, float)),
    )
    return {"position_encoding": encoding}


def write_rotations(config: ModelConfig) -> dict[str, Any]:
    """Under the early names, which later versions read too.

    Raises:
        ValueError: not RoPE, or a scaling in sliding layers.
    """
    encoding = positions.parse(config.position_encoding)
    full, sliding = (plain_rope(encoding.of_kind(kind)) for kind in KINDS.values())
    return {
        "rope_theta": float(full.base),
        "rope_local_base_freq": float(sliding.base),
        **write_scaling(full),
    }


FIELDS = (
    *llama_like.WIDTHS,
    *gemma.SINCE_2,
    Derived(read_layers, Layers(("global",), listed=True).write),
    Derived(read_rotations, write_rotations),
    Fixed("attention.qk_norm", "head"),
    Ignored("attn_logit_softcapping"),
)
FAMILY = Family(
    ("Gemma3ForCausalLM",), "gemma3_text", FIELDS, llama_like.rows, absent=gemma.ABSENT_2_AND_3
)
