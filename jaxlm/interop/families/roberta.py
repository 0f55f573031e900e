"""RoBERTa and XLM-R (multilingual E5, BGE-M3): BERT, with positions behind that of padding."""

from __future__ import annotations

from typing import Any

from jaxlm import positions
from jaxlm.interop.families import bert
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig
from jaxlm.positions.learned import Learned


def read_positions(config: HubConfig) -> dict[str, Any]:
    """Position 0 is in the row after the padding's."""
    offset = config.get("pad_token_id", 1, int) + 1
    return {
        "position_encoding": Learned(offset=offset),
        "context_length": config.require("max_position_embeddings", int) - offset,
    }


def write_positions(config: ModelConfig) -> dict[str, Any]:
    """All rows, and the padding's.

    Raises:
        ValueError: no learned positions, or no row before that of position 0.
    """
    encoding = positions.parse(config.position_encoding)
    if not isinstance(encoding, Learned) or encoding.offset < 1:
        raise ValueError(f"position_encoding={encoding}; allowed: learned(offset=2)")
    rows = config.context_length + encoding.offset
    return {"max_position_embeddings": rows, "pad_token_id": encoding.offset - 1}


FIELDS = (*bert.ENCODER, Derived(read_positions, write_positions))


def masked_lm_rows(config: ModelConfig) -> list[Row]:
    """The encoder's and its head's."""
    names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    return [*bert.encoder_rows("roberta."), *bert.head_rows(*names)]


FAMILIES = tuple(
    family
    for name, model_type in (("XLMRoberta", "xlm-roberta"), ("Roberta", "roberta"))
    for family in (
        Family((f"{name}Model",), model_type, FIELDS, bert.body_rows),
        Family((f"{name}ForMaskedLM",), model_type, (*FIELDS, *bert.MASKED_LM), masked_lm_rows),
    )
)
