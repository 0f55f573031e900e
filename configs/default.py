"""Every field of a run with its default: what presets start from.

A preset changes a few of them; any other can be set on the command line, as in
`--config.model.num_layers=8 --config.train.optimizer.learning_rate=3e-4`.
"""

import dataclasses
import types
import typing

from ml_collections import ConfigDict, config_dict

from jaxlm.model.config import ModelConfig
from jaxlm.training.run import RunConfig


def fields(cls: type) -> ConfigDict:
    """A ConfigDict with the fields of a config dataclass; None defaults keep their type."""
    config = ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        part = getattr(cls, "PARTS", {}).get(field.name)
        default = field.default
        if part is not None and default is not None:
            config[field.name] = fields(part)
        elif default is dataclasses.MISSING or default is None:
            kind = object if part is not None else _type(hints[field.name])
            config[field.name] = config_dict.placeholder(kind)
        else:
            config[field.name] = default
    return config


def _type(hint: object) -> type:
    """The plain type within `X | None`; object where there is none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [o for o in options if isinstance(o, type) and o is not type(None)]
    return plain[0] if len(plain) == 1 else object


def get_config() -> ConfigDict:
    config = fields(RunConfig)
    config.model = fields(ModelConfig)
    config.model.context_length = config_dict.placeholder(int)  # the data's sequence length
    return config
