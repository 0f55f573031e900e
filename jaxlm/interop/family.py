"""What a family of checkpoints is: a table of its config's keys and one of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.interop.fields import Field
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of the hub's.

    Attributes:
        architectures: its names in config.json; the first is written.
        model_type: its name for transformers' AutoConfig.
        fields: keys of config.json and what they say of a ModelConfig; of two that say the same
            the later one counts.
        rows: the tensors of a model, those of one layer standing for all.
        config: the class of its models' configs.
        absent: what transformers takes for keys that are not in a config.json, where null says
            another thing; null is then written as such.
    """

    architectures: tuple[str, ...]
    model_type: str
    fields: tuple[Field, ...]
    rows: Callable[[Any], list[Row]]
    config: type[ModelConfig] | type[EncoderDecoderConfig] = ModelConfig
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
