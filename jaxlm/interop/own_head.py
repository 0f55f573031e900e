"""Copies of a shared matrix in a file, which may be none: a head beside the embedding."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from jaxlm.interop.family import Family
from jaxlm.interop.tensors import TIED_HEAD, Tensors
from jaxlm.model.config import ModelConfig

EMBEDDING = re.compile(r"^(encoder|decoder)\.embed_tokens\.weight$")  # T5's


def with_own_head(tensors: Tensors, family: Family, config: Any) -> Any:
    """The config; untied where the file has a head that is no copy of the embedding, as
    transformers then does.

    Raises:
        ValueError: such a head, its bias, or a half's embedding, where the family knows none.
    """
    names = {row.ours: row.theirs for row in family.rows(config)}
    if not isinstance(config, ModelConfig):  # T5 takes any head that is there
        for name in filter(EMBEDDING.search, sorted(tensors.shapes)):
            if not _equal(tensors, name, names["encoder/embedding"]):
                raise _no_copy(tensors, name, names["encoder/embedding"])
        return config
    if not config.embedding.tied:
        return config
    untied = config.replace(embedding=dataclasses.replace(config.embedding, tied=False))
    heads = {row.theirs for row in family.rows(untied) if row.ours == "head"}
    for name in filter(TIED_HEAD.search, sorted(tensors.shapes)):
        original = names.get("head_bias" if name.endswith(".bias") else "embedding")
        if original is None or _equal(tensors, name, original):
            continue
        if name in heads:
            return untied
        raise _no_copy(tensors, name, original)
    return config


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    """Whether they are, or the other is absent, which is told elsewhere."""
    if other not in tensors.shapes:
        return True
    alike = tensors.shapes[one] == tensors.shapes[other]
    return alike and np.array_equal(tensors.read(one), tensors.read(other))


def _no_copy(tensors: Tensors, name: str, original: str) -> ValueError:
    return ValueError(f"{tensors.name}: {name} is not {original}; allowed: a copy of it")
