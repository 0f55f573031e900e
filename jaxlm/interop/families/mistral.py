"""Mistral: Llama with a sliding window in every layer (7B v0.1) or in none."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Layers

FIELDS = (*llama_like.FIELDS, Layers(("sliding",), listed=False))
FAMILY = Family(("MistralForCausalLM",), "mistral", FIELDS, llama_like.rows)
