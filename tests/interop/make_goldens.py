"""Logits of transformers' models, small and with odd sizes, for tests that run without torch.

python -m tests.interop.make_goldens        (in an environment with torch and transformers)
"""

import inspect
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.interop.weights import draw

FOLDER = Path(__file__).parent / "goldens"
NEW_TOKENS = 64
SMALL = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# For those whose head_dim is hidden_size / num_attention_heads.
PLAIN = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 48}
NEOX = {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}
OLD = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FALCON = {k: v for k, v in NEOX.items() if k != "intermediate_size"}
BLOOM = {k: v for k, v in OLD.items() if k not in ("n_embd", "n_positions")} | {"hidden_size": 48}
MPT = {
    "vocab_size": 97,
    "d_model": 48,
    "n_layers": 3,
    "n_heads": 6,
    "max_seq_len": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
}
QUARTER = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
# Case: transformers' config class, its fields.
CASES = {
    "llama": ("LlamaConfig", SMALL),
    "llama_bias_tied": (
        "LlamaConfig",
        SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_linear": (
        "LlamaConfig",
        SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama_yarn": (
        "LlamaConfig",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_llama3": (
        "LlamaConfig",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 7}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen2_sliding": (
        "Qwen2Config",
        SMALL | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SMALL),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL
        | {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("GemmaConfig", SMALL),
    "gemma2": ("Gemma2Config", SMALL | {"sliding_window": 7, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL
        | {
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "olmo2": ("Olmo2Config", SMALL),
    "stablelm": ("StableLmConfig", PLAIN | {"use_qkv_bias": True}),
    "stablelm_parallel": (
        "StableLmConfig",
        PLAIN | {"use_parallel_residual": True, "rope_parameters": QUARTER},
    ),
    "starcoder2": ("Starcoder2Config", PLAIN | {"sliding_window": 7}),
    "gpt2": ("GPT2Config", OLD),
    "gptj": ("GPTJConfig", OLD | {"rotary_dim": 4, "n_inner": 56}),
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "gpt_neox_serial": (
        "GPTNeoXConfig",
        NEOX | {"use_parallel_residual": False, "rope_parameters": QUARTER},
    ),
    "gpt_oss": (
        "GptOssConfig",
        SMALL
        | {
            "sliding_window": 7,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "truncate": False,
                "beta_fast": 8.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "falcon_7b": ("FalconConfig", FALCON),
    "falcon_40b": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 56},
    ),
    "falcon_11b": (
        "FalconConfig",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_rw": (
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("BloomConfig", BLOOM),
    "mpt": ("MptConfig", MPT),
    "mpt_clip": ("MptConfig", MPT | {"attn_config": {"clip_qkv": 0.9, "softmax_scale": 0.2}}),
    "olmo": ("OlmoConfig", PLAIN | {"clip_qkv": 0.9}),
    "olmo_tied": ("OlmoConfig", PLAIN | {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        PLAIN
        | {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "phi3": (
        "Phi3Config",
        PLAIN
        | {
            "pad_token_id": 0,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.5, 3.5, 4.5],
            },
        },
    ),
}


# Falcon's eager attention adds ALiBi's bias twice: to the scores and, once more, with the mask.
SDPA = {"falcon_rw"}
# How much padding each row of the padded batch has.
PADDING = (0, 9)


def drawn_model(transformers, config, folder, attention):
    """The model as it loads from a folder whose tensors are drawn, and their shapes."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)  # under the names that the hub knows
    path = Path(folder) / "model.safetensors"
    with safe_open(path, "numpy") as file:
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in sorted(file.keys())}
    save_file({n: draw(n, s) for n, s in shapes.items()}, path, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, experts_implementation="eager", dtype="float32"
    )
    return model.eval(), shapes


def padded_logits(model, tokens):
    """Of the batch with padding on the left, positions counted from the first token as
    transformers' own generation counts them.
    """
    import torch

    mask = np.arange(tokens.shape[1])[None] >= np.array(PADDING)[:, None]
    given = {
        "input_ids": torch.from_numpy(np.where(mask, tokens, 0)),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    return model(**given).logits.numpy()


def main():
    """Writes one file for each of the cases named on the command line, or for all."""
    import torch
    import transformers

    for case in sys.argv[1:] or CASES:
        kind, fields = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            config = getattr(transformers, kind)(**fields)
            attention = "sdpa" if case in SDPA else "eager"
            model, shapes = drawn_model(transformers, config, folder, attention)
            stated = json.loads((Path(folder) / "config.json").read_text())
        tokens = np.random.default_rng(0).integers(2, config.vocab_size, (2, 40))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
            # The first row has no padding and is that of `logits`.
            padded = padded_logits(model, tokens)[1:, PADDING[1] :]
            ids = torch.from_numpy(tokens[:1, :8])
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        np.savez_compressed(
            FOLDER / f"{case}.npz",
            config=json.dumps(stated),
            shapes=json.dumps(shapes),
            tokens=tokens,
            logits=logits,
            padded=padded,
            greedy=ids[0].numpy(),
            transformers=transformers.__version__,
        )


if __name__ == "__main__":
    main()
