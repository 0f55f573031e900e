"""A GGUF file's metadata as the config.json that the hub's families read.

What llama.cpp knows of an architecture beside the file (layers that slide, activations, what an
absent key means) is in its src/models; how hub folders become files, in its conversion scripts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from jaxlm.interop import gguf_rows
from jaxlm.interop.gguf_file import GGUFFile
from jaxlm.interop.gguf_header import Header, layer_types, rope
from jaxlm.interop.rows import Row

Told = Callable[[Header], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of GGUF's.

    Attributes:
        hub: the hub's name of it.
        keys: names in the metadata, behind that of the architecture, and in config.json.
        told: more keys of config.json, from other metadata and from which tensors there are.
        rows: what stands in place of `gguf_rows.ROWS`.
        shifted: scales of norms are stored plus one, which the hub's are not.
    """

    hub: str
    keys: Mapping[str, str]
    told: Told = lambda header: {}
    rows: tuple[Row, ...] = ()
    shifted: bool = False


SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
GROUPED = SIZES | {"attention.head_count_kv": "num_key_value_heads"}
LLAMA = GROUPED | {
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def llama(header: Header) -> dict[str, Any]:
    """Llama, or with experts Mixtral."""
    said = rope(header) | {"hidden_act": "silu"}
    if header.get("expert_count"):
        names = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
        said |= {theirs: header.get(ours) for ours, theirs in names.items()}
        return said | {"architectures": ["MixtralForCausalLM"]}
    header.get("expert_used_count")
    biases = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
    return said | {key: header.has(name) for key, name in biases.items()}


def qwen(header: Header) -> dict[str, Any]:
    """Qwen 2 and 3; of its mixtures of experts those of 3 rescale the weights of the chosen."""
    said = {"hidden_act": "silu", "norm_topk_prob": header.has("attn_q_norm.weight")}
    return rope(header) | (said if header.get("expert_count") else {"hidden_act": "silu"})


def gemma(header: Header) -> dict[str, Any]:
    """All of Gemma."""
    return rope(header) | {"hidden_activation": "gelu_pytorch_tanh"}


def query_scalar(header: Header, large: int) -> dict[str, Any]:
    """What queries are divided by the root of, of 27B, which has so many layers, and of others."""
    heads, width = header.get("attention.head_count"), header.get("embedding_length")
    of_27b = header.get("block_count") == large
    return {"query_pre_attn_scalar": width // heads if of_27b else header.head_dim}


def gemma2(header: Header) -> dict[str, Any]:
    """Every second layer slides; what early files leave out."""
    absent = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    said = {key: header.get(key, value) for key, value in absent.items()}
    said |= {"sliding_window": header.get("attention.sliding_window", 4096)}
    return gemma(header) | said | layer_types(header, 2) | query_scalar(header, 46)


def gemma3(header: Header) -> dict[str, Any]:
    """Every sixth layer sees everything, and rotates apart."""
    local = {"rope_local_base_freq": header.get("rope.freq_base_swa", 10000.0)}
    return gemma(header) | local | layer_types(header, 6) | query_scalar(header, 62)


def stablelm(header: Header) -> dict[str, Any]:
    """Files say that attention and MLP are side by side where they are not; a norm does not."""
    header.get("use_parallel_residual")
    return rope(header, partial=True) | {
        "hidden_act": "silu",
        "use_parallel_residual": not header.has("ffn_norm.weight"),
        "use_qkv_bias": header.has("attn_q.bias"),
    }


def falcon(header: Header) -> dict[str, Any]:
    """With RoPE; that with ALiBi is not among GGUF's."""
    heads, two = header.get("attention.head_count_kv", 1), header.has("attn_norm_2.weight")
    return {
        "multi_query": heads == 1,
        "num_kv_heads": heads,
        "new_decoder_architecture": heads > 1 or two,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "bias": header.has("attn_qkv.bias"),
    }


def gpt_neox(header: Header) -> dict[str, Any]:
    """With the activation of all that are known."""
    rotated = header.get("rope.dimension_count", header.head_dim)
    return {
        "rotary_pct": rotated / header.head_dim,
        "hidden_act": "gelu",
        "attention_bias": header.has("attn_qkv.bias"),
    }


def mpt(header: Header) -> dict[str, Any]:
    """ALiBi, and what is clipped."""
    return {
        "attn_config": {
            "alibi_bias_max": header.get("attention.max_alibi_bias", 8),
            "clip_qkv": header.get("attention.clamp_kqv"),
        }
    }


def olmo(header: Header) -> dict[str, Any]:
    """Its norms' epsilon is no choice."""
    header.get("attention.layer_norm_epsilon")
    return rope(header) | {"hidden_act": "silu"}


def gpt_oss(header: Header) -> dict[str, Any]:
    """Every second layer slides; YaRN's ramp is not rounded."""
    said = {"rope_scaling": {"rope_type": "default"}} | rope(header)
    if said["rope_scaling"]["rope_type"] == "yarn":
        said["rope_scaling"]["truncate"] = False
    return said | layer_types(header, 2)


def phi3(header: Header) -> dict[str, Any]:
    """A window of 0 is none."""
    return rope(header, partial=True) | {
        "hidden_act": "silu",
        "sliding_window": header.get("attention.sliding_window") or None,
    }


def starcoder2(header: Header) -> dict[str, Any]:
    """With the activation of all that are known."""
    return rope(header) | {
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": header.has("attn_output.bias"),
    }


EPSILON = "attention.layer_norm_epsilon"
CAP = {"final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"attention.sliding_window": "sliding_window"}
ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM", LLAMA, llama, (*gguf_rows.PAIRED, *gguf_rows.EXPERT_BY_EXPERT)
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", LLAMA, qwen),
    "qwen3": Architecture("Qwen3ForCausalLM", LLAMA, qwen),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        LLAMA | EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        qwen,
    ),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", LLAMA | EXPERTS, qwen),
    "gemma": Architecture("GemmaForCausalLM", LLAMA, gemma, shifted=True),
    "gemma2": Architecture("Gemma2ForCausalLM", LLAMA, gemma2, shifted=True),
    "gemma3": Architecture("Gemma3ForCausalLM", LLAMA | WINDOW | CAP, gemma3, shifted=True),
    "phi3": Architecture("Phi3ForCausalLM", LLAMA, phi3, (*gguf_rows.QKV, *gguf_rows.GATE_AND_UP)),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        LLAMA | WINDOW | EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        gpt_oss,
        gguf_rows.GPT_OSS_NORMS,
    ),
    "olmo": Architecture(
        "OlmoForCausalLM", LLAMA | {"attention.clamp_kqv": "clip_qkv"}, olmo, gguf_rows.PAIRED
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", LLAMA, olmo),
    "stablelm": Architecture("StableLmForCausalLM", LLAMA | {EPSILON: "layer_norm_eps"}, stablelm),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM", LLAMA | WINDOW | {EPSILON: "norm_epsilon"}, starcoder2
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        SIZES
        | {"feed_forward_length": "ffn_hidden_size", "rope.freq_base": "rope_theta"}
        | {EPSILON: "layer_norm_epsilon"},
        falcon,
        (*gguf_rows.QKV, *gguf_rows.FALCON_NORMS),
    ),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM",
        SIZES
        | {EPSILON: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"}
        | {"rope.freq_base": "rotary_emb_base"},
        gpt_neox,
        gguf_rows.QKV,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            EPSILON: "layer_norm_epsilon",
        },
        lambda header: {"activation_function": "gelu_new"},
        gguf_rows.QKV,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {
            "block_count": "n_layer",
            "context_length": "seq_length",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            EPSILON: "layer_norm_epsilon",
        },
        rows=gguf_rows.QKV,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        {
            "block_count": "n_layers",
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "attention.head_count": "n_heads",
            EPSILON: "layer_norm_epsilon",
        },
        mpt,
        gguf_rows.QKV,
    ),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """What a file holds.

    Raises:
        ValueError: an architecture that is not known.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"{file.name}: architecture={name!r}; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def config_json(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """What config.json would say; metadata that nothing reads is logged.

    Raises:
        ValueError: a value that no such file has.
    """
    header = Header(file, file.metadata["general.architecture"])
    rows = file.shapes.get("token_embd.weight", (0,))[0]
    try:
        said = {theirs: header.get(ours) for ours, theirs in architecture.keys.items()}
        if "rope_theta" in said and said["rope_theta"] is None:
            said["rope_theta"] = 10000.0  # llama.cpp's, which is not that of every hub's class
        said |= {"architectures": [architecture.hub], **architecture.told(header)}
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{file.name}: a value of its metadata is no such: {error}") from error
    if header.unread:
        logging.warning("%s: not understood: %s", file.name, ", ".join(sorted(header.unread)))
    return {"tie_word_embeddings": "output.weight" not in file.shapes, "vocab_size": rows} | said


class Unshifted:
    """A file's tensors, one less for scales of norms that are stored plus one.

    Attributes:
        name, shapes, dtypes: the file's.
    """

    def __init__(self, file: GGUFFile):
        self.name, self.shapes, self.dtypes = file.name, file.shapes, file.dtypes
        self._file = file

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        x = self._file.read(name)
        return x - 1 if name.endswith("norm.weight") else x
