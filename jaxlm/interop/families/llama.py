"""Llama 1 to 3, and models that say they are: SmolLM, SmolLM2, Yi, …."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family

FAMILY = Family(("LlamaForCausalLM",), "llama", llama_like.FIELDS, llama_like.rows)
