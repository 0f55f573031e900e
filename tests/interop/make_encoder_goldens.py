"""Hidden states and logits of transformers' encoders, small and with odd sizes.

python -m tests.interop.make_encoder_goldens        (in an environment with torch and transformers)
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.interop.weights import draw

FOLDER = Path(__file__).parent / "goldens" / "encoders"
LENGTHS = (20, 13)  # of the rows; what follows is padding
SMALL = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 34,
    "hidden_act": "gelu",
    "type_vocab_size": 3,
}
XLMR = SMALL | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
# Case: transformers' model class, its fields.
CASES = {
    "bert": ("BertModel", SMALL),
    "bert_masked_lm": ("BertForMaskedLM", SMALL | {"hidden_act": "gelu_new"}),
    "xlm_roberta": ("XLMRobertaModel", XLMR),
    "xlm_roberta_masked_lm": ("XLMRobertaForMaskedLM", XLMR),
    "roberta": ("RobertaModel", XLMR),
    "roberta_masked_lm": ("RobertaForMaskedLM", XLMR),
}


def drawn_model(cls, config, folder, **options):
    """The model as it loads from a folder whose tensors are drawn, and their shapes."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    cls(config, **options).save_pretrained(folder)  # under the names that the hub knows
    path = Path(folder) / "model.safetensors"
    with safe_open(path, "numpy") as file:
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in sorted(file.keys())}
    save_file({n: draw(n, s) for n, s in shapes.items()}, path, {"format": "pt"})
    model = cls.from_pretrained(folder, attn_implementation="eager", dtype="float32", **options)
    return model.eval(), shapes


def batch(config):
    """Tokens, mask and token types, the rows padded on the right."""
    rng, shape = np.random.default_rng(0), (len(LENGTHS), max(LENGTHS))
    mask = (np.arange(shape[1])[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
    tokens = np.where(mask, rng.integers(2, config.vocab_size, shape), config.pad_token_id)
    return tokens, mask, rng.integers(0, config.type_vocab_size, shape)


def main():
    """Writes one file for each of the cases named on the command line, or for all."""
    import torch
    import transformers

    for case in sys.argv[1:] or CASES:
        kind, fields = CASES[case]
        cls = getattr(transformers, kind)
        # No pooler: nothing here reads it.
        options = {} if "MaskedLM" in kind else {"add_pooling_layer": False}
        with tempfile.TemporaryDirectory() as folder:
            config = cls.config_class(**fields)
            model, shapes = drawn_model(cls, config, folder, **options)
            stated = json.loads((Path(folder) / "config.json").read_text())
        tokens, mask, types = batch(config)
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
        given = {n: torch.from_numpy(x) for n, x in given.items()}
        with torch.no_grad():
            out = model(**given, output_hidden_states=True)
        logits = {"logits": out.logits.numpy()} if "MaskedLM" in kind else {}
        np.savez_compressed(
            FOLDER / f"{case}.npz",
            config=json.dumps(stated),
            shapes=json.dumps(shapes),
            tokens=tokens,
            mask=mask,
            types=types,
            hidden=out.hidden_states[-1].numpy(),
            transformers=transformers.__version__,
            **logits,
        )


if __name__ == "__main__":
    main()
