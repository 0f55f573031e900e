"""Qwen 3: norms of queries and keys, no biases."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.families import qwen2
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Fixed

WITHOUT_LAYERS = (*llama_like.BIASED_ATTENTION, Fixed("attention.qk_norm", "head"))
FIELDS = (*WITHOUT_LAYERS, qwen2.LAYERS)
ABSENT = qwen2.ABSENT | {"head_dim": 128}
FAMILY = Family(("Qwen3ForCausalLM",), "qwen3", FIELDS, llama_like.rows, absent=ABSENT)
