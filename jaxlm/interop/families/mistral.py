"""Mistral: Llama with a sliding window in every layer (7B v0.1) or in none."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Layers

FIELDS = (*llama_like.BARE, Layers(("sliding",), listed=False))
ABSENT = {"sliding_window": 4096, "num_key_value_heads": 8}
FAMILY = Family(("MistralForCausalLM",), "mistral", FIELDS, llama_like.rows, absent=ABSENT)
