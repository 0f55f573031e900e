"""A file's head beside the embedding that its config says it shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxlm.interop.family import Family
from jaxlm.interop.tensors import TIED_HEAD, Tensors
from jaxlm.model.config import ModelConfig


def with_own_head(tensors: Tensors, family: Family, config: Any) -> Any:
    """The config; untied where the file has a head that is no copy of the embedding, as
    transformers then does.

    Raises:
        ValueError: such a head, or its bias, where the family knows none beside the embedding.
    """
    if not isinstance(config, ModelConfig) or not config.embedding.tied:
        return config  # T5 takes any head that is there
    untied = config.replace(embedding=dataclasses.replace(config.embedding, tied=False))
    heads = {row.theirs for row in family.rows(untied) if row.ours == "head"}
    names = {row.ours: row.theirs for row in family.rows(config)}
    for name in filter(TIED_HEAD.search, sorted(tensors.shapes)):
        original = names.get("head_bias" if name.endswith(".bias") else "embedding")
        if original is None or original not in tensors.shapes or _equal(tensors, name, original):
            continue
        if name in heads:
            return untied
        raise ValueError(f"{tensors.name}: {name} is not {original}; allowed: a copy of it")
    return config


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    alike = tensors.shapes[one] == tensors.shapes[other]
    return alike and np.array_equal(tensors.read(one), tensors.read(other))
