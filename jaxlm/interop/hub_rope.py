"""RoPE as config.json tells it: `rope_theta` and `rope_scaling`, or `rope_parameters` with both."""

from __future__ import annotations

from typing import Any

from jaxlm.interop.family import HubConfig
from jaxlm.positions.rope import RoPE
from jaxlm.positions.rope_scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RopeScaling,
    YaRN,
)


def rope(config: HubConfig) -> RoPE:
    """The encoding.

    Raises:
        ValueError: a kind of scaling that is not known.
    """
    values = dict(config.get("rope_scaling", {})) | dict(config.get("rope_parameters", {}))
    base = float(values.get("rope_theta") or config.get("rope_theta", 10000.0))
    fraction = values.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    return RoPE(base=base, fraction=float(fraction), scaling=_scaling(values, config))


def _scaling(values: dict[str, Any], config: HubConfig) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    trained = config.get("original_max_position_embeddings")
    trained = values.get("original_max_position_embeddings") or trained
    if trained is None:
        trained = config.require("max_position_embeddings")
    factor = float(values.get("factor") or 1.0)
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor=factor)
    if kind == "dynamic":
        return DynamicNTK(factor=factor, original_length=trained)
    if kind == "yarn":
        return YaRN(
            factor=factor,
            original_length=trained,
            beta_fast=float(values.get("beta_fast") or 32.0),
            beta_slow=float(values.get("beta_slow") or 1.0),
            attention_factor=values.get("attention_factor"),
        )
    if kind == "longrope":
        return LongRoPE(
            factor=config.require("max_position_embeddings") / trained,
            original_length=trained,
            short=tuple(float(f) for f in values["short_factor"]),
            long=tuple(float(f) for f in values["long_factor"]),
            attention_factor=values.get("attention_factor"),
        )
    if kind == "llama3":
        return Llama3(
            factor=factor,
            original_length=trained,
            low_frequency_factor=float(values["low_freq_factor"]),
            high_frequency_factor=float(values["high_freq_factor"]),
        )
    known = "default, linear, dynamic, yarn, longrope, llama3"
    raise ValueError(f"{config.name}: rope_type={kind!r}; allowed: {known}")
