"""RoPE as config.json tells it: `rope_theta` and `rope_scaling`, or `rope_parameters` with both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
        partial: whether the family rotates a share of a head if told to; others do not ask.
        fraction: the share that is rotated, where the config is silent.
        base: the same of the frequencies' base.
        silent: the same of rope_scaling.
        fraction_key, base_key: their names outside of rope_scaling.
    """

    partial: bool = False
    fraction: float = 1.0
    base: float = 10000.0
    silent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fraction_key: str = "partial_rotary_factor"
    base_key: str = "rope_theta"

    def read(self, config: HubConfig) -> dict[str, Any]:
        """The encoding.

        Raises:
            ValueError: a kind of scaling that is not known.
        """
        both = config.get("rope_parameters", self.silent, dict)
        values = config.get("rope_scaling", {}, dict) or both
        base = config.get(self.base_key, self.base, float)
        share = config.get(self.fraction_key, self.fraction, float)
        return {"position_encoding": read_rope(values, config, base, share, self.partial)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The base, the share and, in rope_scaling, the scaling.

        Raises:
            ValueError: it is not RoPE, its scaling is one that the hub has no name for, or a share
                is rotated in a family that does not ask.
        """
        encoding = plain_rope(positions.parse(config.position_encoding))
        keys: dict[str, Any] = {self.base_key: float(encoding.base)}
        if self.partial:
            keys[self.fraction_key] = float(encoding.fraction)
        elif encoding.fraction != 1:
            raise ValueError(f"position_encoding={encoding}; allowed: fraction=1")
        scaling = write_scaling(encoding)
        return keys | (scaling or ({"rope_scaling": PLAIN} if self.silent else {}))


def plain_rope(encoding: PositionEncoding) -> RoPE:
    """The encoding, once it is sure to be RoPE and none of those built on it.

    Raises:
        ValueError: it is another.
    """
    if type(encoding) is not RoPE:
        raise ValueError(f"position_encoding={encoding}; allowed: rope")
    return encoding


def read_rope(
    values: Mapping[str, Any],
    config: HubConfig,
    base: float,
    fraction: float = 1.0,
    partial: bool = False,
) -> RoPE:
    """The encoding that rope_scaling's or rope_parameters' values tell.

    Args:
        values: of either.
        config: around it.
        base, fraction: what their silence means.
        partial: whether the family rotates a share of a head; others fail at one in a scaling.

    Raises:
        ValueError: a kind of scaling that is not known, or a word of it.
    """
    inner = HubConfig(values, f"{config.name}: rope_scaling")
    share = float(inner.get("partial_rotary_factor", fraction, float))
    scaling = _scaling(inner, values, config)
    if scaling is not None and share != 1 and not partial:
        raise ValueError(f"{inner.name}: partial_rotary_factor={share}; allowed: 1 in this family")
    base = float(inner.get("rope_theta", base, float))
    return RoPE(base, fraction=share if partial else 1.0, scaling=scaling)


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
    said = {k: _written(k, v) for k, v in said.items() if v is not None}
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
    DynamicNTK: {"factor": "factor"},
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


# All that transformers reads of any kind; of the others a word says nothing.
WORDS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"),
        *(theirs for names in NAMES.values() for theirs in names.values()),
    }
)
PLAIN = {"rope_type": "default"}


def _scaling(inner: HubConfig, values: Mapping[str, Any], config: HubConfig) -> RopeScaling | None:
    kind = inner.get("rope_type", inner.get("type", "default", str), str)
    kinds = {name: cls for cls, name in KINDS.items()}
    if kind != "default" and kind not in kinds:
        known = ", ".join(["default", *kinds])
        raise ValueError(f"{config.name}: rope_type={kind!r}; allowed: {known}")
    names = NAMES[kinds[kind]] if kind in kinds else {}
    given = {k: v for k, v in values.items() if v is not None}
    if unknown := sorted(given.keys() - WORDS):
        known = ", ".join(sorted(WORDS))
        raise ValueError(f"{inner.name}: {unknown[0]} is not known; allowed: {known}")
    outside = config.get("original_max_position_embeddings", None, int)
    if kind == "default":
        return None
    longest = config.require("max_position_embeddings", int)
    told = {n: inner.get(k, None, bool | float | list) for n, k in names.items() if k in given}
    fields: dict[str, Any] = {n: _plain(value) for n, value in told.items()}
    if "original_length" in names:
        # The outer one counts, if there are two.
        inside = int(fields.get("original_length", longest))
        fields["original_length"] = inside if outside is None else outside
    if kind == "dynamic":
        fields["original_length"] = longest
    if kind == "longrope":
        fields["factor"] = max(longest / fields["original_length"], 1.0)
    if "attention_factor" in names and "attention_factor" not in fields:
        fields |= _attention_factor(kind, inner, fields)
    required = [f.name for f in dataclasses.fields(kinds[kind]) if f.default is dataclasses.MISSING]
    absent = [names.get(n, n) for n in required if n not in fields]
    if absent:
        raise ValueError(f"{config.name}: rope_scaling has no {absent[0]}; allowed: one with it")
    return kinds[kind](**fields)


def _attention_factor(kind: str, inner: HubConfig, fields: dict[str, Any]) -> dict[str, float]:
    """The factor on cos and sin, where keys say another than the formula of the lengths."""
    factor = inner.get("factor", None, float)
    if factor is None or factor <= 1:
        return {} if factor is None or kind == "yarn" else {"attention_factor": 1.0}
    if kind == "yarn":
        two = [inner.get(key, 0.0, float) for key in ("mscale", "mscale_all_dim")]
        over, under = (0.1 * scale * math.log(factor) + 1 for scale in two)
        return {"attention_factor": over / under} if all(two) else {}
    if math.isclose(factor, fields["factor"]):
        return {}
    longer = math.log(factor) / math.log(fields["original_length"])
    return {"attention_factor": math.sqrt(1 + longer)}


def _written(key: str, value: Any) -> Any:
    """As others read it: only lengths are integers."""
    if isinstance(value, bool) or key in ORIGINAL.values():
        return value
    return [float(v) for v in value] if isinstance(value, tuple) else float(value)


def _plain(value: Any) -> Any:
    """Floats for numbers, which may be written as integers."""
    if isinstance(value, bool):
        return value
    return tuple(float(v) for v in value) if isinstance(value, list) else float(value)
