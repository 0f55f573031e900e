"""RoPE as config.json tells it: `rope_theta` and `rope_scaling`, or `rope_parameters` with both."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm import positions
from jaxlm.interop.hub_config import HubConfig
from jaxlm.model.config import ModelConfig
from jaxlm.positions import PositionEncoding
from jaxlm.positions.rope import RoPE
from jaxlm.positions.rope_scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RopeScaling,
    YaRN,
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The position encoding.

    Written under the names of transformers 4, which later versions read too.

    Attributes:
        fraction: the share of a head that is rotated, where the config is silent.
        base: the same of the frequencies' base.
        fraction_key, base_key: their names outside of rope_scaling.
    """

    fraction: float = 1.0
    base: float = 10000.0
    fraction_key: str = "partial_rotary_factor"
    base_key: str = "rope_theta"

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The encoding.

        Raises:
            ValueError: a kind of scaling that is not known.
        """
        scaling, both = (config.get(k, {}, dict) for k in ("rope_scaling", "rope_parameters"))
        base = config.get(self.base_key, self.base, float)
        share = config.get(self.fraction_key, self.fraction, float)
        values = scaling | both
        return {"position_encoding": read_rope(values, config, base, share)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The base, the share and, in rope_scaling, the scaling.

        Raises:
            ValueError: it is not RoPE, or its scaling is one that the hub has no name for.
        """
        encoding = plain_rope(positions.parse(config.position_encoding))
        keys = {self.base_key: encoding.base, self.fraction_key: encoding.fraction}
        return keys | write_scaling(encoding)


def plain_rope(encoding: PositionEncoding) -> RoPE:
    """The encoding, once it is sure to be RoPE and none of those built on it.

    Raises:
        ValueError: it is another.
    """
    if type(encoding) is not RoPE:
        raise ValueError(f"position_encoding={encoding}; allowed: rope")
    return encoding


def read_rope(values: dict[str, Any], config: HubConfig, base: float, fraction: float) -> RoPE:
    """The encoding that rope_scaling's or rope_parameters' values tell; `base` and `fraction` are
    what their silence means.

    Raises:
        ValueError: a kind of scaling that is not known.
    """
    inner = HubConfig(values, f"{config.name}: rope_scaling")
    return RoPE(
        base=float(inner.get("rope_theta", base, float)),
        fraction=float(inner.get("partial_rotary_factor", fraction, float)),
        scaling=_scaling(values, config),
    )


def write_scaling(encoding: RoPE) -> dict[str, Any]:
    """rope_scaling, if there is one, and LongRoPE's trained length, which its readers look for
    outside of it.

    Raises:
        ValueError: a scaling that the hub has no name for.
    """
    scaling = encoding.scaling
    if scaling is None:
        return {}
    if type(scaling) not in NAMES:
        known = ", ".join(kind.name for kind in NAMES)
        raise ValueError(f"position_encoding={encoding}; allowed: scaling is {known}")
    said = {theirs: getattr(scaling, ours) for ours, theirs in NAMES[type(scaling)].items()}
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}
    said = {k: v for k, v in said.items() if v is not None}
    outside = {}
    if type(scaling) is LongRoPE:
        trained = "original_max_position_embeddings"
        outside[trained] = said.pop(trained)
    return outside | {"rope_scaling": {"rope_type": KINDS[type(scaling)], **said}}


ORIGINAL = {"original_length": "original_max_position_embeddings"}
KINDS: dict[type[RopeScaling], str] = {
    Linear: "linear",
    DynamicNTK: "dynamic",
    YaRN: "yarn",
    LongRoPE: "longrope",
    Llama3: "llama3",
}
# Of each kind our fields and theirs.
NAMES: dict[type[RopeScaling], dict[str, str]] = {
    Linear: {"factor": "factor"},
    DynamicNTK: {"factor": "factor", **ORIGINAL},
    YaRN: {
        "factor": "factor",
        **ORIGINAL,
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
    LongRoPE: {
        **ORIGINAL,
        "short": "short_factor",
        "long": "long_factor",
        "attention_factor": "attention_factor",
    },
    Llama3: {
        "factor": "factor",
        **ORIGINAL,
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
}


def _scaling(values: dict[str, Any], config: HubConfig) -> RopeScaling | None:
    inner = HubConfig(values, f"{config.name}: rope_scaling")
    kind = inner.get("rope_type", inner.get("type", "default", str), str)
    kinds = {name: cls for cls, name in KINDS.items()}
    if kind != "default" and kind not in kinds:
        known = ", ".join(["default", *kinds])
        raise ValueError(f"{config.name}: rope_type={kind!r}; allowed: {known}")
    names = NAMES[kinds[kind]] if kind in kinds else {}
    known_keys = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names.values()}
    given = {k: v for k, v in values.items() if v is not None}
    config.unread |= {f"rope_scaling.{k}" for k in given.keys() - known_keys}
    if kind == "default":
        return None
    longest = config.require("max_position_embeddings", int)
    trained = config.get("original_max_position_embeddings", longest, int)
    told = {n: inner.get(k, None, bool | float | list) for n, k in names.items() if k in given}
    fields: dict[str, Any] = {n: _plain(value) for n, value in told.items()}
    if "original_length" in names:
        fields["original_length"] = int(fields.get("original_length", trained))
    if kind == "longrope":
        fields["factor"] = longest / fields["original_length"]
    required = [f.name for f in dataclasses.fields(kinds[kind]) if f.default is dataclasses.MISSING]
    absent = [names[n] for n in required if n not in fields]
    if absent:
        raise ValueError(f"{config.name}: rope_scaling has no {absent[0]}; allowed: one with it")
    return kinds[kind](**fields)


def _plain(value: Any) -> Any:
    """Floats for numbers, which may be written as integers."""
    if isinstance(value, bool):
        return value
    return tuple(float(v) for v in value) if isinstance(value, list) else float(value)
