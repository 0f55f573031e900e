"""OLMo 2: norms after the sublayers, queries and keys normed over all heads."""

from __future__ import annotations

from jaxlm.interop import llama_like
from jaxlm.interop.family import Family
from jaxlm.interop.fields import Fixed

FIELDS = (
    *llama_like.BIASED_ATTENTION,
    Fixed("attention.qk_norm", "full"),
    Fixed("norm.placement", "post"),
)
FAMILY = Family(("Olmo2ForCausalLM",), "olmo2", FIELDS, llama_like.rows)
