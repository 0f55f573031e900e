"""The families that are known, one file each."""

from jaxlm.interop.families import (
    bert,
    bloom,
    falcon,
    gemma,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    roberta,
    stablelm,
    starcoder2,
    t5,
)
from jaxlm.interop.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    bert.FAMILY_MASKED_LM,
    bloom.FAMILY,
    falcon.FAMILY,
    gemma.FAMILY,
    gemma.FAMILY_2,
    gemma3.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gpt_oss.FAMILY,
    gptj.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    mpt.FAMILY,
    olmo.FAMILY,
    olmo2.FAMILY,
    phi3.FAMILY,
    qwen2.FAMILY,
    qwen2_moe.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    *roberta.FAMILIES,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    t5.FAMILY,
    t5.FAMILY_M,
)


def find(architecture: str, where: str) -> Family:
    """The family of an architecture's name, or the first of a model_type.

    Raises:
        ValueError: it is not known; those that are, are listed.
    """
    for family in FAMILIES:
        if architecture in (*family.architectures, family.model_type):
            return family
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise ValueError(f"{where}: architecture={architecture!r}; allowed: {known}")
