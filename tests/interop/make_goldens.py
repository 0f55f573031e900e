"""Logits of transformers' models, small and with odd sizes, for tests that run without torch.

python -m tests.interop.make_goldens        (in an environment with torch and transformers)
"""

import json
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
}


def main():
    """Writes one file a case."""
    import torch
    import transformers

    for case, (kind, fields) in CASES.items():
        config = getattr(transformers, kind)(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        config.architectures = [type(model).__name__]
        model.eval()
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        state = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        drawn = {n: torch.from_numpy(draw(n, shape)) for n, shape in state.items()}
        model.load_state_dict(drawn, strict=not tied)
        tokens = np.random.default_rng(0).integers(2, config.vocab_size, (2, 40))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
            ids = torch.from_numpy(tokens[:1, :8])
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        np.savez_compressed(
            FOLDER / f"{case}.npz",
            config=json.dumps(config.to_dict()),
            shapes=json.dumps(state),
            tokens=tokens,
            logits=logits,
            greedy=ids[0].numpy(),
            transformers=transformers.__version__,
        )


if __name__ == "__main__":
    main()
