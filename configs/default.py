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
    """A ConfigDict with the fields of a config dataclass; None defaults keep their type.

    A part that is off by default (experts, a comparison) shows its fields too: it is on as soon as
    its first one is set, as in `--config.model.moe.num_experts=8`.
    """
    config = ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        part = getattr(cls, "PARTS", {}).get(field.name)
        default = field.default
        if part is not None:
            config[field.name] = fields(part)
        elif default is dataclasses.MISSING or default is None:
            config[field.name] = config_dict.placeholder(_type(hints[field.name]))
        else:
            config[field.name] = default
    return config


def blank(cls: type) -> ConfigDict:
    """The same fields, each None until it is set."""
    config = ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        part = getattr(cls, "PARTS", {}).get(field.name)
        empty = config_dict.placeholder(_type(hints[field.name])) if part is None else blank(part)
        config[field.name] = empty
    return config


def _type(hint: object) -> type:
    """The plain type within `X | None`; object where there is none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = [typing.get_origin(o) or o for o in options]
    plain = [o for o in options if isinstance(o, type) and o is not type(None)]
    return plain[0] if len(plain) == 1 else object


def get_config() -> ConfigDict:
    config = fields(RunConfig)
    with config.ignore_type():  # it was the placeholder of a mapping
        config.model = fields(ModelConfig)
    config.model.context_length = config_dict.placeholder(int)  # the data's sequence length
    return config
