"""Qwen 3: norms of queries and keys, no biases."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen2
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Fixed

FIELDS = (*llama_like.FIELDS, Fixed("attention.qk_norm", "head"), qwen2.LAYERS)
FAMILY = Family(("Qwen3ForCausalLM",), "qwen3", FIELDS, llama_like.rows)
