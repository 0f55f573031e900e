"""GPT-J: attention and MLP side by side on one norm; neighbouring dims are rotated."""

from __future__ import annotations

from typing import Any

from jaxlm import positions
from jaxlm.interop.families import gpt2
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Derived, Field, Fixed, Key
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row, linear, norm
from jaxlm.model.config import ModelConfig
from jaxlm.positions.rope import RoPE

LAYER = "transformer.h.{layer}."


def read_rotation(config: HubConfig) -> dict[str, Any]:
    """The first rotary_dim dims of each head are rotated."""
    heads, width = config.require("n_head", int), config.require("n_embd", int)
    rotated = config.get("rotary_dim", width // heads, int)
    encoding = RoPE(fraction=rotated * heads / width, interleaved=True)
    return {"position_encoding": encoding}


def write_rotation(config: ModelConfig) -> dict[str, Any]:
    """The number of dims.

    Raises:
        ValueError: it is not RoPE.
    """
    encoding = positions.parse(config.position_encoding)
    if not isinstance(encoding, RoPE):
        raise ValueError(f"position_encoding={encoding}; allowed: rope(interleaved=True)")
    return {"rotary_dim": encoding.width(config.head_dim)}


FIELDS: tuple[Field, ...] = (
    *gpt2.SIZES,
    Derived(read_rotation, write_rotation),
    Fixed("feed_forward.parallel", "shared"),
    Fixed("embedding.head_bias", True),
    Key("tie_word_embeddings", "embedding.tied", False),
)


def rows(config: ModelConfig) -> list[Row]:
    """All tensors."""
    table = [
        Row("transformer.wte.weight", "embedding", "v d -> v d"),
        *norm("transformer.ln_f", "final_norm", True),
        *norm(f"{LAYER}ln_1", "attention_norm", True),
        *linear(f"{LAYER}attn.out_proj", "attention/out", "d (n h) -> n h d"),
        *linear(f"{LAYER}mlp.fc_in", "feed_forward/up", "o i -> i o", "o -> o"),
        *linear(f"{LAYER}mlp.fc_out", "feed_forward/down", "o i -> i o", "o -> o"),
        Row("lm_head.bias", "head_bias", "v -> v"),
    ]
    for name in ("q", "k", "v"):
        table += linear(f"{LAYER}attn.{name}_proj", f"attention/{name}", "(n h) d -> d n h")
    if not config.embedding.tied:
        table.append(Row("lm_head.weight", "head", "v d -> d v"))
    return table


FAMILY = Family(("GPTJForCausalLM",), "gptj", FIELDS, rows, absent={"rotary_dim": 64})
