"""Logits and greedy tokens of transformers' encoder–decoders, small and with odd sizes.

python -m tests.interop.make_encoder_decoder_goldens    (in an environment with torch, transformers)
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.interop.weights import draw

FOLDER = Path(__file__).parent / "goldens" / "encoder_decoders"
LENGTHS = (20, 13)  # of the encoder's rows; what follows is padding
TARGETS = 15
NEW_TOKENS = 32
END = 96  # the tests' tokenizer ends a text with it
SMALL = {
    "vocab_size": 97,
    "d_model": 42,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "decoder_start_token_id": 3,
}
LATER = SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Case: transformers' model class, its fields. CodeT5 is T5 1.0.
CASES = {
    "t5": ("T5ForConditionalGeneration", SMALL),
    "t5_v1_1": ("T5ForConditionalGeneration", LATER),
    "mt5": ("MT5ForConditionalGeneration", LATER),
    "mt5_tied": ("MT5ForConditionalGeneration", SMALL | {"feed_forward_proj": "gated-gelu"}),
}


def drawn_model(cls, fields, folder):
    """The model as it loads from a folder whose tensors are drawn, their shapes, config.json."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    cls(cls.config_class(**fields)).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    with safe_open(path, "numpy") as file:
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in sorted(file.keys())}
    stated = json.loads((Path(folder) / "config.json").read_text())
    if not fields.get("tie_word_embeddings", True):
        # As on the hub; transformers 5 writes neither the matrix nor the key, but reads both.
        shapes["lm_head.weight"] = shapes["shared.weight"]
        stated["tie_word_embeddings"] = False
    save_file({n: draw(n, s) for n, s in shapes.items()}, path, {"format": "pt"})
    model = cls.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    return model.eval(), shapes, stated


def main():
    """Writes one file for each of the cases named on the command line, or for all."""
    import torch
    import transformers

    for case in sys.argv[1:] or CASES:
        kind, fields = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            model, shapes, stated = drawn_model(getattr(transformers, kind), fields, folder)
        rng, start = np.random.default_rng(0), stated["decoder_start_token_id"]
        mask = (np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
        tokens = np.where(mask, rng.integers(4, END, mask.shape), 0)
        tokens[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = END
        targets = rng.integers(4, stated["vocab_size"], (len(LENGTHS), TARGETS))
        targets[:, 0] = start
        source = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            out = model(**source, decoder_input_ids=torch.from_numpy(targets))
            ids = torch.full((len(LENGTHS), 1), start)
            for _ in range(NEW_TOKENS):
                logits = model(**source, decoder_input_ids=ids).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        np.savez_compressed(
            FOLDER / f"{case}.npz",
            config=json.dumps(stated),
            shapes=json.dumps(shapes),
            tokens=tokens,
            mask=mask,
            targets=targets,
            hidden=out.encoder_last_hidden_state.numpy(),
            logits=out.logits.numpy(),
            greedy=ids[:, 1:].numpy(),
            transformers=transformers.__version__,
        )


if __name__ == "__main__":
    main()
